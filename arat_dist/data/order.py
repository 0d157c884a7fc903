"""Which samples a training step sees, and which rank gets which of them.

The permutations of all epochs are joined into one stream, and the stream is cut into global batches: the remainder of
an epoch opens the next one's first batch. Nothing here depends on the world size until a batch is dealt, so a run may
stop and go on at another world size and still see every sample exactly once an epoch.

Pure numpy: neither torch nor ffcv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class SampleOrder:
    """The order of a whole training run.

    A sample's visit is named by its key, `epoch * num_samples + index` (int64). Every random choice about that visit is
    a function of (seed, key) alone.

    At the very end of training, a remainder of less than half a batch is shared about equally with the batch before it,
    so that no step is taken on a handful of samples; a larger remainder is a smaller last batch.
    """

    num_samples: int
    """Samples of the training set."""
    batch_size: int
    """Samples of a full global batch, over all ranks."""
    epochs: int
    """Passes over the training set."""
    seed: int
    """Fixes the permutations."""
    block: int = 1
    """Samples that lie together and are read at about the same time; 1: a sample may follow any other."""
    window: int = 1
    """Blocks whose samples are mixed with each other; without meaning where `block` is 1."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to order (ValueError)."""
        for name in ("num_samples", "batch_size", "epochs", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}: at least 1")

    @property
    def num_steps(self) -> int:
        """Number of global batches in the whole run."""
        return -(-self._num_keys // self.batch_size)

    @property
    def smallest_batch(self) -> int:
        """Samples of the smallest global batch of the run."""
        return min(self._sizes())

    def largest_share(self, world_size: int) -> int:
        """Samples of the largest batch that any rank ever gets."""
        return max(stop - start for size in self._sizes() for start, stop in _deal(size, world_size))

    def batch_size_at(self, step: int) -> int:
        """Samples of the global batch at `step`, counted from 0."""
        start, stop = self._bounds(step)
        return stop - start

    def epoch_of(self, step: int) -> int:
        """Epoch, counted from 0, of the first key of the batch at `step`."""
        return self._bounds(step)[0] // self.num_samples

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch's last sample is in the batch at `step`, or the run ends with it."""
        return step + 1 == self.num_steps or self.epoch_of(step + 1) > self.epoch_of(step)

    def epochs_after(self, num_steps: int) -> float:
        """Epochs done after so many steps, in parts of one."""
        return min(num_steps * self.batch_size / self.num_samples, float(self.epochs))

    def batch(self, step: int) -> Keys:
        """Keys int64 [B] of the global batch at `step` (IndexError outside the run)."""
        return self._slice(*self._bounds(step))

    def share(self, step: int, rank: int, world_size: int) -> Keys:
        """Keys int64 [b] that `rank` gets of the batch at `step`.

        Batches are dealt in consecutive pairs, as contiguous runs of them: shares differ by at most one pair, and an
        odd last sample joins the rank of the last pair. Only where there are fewer pairs than ranks are ranks empty.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank}: from 0 to {world_size - 1}")
        first = self._bounds(step)[0]
        start, stop = _deal(self.batch_size_at(step), world_size)[rank]
        return self._slice(first + start, first + stop)

    def shares(self, rank: int, world_size: int, start: int = 0, stop: int | None = None) -> Sequence[Keys]:
        """The shares of `rank` for the steps from `start` up to `stop` (default: the end), made when asked for."""
        return _Shares(self, rank, world_size, range(self.num_steps)[start:stop])

    @property
    def _num_keys(self) -> int:
        return self.num_samples * self.epochs

    @property
    def _shares_its_end(self) -> bool:
        """Whether the last two batches share what is left."""
        return self.num_steps > 1 and 0 < self._num_keys % self.batch_size < self.batch_size / 2

    def _bounds(self, step: int) -> tuple[int, int]:
        """Positions in the stream of keys where the batch at `step` begins and ends."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}: from 0 to {self.num_steps - 1}")
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, self._num_keys)
        if self._shares_its_end and step >= self.num_steps - 2:
            begin = (self.num_steps - 2) * self.batch_size
            # The even number nearest to a half: both are even if what is left allows it.
            middle = begin + 2 * ((self._num_keys - begin + 2) // 4)
            return (begin, middle) if step == self.num_steps - 2 else (middle, self._num_keys)
        return start, stop

    def _sizes(self) -> list[int]:
        """Every size that a global batch takes: only the last two may differ from the first."""
        return [self.batch_size_at(step) for step in {0, max(0, self.num_steps - 2), self.num_steps - 1}]

    def _slice(self, start: int, stop: int) -> Keys:
        """The keys from position `start` up to `stop` of the stream."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            order = permutation(self.num_samples, self.seed, epoch, self.block, self.window)
            part = order[offset : offset + stop - start]
            parts.append(part + epoch * self.num_samples)
            start += len(part)
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Shares(Sequence[Keys]):
    """A view of one rank's part of the order; holds no keys."""

    order: SampleOrder
    rank: int
    world_size: int
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Keys: ...
    @overload
    def __getitem__(self, index: slice) -> _Shares: ...
    def __getitem__(self, index: int | slice) -> Keys | _Shares:
        if isinstance(index, slice):
            return _Shares(self.order, self.rank, self.world_size, self.steps[index])
        return self.order.share(self.steps[index], self.rank, self.world_size)


def spread(num_samples: int, limit: int) -> Keys:
    """`limit` indices evenly over a set, int64: sets are often sorted by class."""
    return np.arange(limit, dtype=np.int64) * num_samples // limit


def eval_shares(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[Keys]:
    """Batches of indices, int64 [<= batch_size] each, that `rank` evaluates.

    Over all ranks every sample comes exactly once, with no padding: ranks may get uneven shares, or none at all.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank}: from 0 to {world_size - 1}")
    start, stop = rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    return [np.arange(at, min(at + batch_size, stop), dtype=np.int64) for at in range(start, stop, batch_size)]


# Two epochs are enough: a batch reaches from one into the next.
@lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int, block: int = 1, window: int = 1) -> Keys:
    """The permutation int64 [num_samples] of one epoch, read-only.

    It sorts the samples by a 64-bit hash of (seed, epoch, index). numpy doesn't promise that Generator.permutation
    stays the same between its versions; integer arithmetic does, so a run can be resumed anywhere.

    With blocks of more than one sample, the blocks are sorted by such a hash, and then the samples of every `window`
    blocks that follow each other: what is read at a time lies in so many blocks.
    """
    hashes = _hashes(num_samples, seed, epoch)
    if block == 1:
        order = np.argsort(hashes, kind="stable")
    else:
        num_blocks = -(-num_samples // block)
        # Blocks count on behind the samples, so that no block shares its hash with a sample.
        places = np.empty(num_blocks, np.int64)
        places[np.argsort(_hashes(num_blocks, seed, epoch, num_samples), kind="stable")] = np.arange(num_blocks)
        order = np.lexsort((hashes, np.repeat(places // window, block)[:num_samples]))
    order = order.astype(np.int64)
    order.setflags(write=False)
    return order


def _hashes(count: int, seed: int, epoch: int, begin: int = 0) -> NDArray[np.uint64]:
    """A word for each of the numbers from `begin` on, uint64 [count]."""
    start = _mix(_mix(np.array([seed], np.uint64)) + np.array([epoch], np.uint64) * _GOLDEN)
    return _mix(start + np.arange(begin + 1, begin + count + 1, dtype=np.uint64) * _GOLDEN)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014); products wrap around."""
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=64)
def _deal(size: int, world_size: int) -> list[tuple[int, int]]:
    """Where each rank's run of a batch of `size` samples begins and ends."""
    num_pairs = size // 2
    base, extra = divmod(num_pairs, world_size)
    edges = [2 * (rank * base + min(rank, extra)) for rank in range(world_size + 1)]
    # The odd sample goes to the last rank that has a pair; ranks behind it stay empty.
    last = max(0, min(world_size, num_pairs) - 1)
    edges[last + 1 :] = [edge + size % 2 for edge in edges[last + 1 :]]
    return list(pairwise(edges))
