"""A thread that prepares batches ahead of their consumer, in a ring of buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
import torch

from arat_dist.data.loader import Batch
from arat_dist.data.order import Keys
from arat_dist.queued import queued_event

NUM_SLOTS = 4
"""Buffers of the ring: one with the consumer, one being filled, two ready."""


@dataclass(frozen=True)
class _Slot:
    """One buffer of the ring."""

    index: int
    copied: torch.cuda.Event | None = None
    """Passed when the GPU has copied what lay there."""


class Producer(Thread):
    """Fills the ring with the batches of some shares, in order.

    In place of FFCV's EpochIterator, which wants all batches beforehand, hangs its consumer when it fails, outlives a
    loop that is left early, sets torch's thread count, and overwrites buffers that are still being copied to a GPU.
    """

    def __init__(self, fill: Callable[[int, Keys, int], Batch], shares: Sequence[Keys]) -> None:
        """`fill(at, keys, slot)` prepares the batch of shares[at], which are `keys`, in buffer `slot` of NUM_SLOTS."""
        super().__init__(name="beton-loader", daemon=True)
        self._fill, self._shares = fill, shares
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        self._ready: SimpleQueue[tuple[int, Batch] | BaseException | None] = SimpleQueue()
        self._stopped = Event()
        for index in range(NUM_SLOTS):
            self._free.put(_Slot(index))

    def run(self) -> None:
        """Body of the thread: its last word to the consumer is None, or the error that ended it."""
        last = None
        try:
            # Not a for loop over the shares: that takes an IndexError among them for their end.
            for step in range(len(self._shares)):
                keys = np.array(self._shares[step], np.int64)
                slot = self._free.get()
                if self._stopped.is_set():
                    break
                if slot.copied is not None:
                    slot.copied.synchronize()
                self._ready.put((slot.index, self._fill(step, keys, slot.index)))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer.
            last = error
        self._ready.put(last)

    def batches(self) -> Iterator[Batch]:
        """The consumer's side: starts the thread, and ends it however the loop is left."""
        self.start()
        try:
            while not self._stopped.is_set():
                item = self._ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                index, batch = item
                yield batch
                self._free.put(_Slot(index, queued_event()))
            raise RuntimeError("the loader was closed while its batches were being read")
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread and wait for it: for one batch at most."""
        self._stopped.set()
        self._free.put(_Slot(0))
        if self.is_alive():
            self.join()
