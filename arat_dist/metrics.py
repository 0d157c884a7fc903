"""metrics.jsonl: what the steps yield, gathered on the device and written a line at a time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from arat_dist.checkpoint import Checkpoint
from arat_dist.engine import Rank
from arat_dist.run import Run
from arat_dist.step import StepResult
from arat_dist.system import SystemMetrics, flat, slots

T = TypeVar("T")
TIMED = ("loader_wait", "compute", "checkpoint")
"""What the log measures the time of."""
waits_for_device: ContextVar[bool] = ContextVar("waits_for_device", default=False)
"""Whether times are those of the device, which is waited for: for measurements, since a training wants no such wait."""
logger = logging.getLogger(__name__)


class MetricsLog:
    """Means of the step's metrics between two lines of metrics.jsonl.

    They are summed on the device, weighed by the samples: one all-reduce and one host sync a line, none a step. A
    checkpoint takes an unfinished line with it, so that lines are cut at the same steps however often a run goes on.

    Args:
        run: the run; its lines after `step` are dropped, since they will be computed again.
        rank: this process; the first one writes.
        checkpoint: what the run goes on from.
    """

    def __init__(self, run: Run, rank: Rank, checkpoint: Checkpoint | None = None):
        self._run, self._rank = run, rank
        self.step = 0 if checkpoint is None else checkpoint.step
        lines = run.forget_metrics_after(self.step) if rank.is_first else []
        self._last: dict[str, Any] = lines[-1] if lines else {}
        self._first_time_s = float(self._last.get("time_s", 0.0))
        self._begin = self._line_begin = time.perf_counter()
        self._num_images = self._line_images = 0
        self._num_overflows = self._num_skipped = 0
        self._seconds: dict[str, float] = dict.fromkeys(TIMED, 0.0)
        self._unwritten: list[dict[str, Any]] = []
        self._check: Callable[[], None] = lambda: None
        # One rank of each machine speaks for it.
        local = run.folder.uri if run.storage.is_local else "."
        self._system = SystemMetrics(local) if rank.local_index == 0 else None
        self._begin_line()
        if checkpoint is not None:
            self._take_up(checkpoint)

    def write_only_if(self, check: Callable[[], None]) -> None:
        """Call this before each line; what it raises ends the training."""
        self._check = check

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time that the loop waits for them is kept apart."""
        iterator = iter(batches)
        while True:
            with self.timing("loader_wait"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Around one of what is `TIMED`; the time that goes elsewhere is the trainer's own."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if waits_for_device.get() and self._rank.device.type == "cuda":
                torch.cuda.synchronize(self._rank.device)
            self._seconds[part] += time.perf_counter() - began

    def add(self, result: StepResult) -> None:
        """Add one step's means over this rank's samples."""
        sums: Tensor | None = None
        for metrics, num_samples in result.metrics:
            self._names = list(metrics)
            values = torch.stack([*metrics.values()]).double()
            weighed = torch.cat([values, values.new_ones(1)]) * num_samples
            sums = weighed if sums is None else sums + weighed
            self._line_images += num_samples
        assert sums is not None
        taken = torch.where(result.finite, sums, 0.0)
        self._sums = taken if self._sums is None else self._sums.add_(taken)
        self._finite.append(result.finite)
        self._num_overflows += result.num_overflows

    def note(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep 0-d values that are the same on all ranks for the next line."""
        self._notes |= metrics

    def write(self, step: int, epoch: float, lr: float, gradient_norm: Tensor) -> Sequence[bool]:
        """Write a line for the steps since the last one; every rank calls it.

        Returns:
            Of each of these steps whether it was taken, the same on all ranks.
        """
        assert self._sums is not None
        system = slots(self._num_nodes, self._rank.node, self._system and self._system.sample()).flatten()
        own = torch.cat([self._sums, self._sums.new_full((1,), self._line_images), system.to(self._sums)])
        joined = self._rank.all_reduce(own)
        shared = [*self._notes.values(), gradient_norm]
        # One transfer from the device for all.
        numbers = torch.cat([joined, torch.stack([v.double() for v in shared]), torch.stack(self._finite).double()])
        values = iter(numbers.tolist())
        sums = [next(values) for _ in self._names]
        num_samples, num_images = next(values), next(values)
        machines = torch.tensor([next(values) for _ in system]).view(self._num_nodes, -1)
        notes = {name: next(values) for name in self._notes}
        # What was measured in a step that was skipped; JSON has no word for it.
        notes = {name: value for name, value in notes.items() if math.isfinite(value)}
        norm, *finite = values
        self._num_skipped += finite.count(0.0)
        now = time.perf_counter()
        elapsed = now - self._line_begin
        means = {name: value / num_samples for name, value in zip(self._names, sums, strict=True) if num_samples}
        self._last = {
            "step": step,
            "epoch": round(epoch, 4),
            "time_s": round(self._first_time_s + now - self._begin, 3),
            **means,
            **notes,
            "lr": lr,
            **({"gradient_norm": norm} if math.isfinite(norm) else {}),
            "images_per_second": num_images / elapsed,
            "memory_mb": _peak_memory_mb(self._rank.device),
            # Shares of the host's time; on a GPU, which works on its own, the host waits where it needs a result.
            **{f"{name}_fraction": round(self._seconds[name] / elapsed, 4) for name in TIMED},
            **flat(machines),
            **({"overflows": self._num_overflows} if self._num_overflows else {}),
            **({"skipped_steps": self._num_skipped} if self._num_skipped else {}),
        }
        if self._rank.is_first:
            self._append(self._last)
        self._num_images += int(num_images)
        self._line_images, self._line_begin = 0, now
        self._seconds = dict.fromkeys(TIMED, 0.0)
        self._begin_line()
        return [value == 1.0 for value in finite]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unfinished line for a checkpoint, as tensors and plain values; every rank calls it."""
        counts = {"names": self._names, "notes": [*self._notes]}
        counts |= {"overflows": self._num_overflows, "skipped": self._num_skipped}
        if self._sums is None:
            return {}, counts
        tensors = {"line.sums": self._rank.gather(self._sums), "line.finite": torch.stack(self._finite)}
        if self._notes:
            tensors["line.notes"] = torch.stack([value.double() for value in self._notes.values()])
        return tensors, counts

    def summary(self) -> dict[str, Any]:
        """Pictures per second of this launch, and the last value of each named part of the loss.

        The first rank's alone holds what came before this launch.

        Raises:
            OSError: lines that couldn't be written before still can't.
        """
        if self._unwritten:
            self._append()
            if self._unwritten:
                raise OSError(f"{self._run.folder.uri}: lines of metrics.jsonl can't be written")
        # A launch that found all steps done measured nothing itself.
        elapsed = self._line_begin - self._begin
        speed = self._num_images / elapsed if self._num_images else self._last.get("images_per_second")
        return {
            "train_images_per_second": speed and round(speed, 1),
            "losses": {k.removeprefix("loss_"): v for k, v in self._last.items() if k.startswith("loss")},
        }

    @cached_property
    def _num_nodes(self) -> int:
        """Machines at work; every rank asks at its first line."""
        return int(self._rank.gather(torch.full((), self._rank.node, device=self._rank.device)).max()) + 1

    def _begin_line(self) -> None:
        self._names: list[str] = []
        self._notes: dict[str, Tensor] = {}
        self._sums: Tensor | None = None
        """Float64 [metrics + 1]: sums over the samples of steps that were taken, and their number."""
        self._finite: list[Tensor] = []

    def _take_up(self, checkpoint: Checkpoint) -> None:
        line = checkpoint.about.get("line", {})
        self._num_overflows, self._num_skipped = line.get("overflows", 0), line.get("skipped", 0)
        if (rows := checkpoint.progress.get("line.sums")) is None:
            return
        device = self._rank.device
        # At another world size the first rank takes what all had.
        same = len(rows) == self._rank.world_size
        own = rows[self._rank.index] if same else rows.sum(0) * self._rank.is_first
        self._names, self._sums = list(line["names"]), own.to(device)
        self._finite = list(checkpoint.progress["line.finite"].to(device))
        if line["notes"]:
            self._notes = dict(zip(line["notes"], checkpoint.progress["line.notes"].to(device), strict=True))

    def _append(self, *lines: dict[str, Any]) -> None:
        """Write lines behind those that couldn't be written before; a full disk stops nothing."""
        self._check()
        is_news, self._unwritten = not self._unwritten, [*self._unwritten, *lines]
        try:
            self._run.log(*self._unwritten)
        except OSError as error:
            if is_news:
                logger.warning("metrics.jsonl: %s; tried again with the next line", error)
            return
        self._unwritten = []


def _peak_memory_mb(device: torch.device) -> float:
    """Largest memory of this rank so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource  # not on every platform

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
