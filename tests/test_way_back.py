"""Steps that are no numbers on one of two ranks: the run goes back, under every engine, and ends as without them."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from toys import Sets, toy_recipe

from arat_dist.checkpoint import Checkpoint, load_newest
from arat_dist.engine import Rank
from arat_dist.objectives.base import Objective, Output
from arat_dist.run import Run
from arat_dist.storage import Storage
from arat_dist.train import train

ENGINES: dict[str, dict[str, Any]] = {"ddp": {}} | {
    f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)
}
SAVED_AT = 4
SPOILED = (5, 6, 7)


def spoil(rank: Rank, patch: pytest.MonkeyPatch) -> None:
    """The second rank's loss is no number in three steps, once, and the first rank's save before them takes long."""
    begin_step, forward, write = Objective.begin_step, Objective.forward, Storage.write_json
    step = 0

    def counting(self: Objective, epoch: float) -> None:
        nonlocal step
        step += epoch != math.inf
        begin_step(self, epoch)

    def spoiled(self: Objective, *args: Any) -> Output:
        out = forward(self, *args)
        return replace(out, loss=out.loss * math.nan) if rank.index == 1 and step in SPOILED else out

    def slow(self: Storage, name: str, content: dict[str, Any]) -> None:
        if self.uri.endswith(f"step_{SAVED_AT:08d}"):
            time.sleep(2)
        write(self, name, content)

    patch.setattr(Objective, "begin_step", counting)
    patch.setattr(Objective, "forward", spoiled)
    patch.setattr(Storage, "write_json", slow)


def run_all(sets: Sets, folder: str, rank: Rank) -> None:
    keys = {"max_steps": 10, "checkpoint_every": SAVED_AT, "log_every": 1, "max_skipped_steps": 3, "ema_decay": 0.8}
    for name, engine in ENGINES.items():
        for kind in ("calm", "spoiled"):
            recipe, run = toy_recipe(sets, engine=engine, train=keys), Run(folder, f"{name}-{kind}")
            if rank.is_first:
                run.open(recipe, "a" * 64)
            with pytest.MonkeyPatch.context() as patch:
                if kind == "spoiled":
                    spoil(rank, patch)
                train(recipe, run, rank)


@pytest.fixture(scope="module")
def runs(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Their folder."""
    folder = str(tmp_path_factory.mktemp("runs"))
    on_two_ranks(partial(run_all, sets, folder), tmp_path_factory.mktemp("two"))
    return folder


def newest(run: Run) -> Checkpoint:
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_go_back_to_the_first_ones_last_save_and_nothing_is_left_of_the_fault(runs, engine):
    calm, spoiled = Run(runs, f"{engine}-calm"), Run(runs, f"{engine}-spoiled")
    attempts, skipped = (
        [json.loads(line)["step"] for line in spoiled.folder.read(file).splitlines()]
        for file in ("attempts.jsonl", "skipped.jsonl")
    )
    assert (attempts, skipped) == ([0, SAVED_AT], list(SPOILED))
    expected, got = newest(calm), newest(spoiled)
    assert got.step == expected.step == 10
    for part, state in expected.weights.items():
        assert all(torch.equal(value, got.weights[part][name]) for name, value in state.items()), part
    assert set(expected.weights) == {"model", "ema"}
    for name, entry in expected.optimizer["state"].items():
        assert torch.equal(got.optimizer["state"][name]["momentum_buffer"], entry["momentum_buffer"]), name
    assert expected.progress.keys() == got.progress.keys() >= {"statistics.model", "statistics.ema"}
    assert all(torch.equal(value, got.progress[name]) for name, value in expected.progress.items())
    losses = [[(line["step"], line["loss"]) for line in run.metrics()] for run in (calm, spoiled)]
    assert losses[0] == losses[1] != []
