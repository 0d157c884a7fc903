"""Activation checkpointing: a stage keeps its input alone and runs again when the backward pass comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

from torch import is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from arat_dist.errors import UserError
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import Branch
from arat_dist.models.taps import stages


def recompute_stages(classifier: Classifier) -> None:
    """Let every stage of the backbone, of a transformer every block, run twice, for the memory of its activations.

    In place. Results and buffers stay the same: the second run takes the branch, the taps and the dropout of the first,
    and moves no running statistics.

    Raises:
        UserError: timm's feature_info names no stages of the net.
    """
    found = [classifier.backbone.get_submodule(stage["module"]) for stage in stages(classifier.backbone)]
    found = [stage for stage in found if any(True for _ in stage.parameters())]
    if not found:
        name = type(classifier.backbone).__name__
        raise UserError(f"train.grad_checkpointing: true: {name} names no stages; false would be right")
    for stage in found:
        stage.forward = _Recomputed(stage, classifier)


class _Recomputed:
    """A stage's forward. An object, no closure: a copied net's stages have the copied net."""

    def __init__(self, stage: nn.Module, classifier: Classifier):
        self._stage, self._classifier = stage, classifier

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(type(self._stage).forward, self._stage)
        if not is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the first run and around the second, which comes when the net may be in another branch."""
        classifier = self._classifier
        return nullcontext(), _Anew(partial(self._again, classifier.current_branch, classifier.recorder.is_recording))

    @contextmanager
    def _again(self, branch: Branch, is_recording: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._classifier.branch(branch))
            stack.enter_context(_still(self._stage))
            if is_recording:
                # What is pooled goes nowhere, but autograd expects the same operations.
                stack.enter_context(self._classifier.recorder.recording())
            yield


class _Anew:
    """A context that may be entered again once it was left: the diagnostics go through a graph several times."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self._make = make

    def __enter__(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, trace)


@contextmanager
def _still(stage: nn.Module) -> Iterator[None]:
    """No BatchNorm moves its running statistics inside.

    It goes on seeing them: autograd expects the same tensors as in the first run.
    """
    norms = [m for m in stage.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(num_batches)
