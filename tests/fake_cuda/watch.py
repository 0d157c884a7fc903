"""Follows the work for a GPU that isn't there: devices that are mixed, waits of the host, kernels.

What the host computes is real. What the GPU would compute is fake: tensors without memory that have shape, dtype,
memory format and device. Where the host asks for numbers of the GPU it gets some with which it can go on: 1 and True,
and all elements where it asks for some; False only from `any` and `<`, by which code asks whether something is wrong.
What it has sent there itself comes back as it was.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import arg_tree_leaves, tree_map_only

NUM_FRAMES = 3
"""Functions of the product that a place names, from the inside out."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
NO_KERNELS = ("empty", "new_empty", "as_strided_", "_unsafe_view", "_reshape_alias", "lift_fresh")
"""Beginnings of the names of operations that make tensors and views, beside what torch calls a view."""
ANSWERED_NO = ("any", "lt")


@dataclass
class Findings:
    """What was seen of some work."""

    waits: list[str] = field(default_factory=list)
    """What made the host wait for the GPU, and where in the product: "item at engine.py:188 is_finite < ..."."""
    copies: list[str] = field(default_factory=list)
    """What was copied from one to the other without a wait, and where."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Operations on the GPU by name, views left out: about its kernels, since some operations launch several."""


class Watch(TorchDispatchMode):
    """As a context: what is done on GPUs inside is fake, and `found` says what it was.

    Raises:
        RuntimeError: out of an operation that mixes devices, as on a GPU.
    """

    _fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __init__(self) -> None:
        super().__init__()
        self.found = Findings()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked all the time
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)  # which only a driver can do
        tensors = [leaf for leaf in arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        if not is_gpu(kwargs.get("device")) and not any(map(is_fake, tensors)):
            out = func(*args, **kwargs)
        elif func.namespace == "aten":
            out = self._on_gpu(func, args, kwargs, tensors)
        else:  # c10d sees to its devices itself
            out = self._faked(func, args, kwargs)
        if is_pinned:
            out.is_called_pinned = True
        return out

    def _on_gpu(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
        name = func.overloadpacket.__name__
        if answer := ANSWERS.get(name):
            self._wait(answer.__name__)
            return answer(*args)
        if name in ("_to_copy", "copy_") and is_transfer(*args, **kwargs):
            return self._transfer(func, args, kwargs)
        if name in INDEXING:
            args = self._indexing(func, *args)
        else:
            refuse_mixed_devices(func, tensors)
        if not func.is_view and not name.startswith(NO_KERNELS):
            self.found.kernels[name] += 1
        out = self._faked(func, args, kwargs)
        if name in ANSWERED_NO:
            out.is_answered_no = True
        return out

    def _transfer(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """A copy from one device to the other, into a new tensor or into the first argument."""
        into, source = (args[0], args[1]) if func is torch.ops.aten.copy_.default else (None, args[0])
        is_queued = kwargs.get("non_blocking", False) or args[2:] == (True,)
        if is_fake(source) and into is not None and not hasattr(into, "is_called_pinned"):
            is_queued = False  # memory that the GPU can't reach: the host copies on
        what = f"copy of {[*source.shape]} to the {'host' if is_fake(source) else 'GPU'}"
        if is_queued:
            self.found.copies.append(f"{what} at {place()}")
        else:
            self._wait(what)
        if is_fake(source):
            sent = known(source)
            arrived = torch.ones(source.shape, dtype=source.dtype) if sent is None else sent
            return arrived.to(kwargs.get("dtype", source.dtype), copy=True) if into is None else into.copy_(arrived)
        out = self._faked(func, args, kwargs)
        out.sent = source.clone(), out._version
        return out

    def _indexing(self, func: OpOverload, tensor: Tensor, indices: Sequence[Tensor | None], *values: Any) -> list[Any]:
        """Arguments that have nothing counted, with the numbers of all elements in the place of a mask."""
        is_filled = bool(values) and not is_fake(values[0]) and values[0].ndim == 0
        refuse_mixed_devices(func, [tensor] if is_filled else [tensor, *values[:1]])
        plain: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            if index is not None and not is_fake(index):
                self._wait("index of the host")
            elif is_mask and not is_filled:
                self._wait("index by a mask")
            if index is None:
                plain.append(None)
            else:
                shape = [index.numel()] if is_mask else index.shape
                plain += [tensor.new_zeros(shape, dtype=torch.int64)] * (index.ndim if is_mask else 1)
        return [tensor, plain, *values]

    def _faked(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with self._fakes:
            out = func(*args, **kwargs)
        return tree_map_only(FakeTensor, real_on_host, out)

    def _wait(self, what: str) -> None:
        self.found.waits.append(f"{what} at {place()}")


def watches() -> list[Watch]:
    """Those that this thread works inside of."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Watch)]


def note_wait(what: str) -> None:
    """Let them know of a wait that no operation shows."""
    for watch in watches():
        watch._wait(what)


def item(tensor: Tensor) -> bool | int | float:
    """What the host is told of a tensor of one element."""
    if (sent := known(tensor)) is not None:
        return sent.item()
    if tensor.dtype is torch.bool:
        return not hasattr(tensor, "is_answered_no")
    return 1.0 if tensor.is_floating_point() else 1


def equal(first: Tensor, second: Tensor) -> bool:
    """What it is told of two."""
    return True


def nonzero(tensor: Tensor) -> Tensor:
    """Numbers of all elements."""
    return tensor.new_zeros((tensor.numel(), tensor.ndim), dtype=torch.int64)


def masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    """All elements."""
    return torch.broadcast_tensors(tensor, mask)[0].flatten()


ANSWERS: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": item,
    "equal": equal,
    "nonzero": nonzero,
    "masked_select": masked_select,
}
"""Operations whose result, or whose shape, the host must know."""


def known(tensor: Tensor) -> Tensor | None:
    """What the host has sent to the GPU as this tensor, if nothing has been written to it since."""
    sent, version = getattr(tensor, "sent", (None, -1))
    return sent if tensor._version == version else None


def is_gpu(device: torch.device | str | None) -> bool:
    """Whether that is one."""
    return device is not None and torch.device(device).type == "cuda"


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is on the GPU: those of the host are real."""
    return isinstance(tensor, FakeTensor)


def is_transfer(first: Tensor, second: Tensor | None = None, *_: Any, **kwargs: Any) -> bool:
    """Whether arguments of `_to_copy` or `copy_` lead from one device to the other."""
    if second is None:
        return "device" in kwargs and is_gpu(kwargs["device"]) != is_fake(first)
    return is_fake(first) != is_fake(second)


def refuse_mixed_devices(func: OpOverload, tensors: Sequence[Tensor]) -> None:
    """Raise what a GPU raises: of the host's tensors, arithmetic takes single numbers, and other work none."""
    takes_numbers = torch.Tag.pointwise in func.tags or func is torch.ops.aten.fill_.Tensor
    if any(not is_fake(tensor) and not (takes_numbers and tensor.ndim == 0) for tensor in tensors):
        mixed = ", ".join(f"{tensor.device} {[*tensor.shape]}" for tensor in tensors)
        raise RuntimeError(f"{func} of tensors on different devices: {mixed}")


def real_on_host(tensor: FakeTensor) -> Tensor:
    """A tensor that comes to the host is real there, and holds what `item` would say."""
    if tensor.fake_device.type == "cuda":
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).fill_(1)


def place() -> str:
    """Where in the product the current operation is, from the inside out."""
    frames, frame = [], sys._getframe(1)
    while frame is not None and len(frames) < NUM_FRAMES:
        path = Path(frame.f_code.co_filename)
        if "arat_dist" in path.parts:
            frames.append(f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(frames)
