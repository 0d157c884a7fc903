"""Stages: one question about many samples, cut into batches, dealt to the ranks, answered alike on all of them.

How a stage is cut depends on its samples alone, and so do a batch's random numbers: the answers are the same at any
number of workers, and after any number of interruptions.
"""

from __future__ import annotations

import itertools
import time
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
from arat_dist.errors import StoppedError
from arat_dist.evaluation.ledger import Columns, Ledger
from arat_dist.objectives.base import to_pixels

Samples = NDArray[np.int64]
"""Indices of samples, ascending."""
Compute = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From pictures uint8 [B,3,H,W], labels and indices int64 [B] to numbers by name, int64 [B] each, none below 0."""

_LEAST_BATCH = 24
"""Pictures below which a batch isn't cut further. On a CPU 8 pictures take 1.6 times as long, each, as 32."""
_ENOUGH_BATCHES = 16
"""Batches beyond which a stage isn't cut further for the sake of an even share."""

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


def cut(samples: Samples, batch_size: int) -> list[Samples]:
    """A stage's batches, equal but for one sample: 1, 2, 4 or a multiple of 8, which share out evenly as a rule.

    Args:
        samples: of the stage.
        batch_size: the most that a batch may hold.
    """
    count = min(_ENOUGH_BATCHES, len(samples) // _LEAST_BATCH)
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
        for number in meeting.deal(open_batches):
            columns = self._compute(stage, batches[number])
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

    def _compute(self, stage: Stage, samples: Samples) -> Columns:
        ((images, labels, keys),) = (Batch(*(t.clone() for t in batch)) for batch in self._loader.iterate([samples]))
        device = self._rank.device
        answers = stage.compute(images.to(device), labels.to(device), keys.to(device))
        return {name: answers[name].cpu().numpy().astype(np.int64) for name in stage.columns}

    def _shared(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum over all ranks."""
        return self._rank.all_reduce(torch.from_numpy(table.copy()).to(self._rank.device)).cpu().numpy()


class Meeting:
    """Ranks that share out some batches: each takes the next one when it is done with its last, till none are left.

    So a slow rank, or one with batches that take long, keeps nobody waiting for more than a batch. Every rank makes its
    meetings in the same order.

    Args:
        rank: this process.
    """

    def __init__(self, rank: Rank):
        self._rank, self._name = rank, f"arat-evaluation-{next(_meetings)}"
        self._alone = {"next": 0, "closed": 0, "left": 0}
        # The process group's own key-value store: a counter that all ranks add to.
        self._store: Any = dist.distributed_c10d._get_default_store() if rank.world_size > 1 else None  # noqa: SLF001

    def deal(self, batches: Sequence[int]) -> Iterator[int]:
        """This rank's batches, until none are left or the meeting is closed."""
        while not self._add("closed", 0) and (place := self._add("next", 1) - 1) < len(batches):
            yield batches[place]

    def close(self) -> None:
        """Deal no more, to anybody."""
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
