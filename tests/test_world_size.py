"""Whole runs at several world sizes in float64: what one process trains, two do, and so do both in turn.

In float32 such runs part within a few steps, for sums round differently: float64 tells an error from that.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import on_ranks
from toys import Sets, toy_recipe

import arat_dist.train as loop
from arat_dist.config import Recipe
from arat_dist.engine import Rank
from arat_dist.objectives import Objective, build_objective
from arat_dist.run import Run

STEPS = 14
"""Of 44 samples in batches of 8: more than two epochs, so that two batches reach from one into the next."""


def recipe(sets: Sets, storage: Path, steps: int) -> Recipe:
    train = {"sync_norms": True, "ema_decay": 0.8, "log_every": 1, "checkpoint_every": 100, "max_steps": steps}
    return toy_recipe(
        sets,
        train=train,
        attack={"steps": 2, "eps": "16/255"},
        optim={"lr": 0.02, "warmup_epochs": 1, "clip_grad_norm": 5.0},
        cluster={"storage": str(storage)},
    )


def in_double(recipe: Recipe) -> Objective:
    return build_objective(recipe).double()


def train_in_double(recipe: Recipe, name: str, rank: Rank) -> dict[str, Any]:
    loop.build_objective = in_double
    summary = loop.train(recipe, Run(recipe.cluster.storage, name), rank)
    return {"world_size": summary["world_size"], "samples_seen": summary["samples_seen"]}


def train_legs(sets: Sets, folder: Path, name: str, legs: list[tuple[int, int]]) -> Run:
    """A run in legs: each up to so many steps on so many ranks."""
    (folder / name).mkdir()
    for number, (steps, world_size) in enumerate(legs):
        scratch = folder / name / f"leg{number}"
        scratch.mkdir()
        work = partial(train_in_double, recipe(sets, folder / "runs", steps), name)
        for result in on_ranks(work, scratch, world_size):
            assert result == {"world_size": world_size, "samples_seen": 8 * steps}
    return Run(str(folder / "runs"), name)


def weights(run: Run, part: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.checkpoints.path(f"step_{STEPS:08d}/{part}.safetensors"))


def test_any_number_of_processes_trains_the_same(sets: Sets, tmp_path):
    """Losses, gradient norms, accuracies and rates of every step, and all weights, whoever computed them."""
    alone = train_legs(sets, tmp_path, "alone", [(STEPS, 1)])
    run = train_legs(sets, tmp_path, "other", [(5, 2), (9, 1), (STEPS, 3)])
    expected, got = alone.metrics(), run.metrics()
    assert [line["step"] for line in got] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for before, line in zip(expected, got, strict=True):
        assert line["lr"] == before["lr"]
        keys = [key for key in before if key == "loss" or key.startswith("loss_") or "accuracy" in key]
        assert len(keys) >= 6
        for key in [*keys, "gradient_norm"]:
            assert line[key] == pytest.approx(before[key], rel=1e-6, abs=1e-9), f"step {line['step']}: {key}"
    for part in ("model", "ema"):
        state, reference = weights(run, part), weights(alone, part)
        assert state.keys() == reference.keys() != set()
        # The EMA's statistics are measured at the end on batches of a rank's own.
        for name in (name for name in reference if part == "model" or "running" not in name):
            torch.testing.assert_close(
                state[name], reference[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=f"{part} {name}": f"{n}: {m}"
            )
