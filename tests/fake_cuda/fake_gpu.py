"""Makes torch take a process for one with a GPU, for good: the tests have a process of its own for it (`conftest`)."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from fake_driver import show_gpus
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils import _foreach_utils
from watch import Watch, item, note_wait, watches

GPU = torch.device("cuda", 0)
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "current_device": GPU.index,
    "get_device_capability": (9, 0),
    "get_device_name": "a GPU that isn't there",
    "max_memory_allocated": 0,
    "manual_seed_all": None,
    "_lazy_init": None,
}
"""Functions of torch.cuda that would ask the driver, and what they say instead."""
META_KERNELS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adamw_", "_fused_adamw_.tensor_lr"), lambda *_, **__: None
    ),
    "batch_norm_update_stats": lambda x, mean, var, momentum: (torch.empty_like(mean), torch.empty_like(var)),
}
"""Shapes of what operations give, where torch 2.14 or an older one doesn't know them."""
_META = torch.library.Library("aten", "IMPL", "Meta")


class Queue:
    """Stands for streams and events: there is nothing to be queued, but whoever waits for one is seen."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def synchronize(self) -> None:
        """As of both."""
        note_wait("synchronize")

    def record(self, *_: Any) -> None:
        """As of an event."""

    wait_event = wait_stream = record


@cache
def pretend_gpu() -> None:
    """Have torch believe in GPUs; tensors on them can be made inside `Watch` alone.

    Raises:
        Exception: of any kind, where this version of torch has other internals.
    """
    # A guard that does nothing takes the place of the one that calls the driver, as long as torch sees no GPU.
    torch._C._ensureCUDADeviceGuardSet()
    show_gpus()
    # torch.tensor(numbers, device="cuda") makes them on the host, as ever, and has the copy be seen.
    torch._C._set_only_lift_cpu_tensors(True)
    # So that the passes of autograd, too, have the product's functions on their stack.
    torch.autograd.set_multithreading_enabled(False)
    for name, answer in ANSWERS.items():
        _replace(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name, stand_in in (("Stream", Queue), ("Event", Queue), ("current_stream", Queue), ("stream", nullcontext)):
        _replace(torch.cuda, name, stand_in)
    _replace(torch.cuda, "synchronize", lambda *_: note_wait("synchronize"))
    _replace(Tensor, "record_stream", lambda *_: None)
    _replace(fake_tensor, "init_gpu_context", lambda device: None)
    _replace(fake_tensor.FakeTensorMode, "avoid_device_init", True)
    # One transfer as on a GPU, not one a number.
    _replace(fake_tensor.FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
    # A thread that writes checkpoints may wait, and isn't watched.
    _replace(fake_tensor.FakeTensor, "item", lambda tensor: Tensor.item(tensor) if watches() else item(tensor))
    # A copied net's tensors know the same mode.
    fake_tensor.FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # pyright: ignore[reportAttributeAccessIssue]
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    _foreach_utils._foreach_supported_types.append(fake_tensor.FakeTensor)
    _replace(nn.Module, "_apply", _apply)
    # Which kernel takes a convolution is asked of the driver; all that shows of it is the memory format.
    cudnn = torch._C._ConvBackend.Cudnn  # pyright: ignore[reportAttributeAccessIssue]
    _replace(torch._C, "_select_conv_backend", lambda *args, **kwargs: cudnn)
    _replace(torch._C, "_conv_determine_backend_memory_format", _conv_memory_format)
    _replace(nn.functional, "scaled_dot_product_attention", _attention)
    for name, kernel in META_KERNELS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            _META.impl(name, kernel)


def what_is_wrong() -> str | None:
    """Why this version of torch can't be fooled, None if it can: a step of torch alone is tried."""
    try:
        pretend_gpu()
        with Watch():
            plain_step()
    except Exception as error:  # noqa: BLE001 - torch promises none of what is used here
        return f"torch {torch.__version__}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives; its errors as such that can go from process to process (RuntimeError)."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def plain_step() -> None:
    """A step of torch's own code, by what the product's steps are made of."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).to(GPU)
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = net(torch.rand(2, 3, 8, 8).to(GPU)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def _replace(owner: Any, name: str, value: Any) -> None:
    getattr(owner, name)  # AttributeError: this version of torch has it elsewhere
    setattr(owner, name, value)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own swaps fake parameters in place, which weak references to them forbid; new ones do as well."""

    @cache  # tensors may be tied
    def changed(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            new = change(tensor)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    for part in module.modules() if recurse else [module]:
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            table.update({name: changed(tensor) for name, tensor in table.items() if tensor is not None})
    return module


def _conv_memory_format(pictures: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    formats = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (pictures, weight)]
    return torch.channels_last if any(formats) else torch.contiguous_format


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout_p: float = 0.0, **_: Any) -> Tensor:
    """One of the fused kernels, in autocast's precision; torch's own choice asks the driver."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, compute_log_sumexp=True, dropout_p=dropout_p)[0]
