"""A stand-in for CUDA graphs on a CPU: what a graph would hold, as a list of torch's operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from arat_dist.step import StepResult

LOOKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
"""Operations for which the host reads a tensor, which no graph can hold."""


class TapeRecorder:
    """Records operations with the very tensors that they read and write; a replay does them again, in those tensors.

    As with CUDA graphs, all that the host decided is frozen, a recording changes nothing, and a look ends it.
    """

    def __init__(self) -> None:
        self.num_replays = 0

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        yield

    def record(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        tape = _Tape()
        try:
            with tape:
                result = work()
        finally:
            tape.undo()

        def replay() -> None:
            self.num_replays += 1
            tape.play()

        return replay, result


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LOOKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nand more lines")
        if func is torch.ops.aten.native_batch_norm.default:  # writes running statistics, which its schema doesn't say
            self._remember(args[3:5])
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._remember(kwargs[argument.name])
        out = func(*args, **kwargs)
        aliases = any(result.alias_info is not None for result in func._schema.returns)
        self._calls.append((func, args, kwargs, [] if aliases else tree_flatten(out)[0]))
        return out

    def play(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outs in self._calls:
                if func.is_view:
                    continue
                news = tree_flatten(func(*args, **kwargs))[0]
                for out, new in zip(outs, news, strict=False):
                    if isinstance(out, Tensor):
                        out.copy_(new)

    def undo(self) -> None:
        """Give back what was overwritten."""
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):  # views overlap
                tensor.copy_(before)

    def _remember(self, value: Any) -> None:
        for tensor in tree_flatten(value)[0]:
            if isinstance(tensor, Tensor) and id(tensor) not in self._before:
                self._before[id(tensor)] = tensor, tensor.clone()
