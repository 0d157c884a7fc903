"""Small recipes and data, and the processes that these tests started."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ARAT = str(Path(sys.executable).with_name("arat"))

MARK = "ARAT_TEST_SESSION"
"""Every process that a test starts inherits this variable, however many parents lie in between."""


def marked_processes(title: str = "") -> dict[int, str]:
    """Command lines by pid of the live processes that these tests started; those that contain `title`."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended since
            continue
    # Python's own helper ends with the process that it serves.
    return {pid: line for pid, line in found.items() if title in line and "resource_tracker" not in line and line}


LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""When a driver is killed, these two try for a minute (fixed in Ray 2.60) to tell the dead head node, then end."""


def wait_until_gone(timeout_s: float, *, but: tuple[str, ...] = ()) -> dict[int, str]:
    """Wait for the processes of these tests to end; returns those that are left, the titles in `but` aside."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = {pid: line for pid, line in marked_processes().items() if line not in but}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def tiny_overrides(digits: Path, storage: Path) -> dict[str, str]:
    return {
        "data.train": f"{digits}/train.beton",
        "data.val": f"{digits}/val.beton",
        "model.args.channels": "[8, 8, 16, 16]",
        "attack.steps": "1",
        "optim.warmup_epochs": "0",
        "train.epochs": "1",
        "train.global_batch_size": "32",
        "train.precision": "fp32",
        "train.max_steps": "6",
        "train.log_every": "2",
        "eval.attack": "pgd2",
        "eval.limit": "50",
        "track.mlflow": "false",
        "cluster.workers": "0",
        "cluster.storage": str(storage),
    }


def as_options(overrides: dict[str, str]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"--{key}={value}" for key, value in overrides.items()]


class NoisePictures:
    """`num_classes` noisy RGB pictures, one of each class."""

    description = "noise"

    def __init__(self, num_classes: int, side: int = 32):
        self.side = side
        self.class_names: Sequence[str] = [f"class {label:04d}" for label in range(num_classes)]

    def __len__(self) -> int:
        return len(self.class_names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8), index

    def name_of(self, index: int) -> str:
        return f"noise {index}"


class Recovery:
    """Times of a failure: until the workers that met it had all ended, and until the work was taken up again.

    Args:
        num_attempts: of the run, see `Run.num_attempts`.
    """

    def __init__(self, num_attempts: Callable[[], int]):
        self._num_attempts = num_attempts
        self._ended_s = self._resumed_s = float("nan")
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        """The failure happens now, or, where nothing but a new command goes on, that is started now."""
        self._begin, self._before = time.monotonic(), self._num_attempts()
        self._workers = marked_processes("ray::RayTrainWorker").keys()
        self._thread.start()

    def note(self, record: Callable[[str, object], None], *, detected: bool = True) -> None:
        """For the line on the failure, once what follows it was checked to equal what is without it."""
        self._thread.join(10)
        if detected:
            record("detected after", f"{self._ended_s:.1f} s")
        record("resumed after", f"{self._resumed_s:.1f} s")
        note_equal(record)

    def _watch(self) -> None:
        deadline = self._begin + 300
        while time.monotonic() < deadline and not self._resumed_s < float("inf"):
            seconds = time.monotonic() - self._begin
            if self._ended_s != self._ended_s and not self._workers & marked_processes("ray::RayTrainWorker").keys():
                self._ended_s = seconds
            if self._num_attempts() > self._before:
                self._resumed_s = seconds
            time.sleep(0.05)


def note_equal(record: Callable[[str, object], None]) -> None:
    """Note what equal weights and lines show."""
    record("samples lost or seen twice", "0 and 0")
    record("final state", "equal")
