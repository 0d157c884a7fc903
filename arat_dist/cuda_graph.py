"""The training step as CUDA graphs: recorded once for each kind of step, then replayed with one launch.

Not yet run on a GPU. Source of the rules that capture asks for: torch's notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from arat_dist.config import Recipe
from arat_dist.data.loader import Batch
from arat_dist.engine import Engine, Rank
from arat_dist.errors import UserError
from arat_dist.step import Inspect, Step, StepResult, TrainStep

NUM_WARMUPS = 3
"""Steps of a kind that run as they are before it is captured: libraries set themselves up, nets are compiled."""

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What records work and can repeat it."""

    def warming_up(self) -> AbstractContextManager[None]:
        """Around steps that run as they are, before a recording."""
        ...

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Record work without doing it.

        Returns:
            A function that does it again, and the result, whose tensors each repetition overwrites.

        Raises:
            RuntimeError: it can't be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs, on a stream of its own and in one pool of memory.

    One pool serves all graphs, since no two run at a time and nothing that a graph leaves is needed after the next one.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """See `Recorder`: autograd remembers the stream of a pass, so warm-up and capture share one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """See `Recorder`.

        Raises:
            UserError: the capture was broken off, by a wait for the device for example; what that leaves of torch's
                allocator and generators can't be trained with.
            RuntimeError: what else went wrong in the work, such as memory that ran out; the training may go on.
        """
        graph, before, failed, result = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None, None
        try:
            # Other threads, which load pictures and write checkpoints, go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    result = work()
                except RuntimeError as error:
                    failed = error
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            culprit = failed or error
            raise UserError(
                f"train.cuda_graph: true: the step can't be captured ({_line(culprit)}); false trains without"
            ) from culprit
        if failed is not None:
            raise failed
        assert result is not None
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    """A step that can be repeated on other samples."""

    inputs: Sequence[Batch]
    """Where it reads its samples."""
    replay: Callable[[], None]
    result: StepResult
    """Where it leaves its result."""


class GraphedStep:
    """Replays steps: a kind of step is captured when it has been taken `NUM_WARMUPS` times.

    A kind is what the host decides: sizes of the batch and of its images, the attack with its eps and steps, what
    losses are multiplied by. Everything else is read from the device: weights, buffers, samples, the learning rate, and
    the seed of dropout, which torch hands to a graph at each replay. Steps that diagnostics look into run as they are,
    and so do those of kinds that don't come back, such as every step of an eps warm-up.

    Where a capture fails for lack of memory, training goes on without: a warning says so.

    Args:
        step: what is captured.
        recorder: what records it.
    """

    def __init__(self, step: TrainStep, recorder: Recorder):
        self._step, self._recorder = step, recorder
        self._recordings: dict[Hashable, _Recording] = {}
        self._num_taken: Counter[Hashable] = Counter()
        self._is_off = False

    @property
    def num_recordings(self) -> int:
        """Kinds of steps that are replayed."""
        return len(self._recordings)

    def __call__(
        self, parts: Sequence[Batch], weight: float, reseed: Callable[[], None], inspect: Inspect | None = None
    ) -> StepResult:
        """See `Step`."""
        if self._is_off:
            return self._step(parts, weight, reseed, inspect)
        kind = (self._step.engine.objective.step_kind, weight, tuple(part.images.shape for part in parts))
        if inspect is None and kind not in self._recordings and self._num_taken[kind] >= NUM_WARMUPS:
            self._record(kind, parts, weight)
        if inspect is not None or kind not in self._recordings:
            self._num_taken[kind] += inspect is None
            with self._recorder.warming_up():
                return self._step(parts, weight, reseed, inspect)
        recording = self._recordings[kind]
        for given, own in zip(parts, recording.inputs, strict=True):
            for source, target in zip(given, own, strict=True):
                target.copy_(source, non_blocking=True)
        reseed()
        recording.replay()
        return _copied(recording.result)

    def _record(self, kind: Hashable, parts: Sequence[Batch], weight: float) -> None:
        inputs = [Batch(*(tensor.clone() for tensor in part)) for part in parts]
        try:
            replay, result = self._recorder.record(lambda: self._step(inputs, weight, lambda: None))
        except RuntimeError as error:
            logger.warning("train.cuda_graph: the step can't be captured, training goes on without: %s", _line(error))
            self._is_off = True
            self._step.engine.objective.zero_grad(set_to_none=True)  # what the capture left is no gradient
            self._recordings.clear()
            return
        self._recordings[kind] = _Recording(inputs, replay, result)


def build_step(engine: Engine, recipe: Recipe, rank: Rank) -> Step:
    """The recipe's step: replayed from a CUDA graph where `train.cuda_graph` asks for it and one rank trains."""
    if not recipe.train.cuda_graph:
        return TrainStep(engine)
    if rank.world_size > 1:
        if rank.is_first:
            logger.warning("train.cuda_graph: goes with one worker so far; %d train without", rank.world_size)
        return TrainStep(engine)
    return GraphedStep(TrainStep(engine, on_device=True), CudaRecorder(rank.device))


def is_captured(recipe: Recipe, rank: Rank) -> bool:
    """Whether the engine's step is going to be captured."""
    return recipe.train.cuda_graph and rank.world_size == 1


def _copied(result: StepResult) -> StepResult:
    """The result in memory that no replay overwrites: some twenty copies of single numbers."""
    metrics: list[Any] = [
        ({name: value.clone() for name, value in values.items()}, count) for values, count in result.metrics
    ]
    return StepResult(metrics, result.num_overflows, result.gradient_norm.clone(), result.finite.clone())


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
