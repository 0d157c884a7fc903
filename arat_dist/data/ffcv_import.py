"""What is used of FFCV, imported without its side effects. The only file that imports ffcv."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba.typed
import torch

from arat_dist.errors import UserError


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Undo FFCV's habit of setting torch's thread count, which it does on import."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _plain_dictionaries() -> Iterator[None]:
    """Spare FFCV's import a dictionary of numba's for two strings: compiling it takes 5.2 of the import's 5.6 s."""
    typed: Any = numba.typed
    kept, typed.Dict = typed.Dict, dict
    try:
        yield
    finally:
        typed.Dict = kept


@contextmanager
def _advised() -> Iterator[None]:
    """Say what to do where it can't be imported."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"ffcv: can't be imported ({reason}); `make setup` installs it, data.loader: torchvision reads without it"
        ) from error


with _advised(), _torch_threads_kept(), _plain_dictionaries():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from ffcv.loader import Loader, OrderOption
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
    from ffcv.writer import handle_sample

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "IMAGE_MODES",
    "TYPE_ID_HANDLER",
    "AllocationQuery",
    "Compiler",
    "FieldDescType",
    "Graph",
    "HeaderType",
    "IntDecoder",
    "IntField",
    "Loader",
    "MemoryAllocator",
    "OrderOption",
    "PipelineSpec",
    "RGBImageField",
    "RandomHorizontalFlip",
    "RandomResizedCropRGBImageDecoder",
    "Reader",
    "SimpleRGBImageDecoder",
    "State",
    "ToTensor",
    "ctypes_imdecode",
    "ctypes_resize",
    "get_metadata_type",
    "handle_sample",
]
