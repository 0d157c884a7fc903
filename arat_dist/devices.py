"""Which device a process computes on, what it is called, why there is no GPU, and what one can't do."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arat_dist.config import ClusterConfig, Recipe
from arat_dist.engine import Rank
from arat_dist.errors import UserError


def own_device(cluster: ClusterConfig) -> torch.device:
    """The device of a run without workers: the GPU that is there, unless cluster.gpus_per_worker says 0."""
    if cluster.gpus_per_worker is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda" if cluster.gpus_per_worker else "cpu")


def device_name(device: torch.device) -> str:
    """A device as people know it: "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def why_no_gpu() -> str:
    """Why torch can use no GPU, in half a sentence: its build, the driver, or CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA; install a build with it"
    if not _has_driver():
        return "no NVIDIA driver is installed (libcuda.so.1 is missing)"
    if visible is not None and not torch.cuda.is_available():
        return f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or name a GPU that nvidia-smi lists"
    return f"the driver finds no GPU, or is too old for CUDA {torch.version.cuda}; see what nvidia-smi says"


def _has_driver() -> bool:
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@contextmanager
def device_errors(recipe: Recipe, rank: Rank) -> Iterator[None]:
    """Inside, a GPU's lack of memory, or of a deterministic algorithm, is said in one line (UserError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(recipe, rank)) from error
    except RuntimeError as error:
        if recipe.train.deterministic and "deterministic" in str(error):
            reason = str(error).partition(", but you set")[0].partition("\n")[0]
            raise UserError(f"train.deterministic: true: {reason}; false would be right") from error
        raise


def out_of_memory(recipe: Recipe, rank: Rank) -> str:
    """What to say of a step that a GPU has no room for: how large its parts are, and what would be smaller."""
    train = recipe.train
    share = -(-train.global_batch_size // rank.world_size)
    size = -(-share // train.micro_batches)
    said = (
        f"train.global_batch_size: {train.global_batch_size}: no room for {size} images at a time in the memory of "
        f"{device_name(rank.device)} (train.micro_batches {train.micro_batches}); "
    )
    if size >= 4:
        return f"{said}train.micro_batches: {2 * train.micro_batches} halves what a step needs"
    return f"{said}{'a smaller model' if train.grad_checkpointing else 'train.grad_checkpointing: true'} needs less"
