"""A run on a GPU that isn't there, as a whole and in parts: between two log lines nothing waits for the GPU."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_gpu import GPU
from fake_training import FakeTraining, Sections, small_recipe
from test_fake_step import CASES
from toys import Sets, is_installed
from watch import Findings, Watch

from arat_dist.engine import Rank
from arat_dist.metrics import MetricsLog
from arat_dist.run import Run
from arat_dist.saving import capture, take_up
from arat_dist.train import train


class Line(NamedTuple):
    """What was found before a line of the log, and while it was written."""

    before: Findings
    at_line: Findings
    finite: list[bool]
    """What the host was told of the line's steps."""


def two_lines(folder: Path) -> list[Line]:
    """Of two steps each, the last one diagnosed."""
    with Watch():
        training = FakeTraining(small_recipe({}))
        log = MetricsLog(Run(str(folder), "one"), training.rank)
        training.step()
    lines = []
    for _ in range(2):
        with Watch() as before:
            log.add(training.step())
            log.add(result := training.step(diagnosed=True))
            log.note(training.notes)
        with Watch() as at_line:
            finite = log.write(training.num_steps, 0.5, 0.1, result.gradient_norm)
        lines.append(Line(before.found, at_line.found, [*finite]))
    return lines


def test_the_log_waits_once_a_line_and_never_between(on_fake_gpu, tmp_path):
    first, second = on_fake_gpu(two_lines, tmp_path)
    num_transfers = [sum("to the GPU" not in wait for wait in line.at_line.waits) for line in (first, second)]
    assert num_transfers == [2, 1]  # at the first line the machines are counted, too
    assert first.before.waits == second.before.waits == []
    assert first.finite == second.finite == [True, True]
    assert {"loss", "robust_accuracy", "gradient_cosine"} <= Run(str(tmp_path), "one").metrics()[-1].keys()


class Checkpointed(NamedTuple):
    """What was found of taking a checkpoint and of going on from it."""

    capture: Findings
    on_gpu: list[str]
    """What of the checkpoint isn't in host memory."""
    on_host: list[str]
    """What isn't on the GPU when the run has gone on from it."""
    num_tensors: int


def checkpointed(sections: Sections, folder: Path) -> Checkpointed:
    with Watch():
        training = FakeTraining(small_recipe(sections))
        log = MetricsLog(Run(str(folder), "one"), training.rank)
        log.add(training.step(diagnosed=True))
        log.note(training.notes)
    with Watch() as watch:
        progress, about = log.state()
        checkpoint = capture(1, training.engine, training.averages, training.rank, progress, {"line": about})
    assert checkpoint is not None
    held: dict[str, Any] = {**checkpoint.weights, **checkpoint.optimizer["state"], "progress": checkpoint.progress}
    on_gpu = [f"{part}.{name}" for part, state in held.items() for name, value in state.items() if value.is_cuda]
    with Watch():
        take_up(checkpoint, training.engine, training.averages, training.rank)
        MetricsLog(Run(str(folder), "one"), training.rank, checkpoint)
        training.step()
    on_host = [name for name, tensor in training.kept().items() if not tensor.is_cuda]
    return Checkpointed(watch.found, on_gpu, on_host, sum(map(len, held.values())))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_is_queued_and_taken_up(on_fake_gpu, optimizer, tmp_path):
    found = on_fake_gpu(checkpointed, CASES["averages"] | {"optim": {"name": optimizer, "lr": 0.001}}, tmp_path)
    assert found.capture.waits == []
    assert found.on_gpu == []
    assert found.on_host == []
    assert len(found.capture.copies) > 0.9 * found.num_tensors


MAY_WAIT = {
    "write": "at a log line",
    "_num_nodes": "at the first log line",
    "_shared": "in an evaluation",
    "_compute": "in an evaluation",
    "restate": "at the end",
    "finish": "at the end",
}
"""Functions of the product that wait for the GPU once the ranks agree on a start, and when."""


class WholeRun(NamedTuple):
    """What was found of a run, and what it says of itself."""

    found: Findings
    summary: dict[str, Any]


def whole_run(sections: Sections, folder: Path) -> WholeRun:
    run = Run(str(folder), "one")
    with Watch() as watch:
        summary = train(small_recipe(sections), run, Rank(0, 1, GPU))
    return WholeRun(watch.found, summary)


@pytest.mark.skipif(not is_installed("ffcv"), reason="DataLoader's thread pins memory by the driver itself")
def test_a_whole_run_waits_where_it_says(on_fake_gpu, sets: Sets, tmp_path):
    """With real pictures, evaluations in its course and at its end, and checkpoints in files; devices aren't mixed."""
    sections: Sections = {
        "data": {"train": sets.train, "val": sets.val, "num_classes": 3},
        "train": {"epochs": 2, "global_batch_size": 22, "log_every": 1, **CASES["averages"]["train"]},
        "eval": {"every": 1, "every_attack": "pgd2", "attack": "pgd2"},
        "track": {"diagnostics_every": 2},
    }
    found, summary = on_fake_gpu(whole_run, sections, tmp_path)
    start = max(i for i, wait in enumerate(found.waits) if "check_agreement" in wait) + 1
    others = [wait for wait in found.waits[start:] if not MAY_WAIT.keys() & set(re.findall(r"\w+", wait))]
    # Clean and robust accuracy, on their way to the log.
    assert len(others) <= 2
    assert all(re.match(r"copy of \[\] to the GPU at train.py", wait) for wait in others)
    lines = [wait for wait in found.waits if re.search(r"to the host at metrics.py:\d+ write", wait)]
    assert len(lines) == len(Run(str(tmp_path), "one").metrics()) == summary["steps"] == 4
    assert summary["device"] == "a GPU that isn't there"
