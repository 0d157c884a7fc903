"""What happens to processes, disks and data in the course of a run, done for real: it goes on and ends as if nothing
had been. Failures of machines and networks are in tests/slow."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Recovery, marked_processes, note_equal, tiny_overrides
from test_ray import by_value

from arat_dist.checkpoint import Checkpoint, checkpoint_names, load_newest, save_checkpoint
from arat_dist.config import ClusterConfig, Recipe
from arat_dist.engine import Rank
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from arat_dist.storage import Storage
from arat_dist.train import train
from launcher.cluster import connect, disconnect, run_workers
from launcher.fit import fit, with_absolute_paths

STEPS = 30
ALONE = {"cluster.workers": "0"}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:9")
        connect(ClusterConfig(workers=2))
    yield
    disconnect()


def recipe_of(digits: Path, storage: Path, **changes: str) -> Recipe:
    overrides = tiny_overrides(digits, storage) | {
        "cluster.workers": "2",
        "train.max_steps": str(STEPS),
        "train.checkpoint_every": "4",
        "train.keep_checkpoints": "99",
    }
    return load_recipe("digits", list((overrides | changes).items()))


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory) -> Run:
    """The run that nothing happens to."""
    storage = tmp_path_factory.mktemp("calm")
    fit(recipe_of(digits, storage), "calm", lambda _: None)
    return Run(str(storage), "calm")


@pytest.fixture(scope="module")
def calm_alone(digits, tmp_path_factory) -> Run:
    """The same in one process."""
    storage = tmp_path_factory.mktemp("alone")
    fit(recipe_of(digits, storage, **ALONE), "calm", lambda _: None)
    return Run(str(storage), "calm")


def newest(run: Run) -> Checkpoint:
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is not None
    return checkpoint


def check_equal(run: Run, calm: Run) -> None:
    """Weights and optimizer state bit for bit, and every line once with the same loss."""
    ours, theirs = newest(run), newest(calm)
    assert ours.step == theirs.step == STEPS
    assert [k for k, v in theirs.weights["model"].items() if not torch.equal(v, ours.weights["model"][k])] == []
    assert ours.optimizer["state"].keys() == theirs.optimizer["state"].keys() != set()
    for name, state in theirs.optimizer["state"].items():
        assert all(torch.equal(value, ours.optimizer["state"][name][key]) for key, value in state.items()), name
    losses = [[(line["step"], line["loss"]) for line in each.metrics()] for each in (run, calm)]
    assert losses[0] == losses[1] != []


@pytest.mark.failure("a worker is killed in mid-step (SIGKILL)")
def test_a_dead_worker_is_replaced_and_the_run_goes_on(digits, tmp_path, calm, record_property):
    killed, recovery = [], Recovery(Run(str(tmp_path), "mourned").num_attempts)

    def kill_one(line: dict[str, Any]) -> None:
        if line["step"] >= 8 and not killed:
            killed.append(max(marked_processes("ray::RayTrainWorker")))
            recovery.begin()
            os.kill(killed[0], signal.SIGKILL)

    summary = fit(recipe_of(digits, tmp_path), "mourned", kill_one)
    assert len(killed) == 1
    assert (summary["restarts"], summary["steps"], summary["samples_seen"]) == (1, STEPS, STEPS * 32)
    run = Run(str(tmp_path), "mourned")
    first, second = (json.loads(line) for line in run.folder.read("attempts.jsonl").splitlines())
    assert (first["step"], second["step"] % 4) == (0, 0)
    assert second["step"] >= 4
    check_equal(run, calm)
    recovery.note(record_property)


@pytest.mark.failure("a worker is stopped (SIGSTOP, cluster.step_timeout_s 8)")
def test_a_stopped_worker_is_noticed_and_replaced(digits, tmp_path, calm, record_property):
    """Nothing of it runs any more, and the others wait for it in a collective."""
    recipe = recipe_of(digits, tmp_path, **{"cluster.step_timeout_s": "8"})
    stopped, recovery = [], Recovery(Run(str(tmp_path), "stopped").num_attempts)

    def stop_one(line: dict[str, Any]) -> None:
        if line["step"] >= 8 and not stopped:
            stopped.append(max(marked_processes("ray::RayTrainWorker")))
            recovery.begin()
            os.kill(stopped[0], signal.SIGSTOP)

    summary = fit(recipe, "stopped", stop_one)
    run = Run(str(tmp_path), "stopped")
    assert summary["restarts"] == 1
    assert len(stopped) == 1
    assert not Path(f"/proc/{stopped[0]}").exists()
    check_equal(run, calm)
    stacks = {
        name.partition("-")[0]: (run.folder / "stacks").read(name).decode() for name in (run.folder / "stacks").names()
    }
    assert stacks.keys() == {"rank0", "rank1"}
    assert any("is stopped by a signal" in text for text in stacks.values())
    assert all("in train_watched" in text for text in stacks.values())
    recovery.note(record_property)


def train_with_a_bad_disk(recipe: Recipe, storage: str, marker: str, rank: Rank) -> dict[str, Any]:
    """The loader of one rank fails once, in the midst of an epoch."""
    from arat_dist.data import beton

    loader: Any = beton.BetonLoader
    fill = loader._fill

    def failing(self: Any, memory: Any, side_at: Any, at: int, *args: Any) -> Any:
        if rank.index == 1 and at == 9 and not Path(marker).exists():
            Path(marker).touch()
            raise OSError(5, "Input/output error")
        return fill(self, memory, side_at, at, *args)

    loader._fill = failing
    try:
        return train(recipe, Run(storage, "bad-disk"), rank)
    finally:
        loader._fill = fill


@pytest.mark.failure("the loader of a worker fails")
def test_a_loaders_error_costs_a_restart(digits, tmp_path, calm, record_property):
    recipe = with_absolute_paths(recipe_of(digits, tmp_path))
    run = Run(str(tmp_path), "bad-disk")
    run.open(recipe, "a" * 64)
    work = partial(by_value(train_with_a_bad_disk), recipe, str(tmp_path), str(tmp_path / "failed"))
    summary = run_workers(work, recipe.cluster, "bad-disk")
    assert (tmp_path / "failed").exists()
    assert summary["steps"] == STEPS
    first, second = (json.loads(line) for line in run.folder.read("attempts.jsonl").splitlines())
    assert (first["step"], second["step"]) in {(0, 4), (0, 8)}
    check_equal(run, calm)
    note_equal(record_property)


def train_with_a_fault(recipe: Recipe, storage: str, rank: Rank) -> dict[str, Any]:
    """Steps 6 to 8 have a loss that is no number on one rank, the first time that they are taken."""
    from arat_dist.objectives import base

    method: Any = base.Objective
    forward, begin_step = method.forward, method.begin_step
    calls = 0

    def counting(self: Any, epoch: float) -> None:
        nonlocal calls
        calls += epoch != float("inf")
        begin_step(self, epoch)

    def faulty(self: Any, *args: Any) -> Any:
        from dataclasses import replace

        out = forward(self, *args)
        return replace(out, loss=out.loss * float("nan")) if rank.index == 1 and 6 <= calls <= 8 else out

    method.forward, method.begin_step = faulty, counting
    try:
        return train(recipe, Run(storage, "faulty"), rank)
    finally:
        method.forward, method.begin_step = forward, begin_step


@pytest.mark.failure("a loss is no number in three steps in a row (train.max_skipped_steps 3)")
def test_a_loss_that_is_no_number_on_one_worker_leads_back_to_a_good_checkpoint(
    digits, tmp_path, calm, record_property
):
    recipe = with_absolute_paths(recipe_of(digits, tmp_path, **{"train.max_skipped_steps": "3"}))
    run = Run(str(tmp_path), "faulty")
    run.open(recipe, "a" * 64)
    run_workers(partial(by_value(train_with_a_fault), recipe, str(tmp_path)), recipe.cluster, "faulty")
    attempts = [json.loads(line) for line in run.folder.read("attempts.jsonl").splitlines()]
    assert [attempt["step"] for attempt in attempts] == [0, 4]
    skipped = [json.loads(line) for line in run.folder.read("skipped.jsonl").splitlines()]
    assert [line["step"] for line in skipped] == [6, 7, 8]
    assert all(len(set(line["samples"])) == 32 for line in skipped)
    check_equal(run, calm)
    note_equal(record_property)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=pytest.mark.failure(f"the newest checkpoint is damaged ({name})"))
        for name in ("flipped bit", "cut short")
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(digits, tmp_path, calm_alone, damage, caplog, record_property):
    fit(recipe_of(digits, tmp_path, **ALONE, **{"train.max_steps": "18"}), "damaged", lambda _: None)
    run = Run(str(tmp_path), "damaged")
    file = Path(run.checkpoints.path("step_00000018/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content) if damage == "flipped bit" else bytes(content[: len(content) // 2]))
    run.folder.delete("summary.json")
    fit(recipe_of(digits, tmp_path, **ALONE), "damaged", lambda _: None)
    assert f"passed over a damaged checkpoint: {file}: SHA-256" in caplog.text
    attempts = [json.loads(line) for line in run.folder.read("attempts.jsonl").splitlines()]
    assert [attempt["step"] for attempt in attempts] == [0, 16]
    check_equal(run, calm_alone)
    note_equal(record_property)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MiB of its own (root)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.failure("the disk of the run is full for a while")
def test_a_full_disk_stops_neither_training_nor_loses_the_last_good_checkpoint(
    digits, small_disk, calm_alone, record_property
):
    """It fills up at step 8, and somebody makes room at step 20; metrics that couldn't be written come later."""
    recipe = recipe_of(digits, small_disk, **ALONE, **{"train.keep_checkpoints": "2"})
    run, ballast = Run(str(small_disk), "full"), small_disk / "ballast"
    seen: list[tuple[int, list[str]]] = []
    log = Run.log

    def watching(self: Run, *lines: dict[str, Any]) -> None:
        step = lines[-1]["step"]
        if step == 8:
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                        file.flush()
                except OSError:
                    pass
        if step == 20:
            ballast.unlink()
        seen.append((step, checkpoint_names(run.checkpoints)))
        log(self, *lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", watching)
        summary = fit(recipe, "full", lambda _: None)
    assert summary["steps"] == STEPS
    # Whatever failed in between, the good ones stayed.
    assert all(names for step, names in seen if step > 8)
    assert max(names[-1] for step, names in seen if 8 < step <= 20) <= "step_00000008"
    assert checkpoint_names(run.checkpoints)[-1] == "step_00000030"
    assert [line["step"] for line in run.metrics()] == list(range(2, STEPS + 1, 2))
    check_equal(run, calm_alone)
    note_equal(record_property)


SAVE_AND_DIE = """
import os, pathlib, sys
import torch
from arat_dist.checkpoint import Checkpoint, save_checkpoint
from arat_dist.storage import Storage

torch.set_num_threads(1)

def save(folder, step, **more):
    weights = {"model": {"w": torch.full((8,), float(step))}, **more}
    save_checkpoint(folder, Checkpoint(step, weights, {"state": {}}, {"rows": torch.ones(2)}), keep=1)

def save_and_die(folder, die_at):
    calls = 0

    def dying(operation):
        def call(*args, **keys):
            nonlocal calls
            if calls == die_at:
                os.kill(os.getpid(), 9)
            calls += 1
            return operation(*args, **keys)
        return call

    os.replace, os.unlink, os.fsync = dying(os.replace), dying(os.unlink), dying(os.fsync)
    for name in ("replace", "unlink", "mkdir"):
        setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
    save(folder, 20, ema={"w": torch.full((8,), 21.0)})

for die_at in range(200):
    folder = Storage(f"{sys.argv[1]}/{die_at}")
    save(folder, 10)
    if (child := os.fork()) == 0:
        save_and_die(folder, die_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(die_at, os.waitstatus_to_exitcode(status))
    if status == 0:
        break
"""


@pytest.mark.failure("killed at every file boundary of a save")
def test_a_save_killed_at_any_file_boundary_leaves_a_good_checkpoint(tmp_path):
    """kill -9 before every rename, fsync, deletion and new folder of a save; one process forks those that die."""
    script = [sys.executable, "-c", SAVE_AND_DIE, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert statuses == [-signal.SIGKILL] * (len(statuses) - 1) + [0], done.stderr
    assert len(statuses) > 12, "six files, each with its fsync and its rename"
    for die_at, status in enumerate(statuses):
        folder = Storage(tmp_path / str(die_at))
        checkpoint = load_newest(folder)
        assert checkpoint is not None, die_at
        assert checkpoint.weights["model"]["w"].tolist() == [checkpoint.step] * 8
        assert checkpoint.step in ((10, 20) if status else (20,))
        # What comes next writes the same step over what lies there.
        save_checkpoint(folder, Checkpoint(20, {"model": {"w": torch.full((8,), 20.0)}}, {"state": {}}, {}), keep=1)
        again = load_newest(folder)
        assert again is not None
        assert again.step == 20


@pytest.mark.failure("a second run of the same name is started")
def test_the_second_of_two_runs_of_one_name_is_refused(digits, tmp_path):
    from arat_dist.errors import UserError

    recipe = recipe_of(digits, tmp_path, **ALONE)
    refused: list[str] = []

    def start_another(line: dict[str, Any]) -> None:
        if not refused:
            with pytest.raises(UserError, match="another process trains this run") as raised:
                fit(recipe, "twice", lambda _: None)
            refused.append(str(raised.value))

    # A rank that waits until the second start has been refused.
    step = Run.log

    def waiting(self: Run, *lines: dict[str, Any]) -> None:
        step(self, *lines)
        deadline = time.monotonic() + 60
        while lines[-1]["step"] == 4 and not refused and time.monotonic() < deadline:
            time.sleep(0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", waiting)
        summary = fit(recipe, "twice", start_another)
    assert len(refused) == 1
    assert summary["restarts"] == 0
