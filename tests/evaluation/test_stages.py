"""Stages: every sample once, the same answers at any number of ranks and after any interruption."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from arat_dist.data.loader import Batch
from arat_dist.engine import Rank
from arat_dist.errors import StoppedError
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.stages import Runner, Stage, cut
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


def runner(folder: Path | None, rank: Rank | None = None, batch_size: int = 16, **keys: Any) -> Runner:
    ledger = Ledger(None if folder is None else Storage(folder))
    return Runner(Pictures(), ledger, rank or Rank(0, 1, CPU), batch_size, **keys)


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


def share(rank: Rank, folder: Path) -> dict[str, Any]:
    """Three stages of one rank among several: what it computed, and what it was told; the second is half known."""
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
    try:
        stopping = Rank(rank.index, rank.world_size, CPU, stop_wanted=lambda: rank.index == 1)
        runner(None, stopping, 4).run(stage([]), **NOTE)
        stopped = False
    except StoppedError:
        stopped = True
    return {"seen": seen, "again": again, "square": whole["square"].tolist(), "stopped": stopped}


def test_ranks_share_the_batches_and_agree_on_the_answer(tmp_path):
    (tmp_path / "ranks").mkdir()
    answers = on_ranks(partial(share, folder=tmp_path / "evaluation"), tmp_path / "ranks", 2)
    batches = [batch.tolist() for batch in cut(SAMPLES, 4)]
    assert sorted(batch for each in answers for batch in each["seen"]) == batches
    assert sorted(batch for each in answers for batch in each["again"]) == batches[1::2]
    assert all(each["seen"] for each in answers)
    assert all(each["square"] == (SAMPLES**2).tolist() for each in answers)
    assert all(each["stopped"] for each in answers), "one rank alone must not stop"
