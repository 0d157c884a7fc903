"""Checkpoints beside the training: a copy is taken between two steps, and a thread of its own writes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Thread
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from arat_dist.averaging import Average
from arat_dist.checkpoint import Checkpoint, save_checkpoint
from arat_dist.engine import Engine, Rank, averaged_statistics, set_statistics, statistics_of
from arat_dist.queued import queued_event
from arat_dist.storage import Storage

T = TypeVar("T")
logger = logging.getLogger(__name__)


def capture(
    step: int,
    engine: Engine,
    averages: Mapping[str, Average],
    rank: Rank,
    progress: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> Checkpoint | None:
    """A copy in host memory of all that the run needs to go on; every rank calls it, the first one gets it.

    The training is left as it is: norms whose running statistics are a rank's own keep them.

    Args:
        step: steps done.
        engine: the weights and the optimizer's state.
        averages: those of them that have begun are kept.
        rank: this process.
        progress: further small tensors, the same on all ranks.
        about: plain values for the manifest.
    """
    engine.objective.sync(rank.all_reduce)
    nets = {"model": engine.objective} | {name: each.classifier for name, each in averages.items() if each.has_begun}
    rows = {f"statistics.{name}": rank.gather(statistics_of(net)) for name, net in nets.items()}
    weights = {}
    for name, net in nets.items():
        with averaged_statistics(net, rank):
            state = engine.model_state() if net is engine.objective else net.state_dict()
            weights[name] = _copied(state) if rank.is_first else {}
    optimizer = engine.state_dict()
    if not rank.is_first:
        return None
    return Checkpoint(step, weights, _copied(optimizer), _copied({**rows, **progress}), about)


def take_up(checkpoint: Checkpoint, engine: Engine, averages: Mapping[str, Average], rank: Rank) -> None:
    """Give back what `capture` took; at the same world size every rank gets its own running statistics."""
    engine.load_model_state(checkpoint.weights["model"])
    engine.load_state_dict(checkpoint.optimizer)
    nets: dict[str, nn.Module] = {"model": engine.objective}
    for name, average in averages.items():
        average.resume(checkpoint.weights.get(name), checkpoint.step)
        nets[name] = average.classifier
    for name, net in nets.items():
        rows = checkpoint.progress.get(f"statistics.{name}")
        if rows is not None and len(rows) == rank.world_size:
            set_statistics(net, rows[rank.index].to(rank.device))


_LOOK_S = 0.1


class Saver:
    """Writes checkpoints one at a time, beside the training; as a context, ends when the last one is written.

    A save that fails, on a full disk for example, is said in the log and stops nothing: the one before is still there.

    Args:
        folder: of the run's checkpoints.
        keep: newest ones that are kept.
        check: called before each file; what it raises is raised again in the training.
        note: called before each checkpoint; gives further plain values for it.
    """

    def __init__(
        self, folder: Storage, *, keep: int, check: Callable[[], None], note: Callable[[], Mapping[str, Any]] = dict
    ):
        self._folder, self._keep, self._check, self._note = folder, keep, check, note
        self._num_files = 0
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def submit(self, checkpoint: Checkpoint, worthy: Tensor | None = None) -> None:
        """Have it written; waits for the one before.

        Args:
            checkpoint: in host memory.
            worthy: 0-d, whether its last step was taken: while steps are skipped the newest checkpoint stays the one
                from before. None: it is written in any case.

        Raises:
            SupersededError: another process has taken the run over.
        """
        self._wait()
        if self._error is not None and not isinstance(self._error, OSError | FloatingPointError):
            raise self._error
        self._thread = Thread(target=self._write, args=(checkpoint, worthy, queued_event()), name="checkpoint")
        self._thread.start()

    def wait(self, beat: Callable[[], None]) -> None:
        """Wait for the last one; `beat` is called whenever another file is done: a save that gets on is no hang."""
        self._wait(beat)

    def finish(self, rank: Rank) -> None:
        """Wait for the last one; raises what kept it from being written. Every rank calls it.

        Raises:
            FloatingPointError: its weights are no numbers; on all ranks, or the others would go on without the first.
        """
        self._wait()
        broke_down = isinstance(self._error, FloatingPointError)
        broke_down = bool(rank.all_reduce(torch.tensor(int(broke_down), device=rank.device)))
        if self._error is not None:
            raise self._error
        if broke_down:
            raise FloatingPointError("the weights are no numbers any more; a lower optim.lr would be a start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()

    def _wait(self, beat: Callable[[], None] = lambda: None) -> None:
        seen = self._num_files
        while self._thread is not None:
            self._thread.join(_LOOK_S)
            if self._num_files != seen:
                seen = self._num_files
                beat()
            if not self._thread.is_alive():
                self._thread = None

    def _begin_file(self) -> None:
        self._num_files += 1
        self._check()

    def _write(self, checkpoint: Checkpoint, worthy: Tensor | None, copied: torch.cuda.Event | None) -> None:
        self._error = None
        try:
            if copied is not None:
                copied.synchronize()
            if worthy is not None and not worthy.item():
                return
            _refuse_no_numbers(checkpoint)
            whole = replace(checkpoint, about={**checkpoint.about, **self._note()})
            save_checkpoint(self._folder, whole, keep=self._keep, check=self._begin_file)
        except Exception as error:  # noqa: BLE001 - the training goes on; `finish` and `submit` raise what matters
            self._error = error
            logger.warning("no checkpoint of step %d: %s; the one before is kept", checkpoint.step, error)


def _refuse_no_numbers(checkpoint: Checkpoint) -> None:
    """A checkpoint that nothing can go on from would take the place of one that works (FloatingPointError)."""
    for part, state in checkpoint.weights.items():
        for name, tensor in state.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(f"{part}: {name} is no number any more; a lower optim.lr would be a start")


def _copied(state: T) -> T:
    """The same tree with every tensor copied to host memory; copies from a GPU are queued, not waited for."""
    if isinstance(state, Tensor):
        source = state.detach()
        # Pinned memory, or the host would wait for the GPU here.
        target = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        return target.copy_(source, non_blocking=True)  # pyright: ignore[reportReturnType]
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}  # pyright: ignore[reportReturnType]
    if isinstance(state, list):
        return [_copied(value) for value in state]  # pyright: ignore[reportReturnType]
    return state
