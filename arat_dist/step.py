"""One training step: a rank's part of the global batch, in one micro-batch or in several, in any precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import count, pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from arat_dist.data.copies import CopiedBatch
from arat_dist.data.loader import Batch
from arat_dist.device_augment import DeviceAugment
from arat_dist.engine import Engine, Rank
from arat_dist.guard import BufferGuard
from arat_dist.objectives.base import Output

Inspect = Callable[[Output, float], None]
"""Called with the last part's output before its graph is gone, and with what its loss is multiplied by."""


class Gradients(NamedTuple):
    """What the passes of a step tell, beside the gradients that the engine holds."""

    metrics: list[tuple[Mapping[str, Tensor], int]]
    """Of each part its means, 0-d, and the number of its samples."""
    num_overflows: int
    """Tries whose gradients didn't fit into fp16."""


class StepResult(NamedTuple):
    """What a step tells the log; its tensors are on the device."""

    metrics: list[tuple[Mapping[str, Tensor], int]]
    """As in `Gradients`."""
    num_overflows: int
    """As in `Gradients`."""
    gradient_norm: Tensor
    """2-norm of the whole gradient before clipping, 0-d."""
    finite: Tensor
    """Whether that norm is finite, 0-d bool; else the step changed nothing."""


class Step(Protocol):
    """What takes a training step: `TrainStep`, or `GraphedStep`, which replays it."""

    def __call__(
        self, parts: Sequence[Batch], weight: float, reseed: Callable[[], None], inspect: Inspect | None = None
    ) -> StepResult:
        """Take one step; see `compute_gradients` for the arguments. The host doesn't wait for the device."""
        ...


class TrainStep:
    """Gradients, update, and buffers as they were before where the update is skipped.

    Args:
        engine: what is trained.
        on_device: decide on the device whether the buffers are put back, also on a CPU, where a look is cheaper.
    """

    def __init__(self, engine: Engine, *, on_device: bool = False):
        self.engine = engine
        self._guard = BufferGuard(engine.objective, on_device=on_device)

    def __call__(
        self, parts: Sequence[Batch], weight: float, reseed: Callable[[], None], inspect: Inspect | None = None
    ) -> StepResult:
        """See `Step`."""
        self._guard.remember()
        gradients = compute_gradients(self.engine, parts, weight, reseed, inspect)
        norm = self.engine.step()
        finite = norm.isfinite()
        self._guard.restore_unless(finite)
        return StepResult(*gradients, norm, finite)


def compute_gradients(
    engine: Engine,
    parts: Sequence[Batch],
    weight: float,
    reseed: Callable[[], None],
    inspect: Inspect | None = None,
) -> Gradients:
    """Forward and backward passes of a step; afterwards the engine holds the gradients and waits for `step`.

    In fp16 a step whose gradients overflow is done again at half the loss scale, so that no sample is lost.

    Args:
        engine: what is trained.
        parts: micro-batches on the engine's device; the last one's backward pass joins the gradients of all ranks.
        weight: world size over the samples of the global batch: shares of ranks may differ by a pair, and so weighed
            the average over the ranks is the mean over the global batch.
        reseed: makes a try draw what the one before drew.
        inspect: see `Inspect`.
    """
    buffers = [(buffer, buffer.clone()) for buffer in engine.objective.buffers()] if engine.scales_loss else []
    for num_overflows in count():
        reseed()
        metrics = []
        for i, part in enumerate(parts, 1):
            is_last, num_samples = i == len(parts), len(part.labels)
            with nullcontext() if is_last else engine.no_sync():
                out = engine(*part)
                if is_last and inspect is not None:
                    inspect(out, num_samples * weight * (engine.loss_scale or 1))
                engine.backward(out.loss * (num_samples * weight))
            metrics.append(({"loss": out.loss.detach(), **out.metrics}, num_samples))
        if engine.is_finite():
            return Gradients(metrics, num_overflows)
        for buffer, before in buffers:  # statistics and counts, as if the try had not been
            buffer.copy_(before)
    raise AssertionError("unreachable")


def micro_batches(
    batch: Batch | CopiedBatch, num_parts: int, global_size: int, rank: Rank, augment: DeviceAugment | None = None
) -> list[Batch]:
    """A rank's share of a step on its device, cut between pairs into parts that differ by at most a pair.

    There are as many parts on every rank, since norms may be synchronised in each: fewer than `num_parts` where the
    global batch of `global_size` samples is too small to give every part a pair. What `augment` makes of the pictures
    is what is trained on: mixed, attacked, and seen by every branch.
    """
    host_keys = batch.host_keys if isinstance(batch, CopiedBatch) else batch.keys
    num_parts = min(num_parts, max(1, global_size // (2 * rank.world_size)))
    sizes = part_sizes(len(batch.labels), num_parts)
    tensors = [tensor.to(rank.device, non_blocking=True).split(sizes) for tensor in batch[:3]]
    parts = [Batch(*tensors) for tensors in zip(*tensors, strict=True)]
    if augment is None:
        return parts
    # The keys as the loader has them: the host chooses by them, and needn't wait for those on the device.
    return [
        part._replace(images=augment(part.images, keys))
        for part, keys in zip(parts, host_keys.split(sizes), strict=True)
    ]


def part_sizes(num_samples: int, num_parts: int) -> list[int]:
    """Sizes of the parts: pairs dealt as evenly as can be, an odd sample in the last part."""
    num_pairs = num_samples // 2
    edges = [*(2 * (i * num_pairs // num_parts) for i in range(num_parts)), num_samples]
    return [end - begin for begin, end in pairwise(edges)]
