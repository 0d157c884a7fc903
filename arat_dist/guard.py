"""Steps whose gradient is no number: skipped without a look from the host, counted, and answered when they persist."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from arat_dist.data.order import SampleOrder
from arat_dist.run import Run

logger = logging.getLogger(__name__)

_NAMED = 16
"""Samples that the log names of a batch; skipped.jsonl has them all."""


class DivergedError(FloatingPointError):
    """Too many steps in a row have had a gradient that is no number.

    Args:
        step: the last of them, counted from 1.
        count: how many there were.
    """

    def __init__(self, step: int, count: int):
        super().__init__(step, count)  # what it is made from again on its way from a worker
        self.step, self._count = step, count

    def __str__(self) -> str:
        return (
            f"step {self.step}: the gradient has been no number in {self._count} steps in a row; "
            "a lower optim.lr would be a start"
        )


class BufferGuard:
    """Gives a module's buffers back what they held before a step that was not taken.

    Running statistics and counts are moved by the forward pass already; weights and optimizer state are the engine's.
    A few kernels a step for all buffers together, and no sync with a GPU.

    Args:
        module: its buffers must stay the objects that they are.
        on_device: never look at `finite` from the host, which saves the copies on a CPU.
    """

    def __init__(self, module: nn.Module, *, on_device: bool = False):
        self._may_look = not on_device
        self._groups: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in module.buffers():
            self._groups[buffer.dtype].append(buffer)
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Before a step."""
        self._before = self._rows()

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """After a step; `finite` is 0-d, whether it was taken."""
        if self._may_look and finite.device.type == "cpu" and finite:  # costs nothing to know there
            return
        for buffers, before, after in zip(self._groups.values(), self._before, self._rows(), strict=True):
            parts = torch.where(finite, after, before).split([buffer.numel() for buffer in buffers])
            views = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, views)  # pyright: ignore[reportPrivateImportUsage]

    def _rows(self) -> list[Tensor]:
        return [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self._groups.values()]


class SkipCounter:
    """Follows the skipped steps of a run as the log learns of them, and ends the run when they don't end.

    Args:
        run: skipped.jsonl gets a line for each, with the samples of its batch.
        order: which samples those are.
        most: steps in a row that are too many.
        last: number of the run's last step: more than one that leads up to it are too many as well.
        writes: whether this rank writes and speaks.
    """

    def __init__(self, run: Run, order: SampleOrder, *, most: int, last: int, writes: bool):
        self._run, self._order, self._writes = run, order, writes
        self._most, self._last = most, last
        self._in_a_row = 0

    def see(self, done: int, finite: Sequence[bool]) -> None:
        """Take in whether each of the last steps up to `done` was taken; every rank calls it with the same values.

        Raises:
            DivergedError: too many in a row were not.
        """
        for number, is_finite in enumerate(finite, done - len(finite) + 1):
            self._in_a_row = 0 if is_finite else self._in_a_row + 1
            if not is_finite and self._writes:
                self._tell(number)
            if self._in_a_row >= self._most:
                raise DivergedError(number, self._in_a_row)
        if done == self._last and self._in_a_row > 1:
            raise DivergedError(done, self._in_a_row)

    def _tell(self, number: int) -> None:
        samples = (self._order.batch(number - 1) % self._order.num_samples).tolist()
        with suppress(OSError):  # a full disk stops nothing; the log has it
            self._run.note_skipped(number, samples)
        named = ", ".join(map(str, samples[:_NAMED])) + (", ..." if len(samples) > _NAMED else "")
        logger.warning("step %d: the gradient is no number, the step was skipped; its samples: %s", number, named)
