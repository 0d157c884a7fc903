"""DeepSpeed as a user's path: a recipe trained with it, and runs that go on under another engine and world size."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from small import ARAT, as_options, tiny_overrides

from arat_dist.checkpoint import Checkpoint, load_newest
from arat_dist.run import Run


def train(digits: Path, folder: Path, name: str, steps: int, engine: str, workers: int, **keys: str) -> dict:
    """`arat train` up to so many steps, of a new run or of one that ended earlier; its summary.

    Keys of the recipe have two underscores for the dot.
    """
    (folder / "runs" / name / "summary.json").unlink(missing_ok=True)
    kind, _, stage = engine.partition("-")
    overrides = tiny_overrides(digits, folder / "runs") | {
        "train.max_steps": str(steps),
        "train.checkpoint_every": "2",
        "train.sync_norms": "true",
        "train.ema_decay": "0.9",
        "engine.kind": kind,
        "engine.zero_stage": stage or "2",
        "cluster.workers": str(workers),
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    command = [ARAT, "train", "digits", "--name", name, "--json", *as_options(overrides)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("DeepSpeed", "deepspeed", "Warning"):
        assert word not in done.stderr, done.stderr
    return json.loads(done.stdout)


def newest(folder: Path, name: str) -> Checkpoint:
    checkpoint = load_newest(Run(str(folder / "runs"), name).checkpoints)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(("engine", "workers"), [("deepspeed-2", 2), ("deepspeed-3", 2), ("deepspeed-2", 0)])
def test_a_run_that_is_taken_up_ends_as_one_that_was_not_broken_off(digits, tmp_path, engine, workers):
    summary = train(digits, tmp_path, "whole", 6, engine, workers)
    assert (summary["steps"], summary["world_size"], summary["samples_seen"]) == (6, max(1, workers), 192)
    train(digits, tmp_path, "broken", 4, engine, workers)
    train(digits, tmp_path, "broken", 6, engine, workers)
    whole, broken = newest(tmp_path, "whole"), newest(tmp_path, "broken")
    assert whole.step == broken.step == 6
    for part, state in whole.weights.items():
        assert state.keys() == broken.weights[part].keys() != set()
        assert all(torch.equal(value, broken.weights[part][key]) for key, value in state.items()), part
    assert whole.optimizer["state"].keys() == broken.optimizer["state"].keys() != set()
    for name, entry in whole.optimizer["state"].items():
        assert torch.equal(entry["momentum_buffer"], broken.optimizer["state"][name]["momentum_buffer"]), name
    # Nothing but what the command was given and asked for.
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_a_run_goes_on_under_other_engines_and_with_other_workers(digits, tmp_path):
    # Without attacks and with small steps; even so, runs of this net whose sums round differently part in a few steps.
    keys = {"objective__name": "standard", "optim__lr": "0.001"}
    train(digits, tmp_path, "ddp", 5, "ddp", 2, **keys)
    course = [(2, "ddp", 2), (4, "deepspeed-3", 2), (5, "deepspeed-2", 0)]
    summaries = [train(digits, tmp_path, "moving", *leg, **keys) for leg in course]
    assert [summary["restarts"] for summary in summaries] == [0, 1, 2]
    expected, got = newest(tmp_path, "ddp"), newest(tmp_path, "moving")
    assert got.weights["model"].keys() == expected.weights["model"].keys()
    for name, entry in expected.optimizer["state"].items():
        momentum = entry["momentum_buffer"]
        # Momentum that got lost would be two thirds of it.
        assert (got.optimizer["state"][name]["momentum_buffer"] - momentum).norm() < 0.1 * momentum.norm(), name
