"""Arithmetic on pixels that torch.compile joins into one kernel each, where a GPU would launch one for each operation.

Only inside `fused()`: plain torch else. Tested on the CPU, whose compiler gives the same numbers; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_is_on: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """Inside, functions marked as `fusible` run compiled: for seconds at the first call with tensors of new shapes."""
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


def fusible(function: F) -> F:
    """Mark a function of tensors and numbers, without side effects, the first of whose arguments is a tensor."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if not _is_on.get():
            return function(*args)
        # A float would be compiled in, anew for each eps of a warm-up; a tensor of it on the device is read.
        device = args[0].device
        return _compiled(function)(*(_number(each, device) if isinstance(each, float) else each for each in args))

    return run  # pyright: ignore[reportReturnType]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)
