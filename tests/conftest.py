"""What all tests share: quiet libraries, one thread, tiny data sets, and no process left behind."""

import os
import sys
import time
from pathlib import Path

# Read when the libraries are imported: nothing phones home from a test.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from toys import BlotchSource, Sets

# A time is never a reason to fail: machines are shared.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """A training set of 44 and a validation set of 23 pictures of 16x16 in three classes."""
    from arat_dist.data.beton_writer import write_beton

    folder = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("train", 44, 0), ("val", 23, 1)):
        write_beton(BlotchSource(count, seed), folder / f"{name}.beton")
    return Sets(str(folder / "train.beton"), str(folder / "val.beton"))


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


def pytest_sessionfinish(session: pytest.Session):
    """Fail the whole run if a test has left a process; they get a moment to end."""
    deadline = time.monotonic() + 10
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"\nprocesses left behind by the tests: {left}\n")
