"""metrics.jsonl: what a step yields, gathered on the device and written a line at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from arat_dist.engine import Rank
from arat_dist.run import Run
from arat_dist.step import StepResult

T = TypeVar("T")
TIMED = ("loader_wait", "compute")
"""What the log measures the time of."""


class MetricsLog:
    """Means of the step's metrics between two lines of metrics.jsonl.

    They are summed on the device, weighed by the samples: one all-reduce and one host sync a line, none a step.

    Args:
        run: the run; its lines after `step` are dropped, since they will be computed again.
        rank: this process; the first one writes.
        step: steps done before.
    """

    def __init__(self, run: Run, rank: Rank, step: int):
        self._run, self._rank = run, rank
        lines = run.forget_metrics_after(step) if rank.is_first else []
        self._last: dict[str, Any] = lines[-1] if lines else {}
        self._first_time_s = float(self._last.get("time_s", 0.0))
        self._begin = self._line_begin = time.perf_counter()
        self._num_images = self._line_images = 0
        self._names: list[str] = []
        self._notes: dict[str, Tensor] = {}
        self._sums: Tensor | None = None
        self._seconds = dict.fromkeys(TIMED, 0.0)
        self._num_overflows = self._last.get("overflows", 0)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time that the loop waits for them is kept apart."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds["loader_wait"] += time.perf_counter() - began
            yield batch

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what is the method's own work: the time that goes elsewhere is the trainer's."""
        began = time.perf_counter()
        yield
        self._seconds["compute"] += time.perf_counter() - began

    def add(self, result: StepResult) -> None:
        """Add one step's means over this rank's samples."""
        for metrics, num_samples in result.metrics:
            self._names = list(metrics)
            weighed = torch.stack([*metrics.values()]).double() * num_samples
            self._sums = weighed if self._sums is None else self._sums.add_(weighed)
            self._line_images += num_samples
        self._num_overflows += result.num_overflows

    def note(self, metrics: dict[str, Tensor]) -> None:
        """Keep 0-d values that are the same on all ranks for the next line."""
        self._notes |= metrics

    def write(self, step: int, epoch: float, lr: float, gradient_norm: Tensor) -> None:
        """Write a line for the steps since the last one; every rank calls it.

        Raises:
            FloatingPointError: the loss or the gradient is no longer a number.
        """
        assert self._sums is not None
        counts = self._sums.new_tensor([self._line_images])
        *sums, num_images = self._rank.all_reduce(torch.cat([self._sums, counts])).tolist()
        means = {name: value / num_images for name, value in zip(self._names, sums, strict=True)}
        now = time.perf_counter()
        elapsed = now - self._line_begin
        self._last = {
            "step": step,
            "epoch": round(epoch, 4),
            "time_s": round(self._first_time_s + now - self._begin, 3),
            **means,
            **{name: value.item() for name, value in self._notes.items()},
            "lr": lr,
            "gradient_norm": gradient_norm.item(),
            "images_per_second": num_images / elapsed,
            "memory_mb": _peak_memory_mb(self._rank.device),
            # Shares of the host's time; on a GPU, which works on its own, the host waits where it needs a result.
            **{f"{name}_fraction": round(self._seconds[name] / elapsed, 4) for name in TIMED},
            **({"overflows": self._num_overflows} if self._num_overflows else {}),
        }
        if self._rank.is_first:
            self._run.log(self._last)
        self._num_images += int(num_images)
        self._sums, self._notes, self._line_images, self._line_begin = None, {}, 0, now
        self._seconds = dict.fromkeys(TIMED, 0.0)
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(value := self._last[name]):
                raise FloatingPointError(f"step {step}: {name} is {value}; a lower optim.lr would be a start")

    def summary(self) -> dict[str, Any]:
        """Pictures per second of this launch, and the last value of each named part of the loss.

        The first rank's alone holds what came before this launch.
        """
        # A launch that found all steps done measured nothing itself.
        elapsed = self._line_begin - self._begin
        speed = self._num_images / elapsed if self._num_images else self._last.get("images_per_second")
        return {
            "train_images_per_second": speed and round(speed, 1),
            "losses": {k.removeprefix("loss_"): v for k, v in self._last.items() if k.startswith("loss")},
        }


def _peak_memory_mb(device: torch.device) -> float:
    """Largest memory of this rank so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource  # not on every platform

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
