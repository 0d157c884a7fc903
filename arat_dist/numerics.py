"""How torch computes float32 on a GPU, and whether it gives the same bits twice: set here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch

from arat_dist.config import TrainConfig


def training_numerics(train: TrainConfig) -> AbstractContextManager[None]:
    """Inside, TF32 and determinism are as the recipe's section says; cuDNN picks its fastest algorithms by trying them.

    Trying is off with `train.deterministic`, since the fastest one differs from time to time.
    """
    if train.deterministic:
        # Read when cuBLAS starts: with its default workspace, streams may take turns in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return _numerics(tf32=train.tf32, benchmark=not train.deterministic, deterministic=train.deterministic)


def evaluation_numerics() -> AbstractContextManager[None]:
    """Inside, float32 is float32, whatever was set before: TF32 would move samples over the edge of a class.

    cuDNN tries no algorithms: an evaluation's batches shrink, and each size would be tried anew.
    """
    return _numerics(tf32=False, benchmark=False, deterministic=torch.are_deterministic_algorithms_enabled())


@contextmanager
def _numerics(*, tf32: bool, benchmark: bool, deterministic: bool) -> Iterator[None]:
    backends, options = torch.backends, cast("Any", torch.utils.deterministic)
    filling = options.fill_uninitialized_memory
    before = _tf32_of_matmul(), _tf32_of_cudnn(), backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    _set(tf32, tf32, benchmark, deterministic)
    # A kernel for each empty tensor, against code that reads memory which it never wrote.
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        _set(*before)
        options.fill_uninitialized_memory = filling


def _set(tf32_of_matmul: bool, tf32_of_cudnn: bool, benchmark: bool, deterministic: bool) -> None:
    # The older of torch's two interfaces: once the newer one was used, torch and its compiler fail to read this one.
    torch.backends.cuda.matmul.allow_tf32 = tf32_of_matmul
    torch.backends.cudnn.allow_tf32 = tf32_of_cudnn
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)


def _tf32_of_matmul() -> bool:
    # Read by the newer interface, which never fails.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _tf32_of_cudnn() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
