"""What all tests share: quiet libraries, one thread, tiny data sets, and no process left behind."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Read when the libraries are imported: nothing phones home from a test.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from toys import BlotchSource, Sets, is_installed

# A shell that starts tests in its background has them ignore Ctrl-C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A time is never a reason to fail: machines are shared.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


NEEDED = {
    "deepspeed": ["test_zero.py"],
    "ffcv": ["data/test_beton_*.py", "data/test_deep_check.py", "data/test_s*.py", "evaluation/test_question.py"],
    "imagecorruptions": ["evaluation/test_corruptions.py"],
    "mlflow": ["test_tracking.py"],
    "optuna": ["search/*"],
    "ray": ["test_clusters.py", "test_controller.py", "test_trials.py"],
}
"""Tests that need a library as such; the others run without any of these (`make test-oldest`)."""
collect_ignore_glob = [file for library, files in NEEDED.items() if not is_installed(library) for file in files]


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """A training set of 44 and a validation set of 23 pictures of 16x16 in three classes."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("train", 44, 0), ("val", 23, 1)):
        write_toy_beton(BlotchSource(count, seed), folder / f"{name}.beton")
    return Sets(str(folder / "train.beton"), str(folder / "val.beton"))


def write_toy_beton(source: BlotchSource, path: Path) -> None:
    """Write a set, without FFCV where it isn't installed."""
    if not is_installed("ffcv"):
        from benchmarks.gpu_parts.beton_file import Stored, write_beton

        pairs = map(source.__getitem__, range(len(source)))
        stored = [Stored(picture.tobytes(), 16, 16, is_jpeg=False, label=label) for picture, label in pairs]
        write_beton(path, stored, source.class_names, source.description)
        return
    from arat_dist.data.beton_writer import write_beton

    write_beton(source, path)


def children() -> dict[int, str]:
    """Process ids and command lines of this process's living children (Linux; elsewhere none are found)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
    # Python's own helper of `spawn`, which ends with this process.
    return {pid: command for pid, command in found.items() if "multiprocessing.resource_tracker" not in command}


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """What a test marked `failure` does goes into its report."""
    for item in items:
        if marker := item.get_closest_marker("failure"):
            item.user_properties.append(("failure", marker.args[0]))


def failures(reporter: Any) -> dict[str, list[str]]:
    """A line for each failure that was done: its name, whether it passed, what was noted of it; by outcome."""
    found: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.getreports(outcome):
            notes = dict(getattr(report, "user_properties", ()))
            name = notes.pop("failure", None)
            if name is None or (outcome == "passed" and report.when != "call"):
                continue
            said = "; ".join(f"{key} {value}" for key, value in notes.items())
            found.setdefault(outcome, []).append(f"{name}: {outcome}{said and f' ({said})'}")
    return found


def pytest_terminal_summary(terminalreporter: Any):
    """What tests have noted, and one line a failure; the latter into the file FAILURES_LOG too, where that is set."""
    for report in terminalreporter.getreports("passed"):
        notes = dict(getattr(report, "user_properties", ()))
        if report.when == "call" and notes and "failure" not in notes:
            said = "; ".join(f"{key} {value}" for key, value in notes.items())
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {said}")
    lines = [line for group in failures(terminalreporter).values() for line in group]
    if lines:
        terminalreporter.section("failures done for real")
        for line in lines:
            terminalreporter.write_line(line)
    if log := os.environ.get("FAILURES_LOG"):
        with Path(log).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


def pytest_sessionfinish(session: pytest.Session):
    """Fail the whole run if a failure was skipped, or a test has left a process; they get a moment to end."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and "skipped" in failures(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    deadline = time.monotonic() + 10
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"\nprocesses left behind by the tests: {left}\n")
