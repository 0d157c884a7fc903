"""Stages: every sample once, the same answers at any number of ranks and after any interruption."""

import json
import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from toys import Sets, is_installed, toy_recipe

from arat_dist.data.loader import Batch, Loader, val_loader
from arat_dist.engine import Rank
from arat_dist.errors import StoppedError, UserError
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.stages import Runner, Stage, cut, default_batch_size
from arat_dist.storage import Storage

CPU = torch.device("cpu")
SAMPLES = np.arange(0, 300, 3)


class Pictures:
    """A loader whose picture i is i in every pixel, and its label i % 7."""

    num_samples = 300

    def iterate(self, shares: Sequence[Any], side_at: Any = None) -> Any:
        for share in shares:
            keys = torch.tensor(share)
            yield Batch(keys.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).clone(), keys % 7, keys)

    def close(self) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass


def compute(seen: list[list[int]], images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
    seen.append(keys.tolist())
    assert torch.equal(images[:, 0, 0, 0].long(), keys % 256)
    return {"square": keys**2, "label": labels}


def stage(seen: list[list[int]], samples: Any = SAMPLES) -> Stage:
    return Stage("squares", samples, ("square", "label"), partial(compute, seen))


def runner(
    folder: Path | None, rank: Rank | None = None, batch_size: int = 16, loader: Loader | None = None, **keys: Any
) -> Runner:
    ledger = Ledger(None if folder is None else Storage(folder))
    return Runner(loader or Pictures(), ledger, rank or Rank(0, 1, CPU), batch_size, **keys)


NOTE = {"num_samples": 100, "cost": 1, "later_cost": 0}


@pytest.mark.parametrize("batch_size", [1, 4, 16, 128])
@pytest.mark.parametrize("count", [0, 1, 5, 23, 47, 48, 108, 360, 1000, 5000])
def test_a_stage_is_cut_into_equal_batches_that_share_out_evenly(count, batch_size):
    samples = np.arange(count) * 2 + 1
    batches = cut(samples, batch_size)
    assert np.concatenate([[], *batches]).tolist() == samples.tolist()
    sizes = [len(batch) for batch in batches]
    assert all(0 < size <= batch_size for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    # Unless batches would be of one picture, their number suits 1, 2 and 4 workers, and mostly 8.
    assert len(batches) in (0, 1, 2, 4) or len(batches) % 8 == 0 or max(sizes) == 1
    if count == 5000 and batch_size == 128:
        assert len(batches) == 40


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(1000, 128, [62, 63]), (1000, 1024, [250]), (8000, 1024, [500]), (100, 1024, [100]), (100, 64, [25])],
)
def test_batches_for_a_gpu_are_not_cut_as_fine_as_those_for_a_cpu(count, batch_size, sizes):
    assert sorted({len(batch) for batch in cut(np.arange(count), batch_size)}) == sizes


@pytest.mark.parametrize(
    ("image_size", "on_gpu"),
    [
        *((8, 1024), (28, 1024), (32, 1024), (33, 512), (64, 512), (96, 256), (128, 256)),
        *((160, 128), (224, 128), (256, 128), (299, 64), (384, 64), (512, 64), (100_000, 64)),
    ],
)
def test_a_batch_is_as_large_as_pictures_are_small(image_size, on_gpu):
    assert default_batch_size(image_size, "cuda") == on_gpu
    assert default_batch_size(image_size, "cpu") == 128


def test_answers_stand_in_the_order_of_the_samples():
    seen: list[list[int]] = []
    answer = runner(None).run(stage(seen), **NOTE)
    assert answer.columns["square"].tolist() == (SAMPLES**2).tolist()
    assert answer.columns["label"].tolist() == (SAMPLES % 7).tolist()
    assert seen == [batch.tolist() for batch in cut(SAMPLES, 16)]


def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path):
    class PowerCutError(Exception):
        pass

    first: list[list[int]] = []

    def fails(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        if len(first) == 3:
            raise PowerCutError
        return compute(first, images, labels, keys)

    with pytest.raises(PowerCutError):
        runner(tmp_path).run(Stage("squares", SAMPLES, ("square", "label"), fails), **NOTE)
    second: list[list[int]] = []
    answer = runner(tmp_path).run(stage(second), **NOTE)
    assert answer.columns["square"].tolist() == (SAMPLES**2).tolist()
    assert len(first) == 3
    assert first + second == [batch.tolist() for batch in cut(SAMPLES, 16)]
    third: list[list[int]] = []
    runner(tmp_path).run(stage(third), **NOTE)
    assert third == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: text.replace("144", "145"),
        lambda text: json.dumps(json.loads(text) | {"samples": [1, 2, 3]}),
        lambda text: json.dumps({**json.loads(text), "columns": {"square": [1]}}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_of_the_ledger_is_computed_anew_with_a_word(tmp_path, damage, caplog):
    runner(tmp_path).run(stage([]), **NOTE)
    path = tmp_path / "ledger/squares/000000.json"
    path.write_text(damage(path.read_text()))
    seen: list[list[int]] = []
    with caplog.at_level(logging.WARNING):
        answer = runner(tmp_path).run(stage(seen), **NOTE)
    assert answer.columns["square"].tolist() == (SAMPLES**2).tolist()
    assert seen == [cut(SAMPLES, 16)[0].tolist()]
    assert "ledger/squares/000000.json: damaged" in caplog.text


def test_what_is_no_file_of_the_ledger_is_left_alone(tmp_path):
    (tmp_path / "ledger/squares").mkdir(parents=True)
    for name in (".000000.json.123", "notes.txt", "999999.json"):
        (tmp_path / "ledger/squares" / name).write_text("?")
    seen: list[list[int]] = []
    runner(tmp_path).run(stage(seen), **NOTE)
    assert len(seen) == len(cut(SAMPLES, 16))


def test_who_is_asked_to_stop_keeps_what_is_finished(tmp_path):
    seen: list[list[int]] = []
    asked = Rank(0, 1, CPU, stop_wanted=lambda: len(seen) >= 2)
    with pytest.raises(StoppedError):
        runner(tmp_path, asked).run(stage(seen), **NOTE)
    assert len(seen) == 2
    assert len(list((tmp_path / "ledger/squares").iterdir())) == 2


def test_without_samples_nothing_is_asked():
    answer = runner(None).run(stage([], SAMPLES[:0]), **NOTE)
    assert answer.columns["square"].tolist() == []


class Counted(Pictures):
    """Notes what each iteration was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def iterate(self, shares: Sequence[Any], side_at: Any = None) -> Any:
        self.asked.append([list(map(int, share)) for share in shares])
        return super().iterate(shares, side_at)


def test_a_rank_alone_goes_through_what_is_open_in_one_iteration(tmp_path):
    batches = [batch.tolist() for batch in cut(SAMPLES, 4)]
    loader = Counted()
    runner(tmp_path, batch_size=4, loader=loader).run(stage([]), **NOTE)
    assert loader.asked == [batches]
    for number in (2, 5, 6):
        (tmp_path / f"ledger/squares/{number:06}.json").unlink()
    loader = Counted()
    runner(tmp_path, batch_size=4, loader=loader).run(stage([]), **NOTE)
    assert loader.asked == [[batches[number] for number in (2, 5, 6)]]


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "beton-loader"]


needs_ffcv = pytest.mark.skipif(not is_installed("ffcv"), reason="FFCV is not installed")


@pytest.mark.parametrize("loader_name", [pytest.param("ffcv", marks=needs_ffcv), "torchvision"])
def test_batches_lie_in_a_ring_and_are_whole_when_they_are_asked_about(sets: Sets, loader_name):
    """More batches than the ring has buffers, each looked at late, when those that follow have been loaded."""
    data = toy_recipe(sets, data={"loader": loader_name}).data
    seen: list[int] = []
    with val_loader(data, 1) as loader:
        alone = {int(b.keys): (b.images.clone(), int(b.labels)) for b in loader.iterate([[i] for i in range(23)])}  # pyright: ignore[reportArgumentType]

        def compare(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
            time.sleep(0.02)
            for image, label, key in zip(images, labels.tolist(), keys.tolist(), strict=True):
                assert torch.equal(image, alone[key][0][0])
                assert label == alone[key][1]
            seen.extend(keys.tolist())
            return {"label": labels}

        answer = runner(None, batch_size=1, loader=loader).run(
            Stage("look", np.arange(23), ("label",), compare), **NOTE
        )
    assert seen == list(range(23))
    assert answer.columns["label"].tolist() == [alone[key][1] for key in range(23)]


@needs_ffcv
def test_the_next_batches_are_loaded_while_one_is_asked_about(sets: Sets, monkeypatch):
    loaded: list[int] = []
    threads: set[threading.Thread] = set()
    with val_loader(toy_recipe(sets).data, 2) as loader:
        fill = loader._fill  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(loader, "_fill", lambda *args: loaded.extend(args[3]) or fill(*args))

        def wait_for_the_next(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
            threads.update(loading())
            deadline = time.monotonic() + 60
            while max(loaded) < min(22, int(keys.max()) + 1):
                assert time.monotonic() < deadline, "nothing is loaded ahead"
                time.sleep(0.01)
            return {"label": labels}

        runner(None, batch_size=2, loader=loader).run(
            Stage("look", np.arange(23), ("label",), wait_for_the_next), **NOTE
        )
        assert len(threads) == 1, "one thread goes through all batches"
        assert not loading()
    assert loaded == list(range(23))


def test_who_stops_leaves_nothing_that_loads(sets: Sets, tmp_path):
    seen: list[int] = []

    def note(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        seen.append(len(keys))
        return {"label": labels}

    with val_loader(toy_recipe(sets).data, 2) as loader:
        asked = Rank(0, 1, CPU, stop_wanted=lambda: len(seen) >= 2)
        with pytest.raises(StoppedError):
            runner(tmp_path, asked, 2, loader).run(Stage("look", np.arange(23), ("label",), note), **NOTE)
        assert len(seen) == 2
        assert len(list((tmp_path / "ledger/look").iterdir())) == 2
        assert not loading()


@pytest.mark.parametrize(
    ("batch_size", "count", "size", "half"),
    [(64, 1024, 64, 32), (128, 4000, 128, 64), (128, 1000, 63, 31), (1024, 400, 200, 100), (3, 5, 3, 1)],
)
def test_a_batch_that_the_gpu_cannot_hold_is_answered_with_half_of_it(tmp_path, batch_size, count, size, half):
    """Where a small set is cut into batches below half of what is allowed, half of the batch is what would help."""
    done: list[list[int]] = []

    def grows(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        if done:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total ...")
        return compute(done, images, labels, keys)

    question = Stage("squares", np.arange(count) % 300, ("square", "label"), grows)
    with pytest.raises(UserError) as error:
        runner(tmp_path, batch_size=batch_size).run(question, **NOTE)
    message = str(error.value)
    assert message.startswith(f"--batch-size: {size}: ")
    assert f"--batch-size {half} (eval.batch_size in a recipe) would be right" in message
    assert "\n" not in message
    assert [path.name for path in (tmp_path / "ledger/squares").iterdir()] == ["000000.json"]
    # With what was said a batch is smaller than the one that didn't fit.
    assert max(map(len, cut(np.arange(count), half))) < max(map(len, cut(np.arange(count), batch_size)))


def test_a_single_picture_that_the_gpu_cannot_hold_is_said_to_be_one():
    def fails(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="not one picture fits into the GPU's memory; a larger GPU or"):
        runner(None, batch_size=1).run(Stage("squares", SAMPLES, ("square",), fails), **NOTE)


def share(rank: Rank, folder: Path) -> dict[str, Any]:
    """Four stages of one rank among several: what it computed, and what it was told.

    The second is half known, in the third the second rank is slow, in the last it is asked to stop.
    """
    seen: list[list[int]] = []
    work = runner(folder, rank, 4)
    whole = work.run(stage(seen), **NOTE).columns
    half = {int(path.stem) for path in (folder / "ledger/squares").iterdir() if int(path.stem) % 2}
    rank.all_reduce(torch.zeros(1))
    if rank.is_first:
        for number in half:
            (folder / f"ledger/squares/{number:06}.json").unlink()
    rank.all_reduce(torch.zeros(1))
    again: list[list[int]] = []
    work.run(stage(again), **NOTE)
    own: list[list[int]] = []

    def uneven(images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """The first rank waits for the second to begin, the second until it has the last batch that isn't done."""
        (folder / f"begun-{rank.index}-{len(own)}").touch()
        num_begun = 2 if rank.is_first else len(cut(SAMPLES, 4))
        deadline = time.monotonic() + 120
        while len(list(folder.glob("begun-*"))) < num_begun:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return compute(own, images, labels, keys)

    loader = Counted()
    runner(None, rank, 4, loader).run(Stage("uneven", SAMPLES, ("square", "label"), uneven), **NOTE)
    try:
        stopping = Rank(rank.index, rank.world_size, CPU, stop_wanted=lambda: rank.index == 1)
        runner(None, stopping, 4).run(stage([]), **NOTE)
        stopped = False
    except StoppedError:
        stopped = True
    return {
        "seen": seen,
        "again": again,
        "square": whole["square"].tolist(),
        "stopped": stopped,
        "own": own,
        "asked": loader.asked,
    }


def test_ranks_share_the_batches_and_agree_on_the_answer(tmp_path):
    (tmp_path / "ranks").mkdir()
    answers = on_ranks(partial(share, folder=tmp_path / "evaluation"), tmp_path / "ranks", 2)
    batches = [batch.tolist() for batch in cut(SAMPLES, 4)]
    assert sorted(batch for each in answers for batch in each["seen"]) == batches
    assert sorted(batch for each in answers for batch in each["again"]) == batches[1::2]
    assert all(each["seen"] for each in answers)
    assert all(each["square"] == (SAMPLES**2).tolist() for each in answers)
    assert all(each["stopped"] for each in answers), "one rank alone must not stop"
    # A slow rank keeps the first of its share, the fast one takes what is left of it; a share loads in one iteration.
    fast, slow = (each["own"] for each in answers)
    assert slow == [batches[1]]
    left = batches[:2:-2] if len(batches) % 2 == 0 else batches[-2:2:-2]
    assert fast == [*batches[::2], *left]
    assert answers[0]["asked"] == [batches[::2], *([batch] for batch in left)]
    assert answers[1]["asked"] == [batches[1::2]]
