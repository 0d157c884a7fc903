"""Saves beside the training: which are written, in what order, and what the training hears of those that fail."""

import errno
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from toys import toy_classifier, toy_setting

from arat_dist.agreement import Agreement
from arat_dist.checkpoint import MANIFEST, Checkpoint, checkpoint_names, load_newest
from arat_dist.config import OptimConfig
from arat_dist.engine import DDPEngine, Rank, set_statistics, statistics_of
from arat_dist.errors import SupersededError
from arat_dist.objectives.at import AT
from arat_dist.saving import Saver, capture
from arat_dist.storage import Storage

ALONE = Rank(0, 1, torch.device("cpu"))


def make(step: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((2,), value), "count": torch.tensor(step)}}, {"state": {}}, {})


def saver_in(folder: Any, check: Any = lambda: None) -> Saver:
    return Saver(Storage(str(folder)), keep=9, check=check)


def names(folder: Any) -> list[str]:
    return checkpoint_names(Storage(str(folder)))


def test_saves_are_written_one_after_the_other_and_the_context_waits_for_the_last(tmp_path, monkeypatch):
    write, at_work, most = Storage.write_json, 0, 0
    gate = threading.Event()

    def slow(self: Storage, *args: Any) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        gate.wait(0.2)
        write(self, *args)
        at_work -= 1

    monkeypatch.setattr(Storage, "write_json", slow)
    with saver_in(tmp_path) as saver:
        for step in (1, 2, 3):
            saver.submit(make(step))
    assert all((Storage(str(tmp_path)) / f"step_{step:08d}").exists(MANIFEST) for step in (1, 2, 3))
    assert most == 1


def test_a_checkpoint_behind_a_skipped_step_or_with_weights_that_are_no_numbers_is_not_written(tmp_path):
    with saver_in(tmp_path) as saver:
        saver.submit(make(1), torch.tensor(True))
        saver.submit(make(2), torch.tensor(False))
        saver.submit(make(3, float("nan")), torch.tensor(True))
        saver.submit(make(4), None)
        saver.finish(ALONE)
        saver.submit(make(5, float("inf")), None)
        with pytest.raises(FloatingPointError, match="model: w is no number any more"):
            saver.finish(ALONE)
    assert names(tmp_path) == ["step_00000001", "step_00000004"]


def test_a_full_disk_is_raised_at_the_end_and_not_before(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with saver_in(tmp_path) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write", full)
            saver.submit(make(1))
            saver.submit(make(2))
            with pytest.raises(OSError, match="No space left"):
                saver.finish(ALONE)
        saver.submit(make(3))
        saver.finish(ALONE)
    assert names(tmp_path) == ["step_00000003"]


def test_who_was_overtaken_hears_of_it_at_the_next_save(tmp_path):
    def check() -> None:
        raise SupersededError("others are at work")

    with saver_in(tmp_path, check) as saver:
        saver.submit(make(1))
        with pytest.raises(SupersededError):
            saver.submit(make(2))
        with pytest.raises(SupersededError):
            saver.finish(ALONE)
    assert names(tmp_path) == []


def capture_statistics(rank: Rank) -> dict[str, Any]:
    """What is saved of a net whose running statistics are the rank's number plus one, and what the rank has then."""
    engine = DDPEngine(AT(toy_classifier(split=False), toy_setting(AT)), OptimConfig(), rank)
    set_statistics(engine.objective, torch.full_like(statistics_of(engine.objective), rank.index + 1))
    checkpoint = capture(1, engine, {}, rank, {}, {})
    assert (checkpoint is not None) == rank.is_first
    saved = checkpoint and {
        "weights": dict(checkpoint.weights["model"]),
        "rows": checkpoint.progress["statistics.model"],
    }
    return {"saved": saved, "own": statistics_of(engine.objective)}


def test_weights_are_saved_with_the_ranks_mean_statistics_and_beside_them_each_ones_own(tmp_path):
    """The mean is what an evaluation, an export and another world size get; the ranks keep theirs."""
    first, second = on_two_ranks(capture_statistics, tmp_path)
    assert second["saved"] is None
    statistics = {name: v for name, v in first["saved"]["weights"].items() if "running_" in name}
    assert len(statistics) == 4
    assert all((value == 1.5).all() for value in statistics.values())
    for index, part in enumerate((first, second)):
        assert (part["own"] == index + 1).all()
        assert (first["saved"]["rows"][index] == index + 1).all()


def break_down(rank: Rank) -> list[str]:
    """The first rank, which alone has the checkpoint, finds that it is none."""
    heard = []
    for value in (1.0, float("nan")):
        with Saver(Storage("memory://saves"), keep=1, check=lambda: None) as saver:
            if rank.is_first:
                saver.submit(make(1, value))
            try:
                saver.finish(rank)
                heard.append("")
            except FloatingPointError as error:
                heard.append(str(error))
    return heard


def test_weights_that_are_no_numbers_at_the_end_end_the_run_on_all_ranks(tmp_path):
    """Else the others would wait for the first one in the evaluation."""
    first, second = on_two_ranks(break_down, tmp_path)
    assert first[0] == second[0] == ""
    assert first[1].startswith("model: w is no number any more")
    assert second[1].startswith("the weights are no numbers any more")


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
        waiting = threading.Thread(target=saver.wait, args=(lambda: beats.append(len(files)),))
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
