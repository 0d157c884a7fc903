"""The end of a run's last save: who waits for it is alive, as long as it gets on."""

import threading
import time

import torch
import torch.distributed as dist
from ranks import on_two_ranks

from arat_dist.agreement import Agreement
from arat_dist.checkpoint import Checkpoint, load_newest
from arat_dist.engine import Rank
from arat_dist.saving import Saver
from arat_dist.storage import Storage


def test_a_long_save_gives_a_sign_of_life_for_each_file_and_none_for_a_file_that_hangs(tmp_path):
    goes_on, beats = threading.Event(), []

    def check() -> None:
        """Before each file; the storage hangs at the fourth."""
        files.append(len(files))
        if len(files) == 4:
            hangs.set()
            assert goes_on.wait(60)
        else:
            time.sleep(0.3)

    files: list[int] = []
    hangs = threading.Event()
    with Saver(Storage(tmp_path), keep=1, check=check) as saver:
        saver.submit(Checkpoint(3, {"model": {"w": torch.ones(2)}}))
        waiting = threading.Thread(target=saver.finish, args=(lambda: beats.append(len(files)),))
        waiting.start()
        assert hangs.wait(60)
        time.sleep(0.5)
        before = len(beats)
        time.sleep(0.5)
        assert len(beats) == before >= 2
        goes_on.set()
        waiting.join(60)
    assert len(beats) > before
    checkpoint = load_newest(Storage(tmp_path))
    assert checkpoint is not None
    assert checkpoint.step == 3


def wait_for_the_first(rank: Rank) -> int:
    """The first rank comes when the second one has given three signs of life in its wait."""
    agreement, beats = Agreement(rank, None), []
    agreement.exchange()
    store = dist.distributed_c10d._get_default_store()
    if rank.is_first:
        for number in range(3):
            store.wait([f"alive{number}"])

    def beat() -> None:
        store.set(f"alive{len(beats)}", "")
        beats.append(rank.index)

    agreement.meet(beat)
    return len(beats)


def test_ranks_that_wait_for_the_first_ones_last_save_give_signs_of_life(tmp_path):
    assert on_two_ranks(wait_for_the_first, tmp_path)[1] >= 3
    assert Agreement(Rank(0, 1, torch.device("cpu")), None).meet(lambda: None) is None
