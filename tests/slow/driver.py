"""`arat train` on several machines, and the times at which something was seen of it."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from nodes import Machines
from small import ARAT, as_options, tiny_overrides

NUM_STEPS = 120
TWO = {
    "cluster.workers": "2",
    "cluster.placement": "spread",
    "train.max_steps": str(NUM_STEPS),
    "train.checkpoint_every": "10",
}
"""Two workers on two machines; where one is left, both on that one, if it has the CPUs."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    weights: dict[str, torch.Tensor]
    losses: dict[int, float]


class Driver:
    """One `arat train` of digits; its stderr goes to a file.

    Args:
        machines: where it trains.
        name: of the run.
        overrides: recipe keys beside those of `tiny_overrides`.
    """

    def __init__(self, machines: Machines, name: str, overrides: dict[str, str]):
        self.folder = machines.storage / "runs" / name
        common = tiny_overrides(machines.storage, machines.storage / "runs") | {
            "cluster.address": machines.address,
            "data.stage_to": str(machines.disk / "sets"),
            "attack.steps": "4",
            "train.epochs": "40",
        }
        self._log = machines.disk / f"{name}.log"
        with self._log.open("w") as stderr:
            self.process = subprocess.Popen(
                [ARAT, "train", "digits", "--json", *as_options(common | overrides), "--name", name],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=machines.disk,
                start_new_session=True,
            )
        self.first_seen: dict[str, float] = {}
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON lines file of the run."""
        file = self.folder / name
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> list[int]:
        """Steps of the lines of metrics, in their order."""
        return [line["step"] for line in self.lines("metrics.jsonl")]

    def wait_for(self, condition: Callable[[], object], what: str, timeout_s: float = 240) -> None:
        """Wait until something holds; fails where it never does, or where the command has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before {what}\n{self.stderr}"
            assert time.monotonic() < deadline, f"never: {what}\n{self.stderr}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: max(self.steps(), default=0) >= step, f"step {step}")

    def wait_for_attempt(self, count: int) -> None:
        """Wait until the workers have taken up the work for the so-many-th time."""
        self.wait_for(lambda: len(self.lines("attempts.jsonl")) >= count, f"attempt {count}")

    def summary(self, timeout_s: float = 400) -> dict[str, Any]:
        """Wait for the end; what --json printed."""
        stdout, _ = self.process.communicate(timeout=timeout_s)
        self._over.set()
        assert self.process.returncode == 0, self.stderr
        return json.loads(stdout)

    def failure(self, timeout_s: float = 240) -> str:
        """Wait for the end with status 1; the last line of stderr."""
        self.process.communicate(timeout=timeout_s)
        self._over.set()
        assert self.process.returncode == 1, self.stderr
        return self.stderr.splitlines()[-1]

    def end(self) -> None:
        """Have it gone, whatever it does."""
        self._over.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def outcome(self) -> Outcome:
        """Weights of the newest checkpoint and losses by step, as they are now."""
        newest = max((self.folder / "checkpoints").glob("step_*"))
        return Outcome(
            safetensors.torch.load_file(newest / "model.safetensors"),
            {line["step"]: line["loss"] for line in self.lines("metrics.jsonl")},
        )

    def times(self, since: float) -> dict[str, str]:
        """When a failure was seen and when the work went on, in seconds after it was done."""
        time.sleep(0.5)  # what was written just now has to be seen first
        seen = [when for line, when in self.first_seen.items() if "anew" in line and when > since]
        attempts = [when for line, when in self.first_seen.items() if line.startswith("attempt") and when > since]
        return {
            "detected after": f"{min(seen) - since:.1f} s" if seen else "-",
            "resumed after": f"{min(attempts) - since:.1f} s" if attempts else "-",
        }

    def _watch(self) -> None:
        """Note when each line of stderr and each attempt was there first."""
        while not self._over.wait(0.1):
            lines = self.stderr.splitlines() + [f"attempt {n}" for n, _ in enumerate(self.lines("attempts.jsonl"))]
            for line in lines:
                self.first_seen.setdefault(line, time.time())
