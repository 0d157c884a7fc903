"""Stages: one question about many samples, cut into batches, dealt to the ranks, answered alike on all of them.

How a stage is cut depends on its samples alone, and so do a batch's random numbers: the answers are the same at any
number of workers, and after any number of interruptions.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from arat_dist.data.loader import Batch, Loader
from arat_dist.engine import Rank
from arat_dist.errors import StoppedError, UserError
from arat_dist.evaluation.ledger import Columns, Ledger
from arat_dist.objectives.base import to_pixels

Samples = NDArray[np.int64]
"""Indices of samples, ascending."""
Compute = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From pictures uint8 [B,3,H,W], labels and indices int64 [B] to numbers by name, int64 [B] each, none below 0."""

_LEAST_BATCH = 24
"""Pictures below which a batch isn't cut further. On a CPU 8 pictures take 1.6 times as long, each, as 32. Where larger
batches than a CPU's are allowed, for a GPU, it is larger in proportion."""
_ENOUGH_BATCHES = 16
"""Batches beyond which a stage isn't cut further for the sake of an even share."""

_CPU_BATCH = 128
_GPU_BATCHES = (64, 1024)
"""Least and most pictures of a batch on a GPU, where nobody says."""

_WAIT_S = 0.05
_meetings = itertools.count()


@dataclass(frozen=True)
class Stage:
    """One question.

    Attributes:
        name: folder of its batches in the ledger.
        samples: whom it is about.
        columns: names of the numbers that answer it.
        compute: answers it for a batch.
    """

    name: str
    samples: Samples
    columns: tuple[str, ...]
    compute: Compute


@dataclass(frozen=True)
class Answer:
    """A stage's answer: its columns for all its samples, in their order, and how long it took, in seconds."""

    columns: Columns
    wall_s: float


def default_batch_size(image_size: int, device_type: str) -> int:
    """The batch size where none is given: 128 on a CPU, on a GPU a power of two from 64 to 1,024 by the pictures' size.

    Up to 32 pixels a side it is 1,024, and for twice the side half as many: 128 at 224. Nothing else counts, least of
    all the memory that is free: how an evaluation is cut decides its random numbers, and it may go on elsewhere.

    Args:
        image_size: side of the pictures, in pixels.
        device_type: "cpu", or that of a GPU.
    """
    if device_type == "cpu":
        return _CPU_BATCH
    least, most = _GPU_BATCHES
    fitting = max(least, min(most, 32 * most // image_size))
    return 1 << fitting.bit_length() - 1


def cut(samples: Samples, batch_size: int) -> list[Samples]:
    """A stage's batches, equal but for one sample: 1, 2, 4 or a multiple of 8, which share out evenly as a rule.

    Args:
        samples: of the stage.
        batch_size: the most that a batch may hold.
    """
    count = min(_ENOUGH_BATCHES, len(samples) // (_LEAST_BATCH * max(1, batch_size // _CPU_BATCH)))
    count = 2 ** (count.bit_length() - 1) if count else 1
    least = -(-len(samples) // batch_size)
    if least > count:
        count = -(-least // 8) * 8 if least > 4 else 2 ** (least - 1).bit_length()
    return [part for part in np.array_split(samples, max(1, min(count, len(samples)))) if len(part)]


class Runner:
    """What answers stages, one after the other; every rank has one and calls it alike.

    Args:
        loader: of the pictures; its batches hold up to batch_size.
        ledger: where finished batches are kept.
        rank: this process.
        batch_size: the most pictures of a batch.
        beat: called while work goes on, also while this rank waits for others.
    """

    def __init__(
        self, loader: Loader, ledger: Ledger, rank: Rank, batch_size: int, beat: Callable[[], None] = lambda: None
    ):
        self._loader, self._ledger, self._rank = loader, ledger, rank
        self._batch_size, self._beat = batch_size, beat

    def run(self, stage: Stage, **note: Any) -> Answer:
        """Answer a stage; the same on every rank.

        Args:
            stage: the question.
            note: what is said with it to who watches.

        Raises:
            StoppedError: some rank was asked to stop; what is finished is kept.
            UserError: a batch needs more memory than this rank's GPU has; what is finished is kept.
        """
        began = time.perf_counter()
        batches = cut(stage.samples, self._batch_size)
        edges = np.cumsum([0, *map(len, batches)])
        spans = [slice(start, stop) for start, stop in pairwise(edges)]
        kept = self._shared(self._kept(stage, batches, spans))
        if self._rank.is_first:
            self._ledger.note({"stage": stage.name, "num_batches": len(batches), **note})
        open_batches = [number for number, span in enumerate(spans) if not kept[:, span].all()]
        known = kept + self._shared(self._computed(stage, batches, spans, open_batches))
        columns = {name: column - 1 for name, column in zip(stage.columns, known, strict=True)}
        return Answer(columns, time.perf_counter() - began)

    def _kept(self, stage: Stage, batches: Sequence[Samples], spans: Sequence[slice]) -> NDArray[np.int64]:
        """What the ledger has, on the first rank: a row for each column, a number more than is meant, 0 elsewhere."""
        table = np.zeros((len(stage.columns), len(stage.samples)), np.int64)
        if self._rank.is_first:
            for number, columns in self._ledger.load(stage.name, batches, stage.columns).items():
                table[:, spans[number]] = _stacked(stage, columns)
        return table

    def _computed(
        self, stage: Stage, batches: Sequence[Samples], spans: Sequence[slice], open_batches: Sequence[int]
    ) -> NDArray[np.int64]:
        """What this rank has computed when no batch is left: as `_kept` (StoppedError: see `run`)."""
        table = np.zeros((len(stage.columns), len(stage.samples)), np.int64)
        meeting = Meeting(self._rank)
        for number, batch in self._taken(meeting, batches, open_batches):
            columns = self._compute(stage, batch)
            self._ledger.save(stage.name, number, batches[number], columns)
            table[:, spans[number]] = _stacked(stage, columns)
            self._beat()
            if self._rank.stop_wanted():
                meeting.close()
        # Whoever is asked, with a batch of this stage or without.
        stopped = int(self._rank.stop_wanted())
        meeting.wait_for_all(self._beat)
        if self._shared(np.array([[stopped]])).any():
            raise StoppedError(None)
        return table

    def _taken(
        self, meeting: Meeting, batches: Sequence[Samples], open_batches: Sequence[int]
    ) -> Iterator[tuple[int, Batch]]:
        """This rank's batches: its even share, from the first on, then what others have not begun, from the last on.

        So the batches that a rank lacks are always the last of its share, and it may load its share ahead although
        nobody takes a batch before beginning with it.
        """
        own = open_batches[self._rank.index :: self._rank.world_size]
        yield from self._share(meeting, batches, own)
        for number in reversed([number for number in open_batches if number not in set(own)]):
            if meeting.take(number):
                yield number, next(iter(self._loader.iterate([batches[number]])))

    def _share(
        self, meeting: Meeting, batches: Sequence[Samples], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Batch]]:
        """This rank's share, until another rank has taken the next one; while one is worked on, the next ones load."""
        loading = self._loader.iterate([batches[number] for number in numbers])
        for number in numbers:
            if not meeting.take(number):
                return
            yield number, next(loading)

    def _compute(self, stage: Stage, batch: Batch) -> Columns:
        """The answers for a batch, which lies in the loader's buffer (UserError: see `run`)."""
        device = self._rank.device
        try:
            images, labels, keys = (tensor.to(device, non_blocking=True) for tensor in batch)
            answers = stage.compute(images, labels, keys)
            return {name: answers[name].cpu().numpy().astype(np.int64) for name in stage.columns}
        except torch.OutOfMemoryError as error:
            raise UserError(_too_large(len(batch.labels), self._batch_size)) from error

    def _shared(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum over all ranks."""
        return self._rank.all_reduce(torch.from_numpy(table.copy()).to(self._rank.device)).cpu().numpy()


class Meeting:
    """Ranks that share out some batches: whoever is free takes one that nobody has, till none are left.

    So a slow rank, or one with batches that take long, keeps nobody waiting for more than a batch. Every rank makes its
    meetings in the same order.

    Args:
        rank: this process.
    """

    def __init__(self, rank: Rank):
        self._rank, self._name = rank, f"arat-evaluation-{next(_meetings)}"
        self._alone: Counter[str] = Counter()
        # The process group's own key-value store: counters that all ranks add to.
        self._store: Any = dist.distributed_c10d._get_default_store() if rank.world_size > 1 else None  # noqa: SLF001

    def take(self, number: int) -> bool:
        """Whether this rank is the one to work on a batch: the first to ask for it, while the meeting is open."""
        return not self._add("closed", 0) and self._add(f"batch-{number}", 1) == 1

    def close(self) -> None:
        """Nobody takes another batch from now on."""
        self._add("closed", 1)

    def wait_for_all(self, beat: Callable[[], None]) -> None:
        """Until every rank is here: a collective would give up after its time limit, a batch may take longer."""
        self._add("left", 1)
        while self._add("left", 0) < self._rank.world_size:
            beat()
            time.sleep(_WAIT_S)

    def _add(self, key: str, amount: int) -> int:
        if self._store is not None:
            return self._store.add(f"{self._name}/{key}", amount)
        self._alone[key] += amount
        return self._alone[key]


def pixels_of(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures in [0,1], [B,3,H,W], channels last, out of uint8 ones."""
    return to_pixels(images, dtype).contiguous(memory_format=torch.channels_last)


def _stacked(stage: Stage, columns: Columns) -> NDArray[np.int64]:
    return np.stack([columns[name] for name in stage.columns]) + 1


def _too_large(num_pictures: int, batch_size: int) -> str:
    """What to say of a batch that the GPU's memory doesn't hold: what would halve it."""
    # A small set is cut finer than it is allowed: then the size that was allowed says nothing.
    size = batch_size if num_pictures > batch_size // 2 else num_pictures
    if size == 1:
        return "--batch-size: 1: not one picture fits into the GPU's memory; a larger GPU or --precision bf16 would do"
    return (
        f"--batch-size: {size}: so many pictures at once don't fit into the GPU's memory; --batch-size {size // 2} "
        "(eval.batch_size in a recipe) would be right"
    )
