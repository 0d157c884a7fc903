"""Batches on their way to a GPU: each is copied while the step before it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from arat_dist.data.loader import Batch


class CopiedBatch(NamedTuple):
    """A batch on the device, and its keys in host memory, by which the host chooses augmentations."""

    images: Tensor
    """uint8 [B,3,H,W], channels-last in memory."""
    labels: Tensor
    """int64 [B]."""
    keys: Tensor
    """int64 [B]."""
    host_keys: Tensor
    """The same in host memory."""


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch | CopiedBatch]:
    """The batches on a device; on a GPU each is copied, on a stream of its own, before the one before is used.

    On a CPU they are the loader's own. Not yet run on a GPU.

    Args:
        batches: of a loader; the next one is asked for a step early.
        device: where they are wanted.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    while True:
        # The loader marks its buffer as free behind what is queued on the current stream: behind the copies.
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            copy = None if batch is None else _copied(batch, device)
            copied = torch.cuda.Event()
            copied.record()
        if ahead is not None:
            yield _received(*ahead)
        if copy is None:
            return
        ahead = copy, copied


def _copied(batch: Batch, device: torch.device) -> CopiedBatch:
    # The loader's memory is pinned where there is a GPU, and used again: hence the clone. FFCV's keys are not pinned:
    # the host waits for their copy, which is behind that of the images, on this stream, and not for the step.
    return CopiedBatch(*(tensor.to(device, non_blocking=True) for tensor in batch), host_keys=batch.keys.clone())


def _received(batch: CopiedBatch, copied: torch.cuda.Event) -> CopiedBatch:
    """Have the current stream wait for the copy, and the allocator for that stream before it uses the memory again."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    for tensor in batch[:3]:
        tensor.record_stream(stream)
    return batch
