"""What the ranks agree on between two steps: that a checkpoint is due by the clock, that the run is to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from arat_dist.engine import Rank

_LOOK_S = 0.1


class Wish(IntEnum):
    """What a rank would like to happen after a step; the largest of all ranks' is done."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Agreement:
    """One wish a step, the same on all ranks: no rank may save or stop alone.

    The ranks' wishes travel while the next step is computed, so what comes back is a step old and nobody waits for it.

    Args:
        rank: this process.
        save_minutes: time between two checkpoints by the first rank's clock; None: none are due by the clock.
        timeout_s: longest time that a rank waits for the others, in seconds; the process group's own.
    """

    def __init__(self, rank: Rank, save_minutes: float | None, timeout_s: float = 1800.0):
        self._rank = rank
        self._save_s = None if save_minutes is None else 60 * save_minutes
        self._last_save_s = time.monotonic()
        self._is_answered = False
        self._value = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        # Host memory, whatever the ranks train on: a stream of a GPU would have to be waited for.
        needs_group = rank.world_size > 1 and rank.device.type != "cpu"
        timeout = timedelta(seconds=timeout_s)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if needs_group else None

    def exchange(self) -> Wish:
        """Called by every rank at every step; what all agreed on."""
        own = self._wish()
        if self._rank.world_size == 1:
            return own
        if self._work is not None:
            self._work.wait()
        agreed = Wish(int(self._value))
        if agreed is Wish.SAVE and self._is_answered:
            agreed = Wish.NOTHING
        self._is_answered = False
        self._value.fill_(own)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def meet(self, beat: Callable[[], None]) -> None:
        """Wait until all ranks are here, the first one with its last checkpoint; who waits gives signs of life."""
        if self._rank.world_size == 1:
            return
        if self._work is not None:
            self._work.wait()
            self._work = None
        here: Any = dist.barrier(group=self._group, async_op=True)
        while not here.is_completed():
            beat()
            time.sleep(_LOOK_S)
        here.wait()

    def saved(self) -> None:
        """A checkpoint was taken, for whatever reason; every rank calls it, at the same step."""
        self._last_save_s = time.monotonic()
        # One is still on its way if the clock's wish, a step old, was what led to it.
        self._is_answered = True

    def _wish(self) -> Wish:
        if self._rank.stop_wanted():
            return Wish.STOP
        is_late = self._save_s is not None and time.monotonic() - self._last_save_s > self._save_s
        return Wish.SAVE if is_late and self._rank.is_first else Wish.NOTHING
