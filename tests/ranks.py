"""Gloo processes for the tests, gone when their result is here."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from arat_dist.engine import Rank


def on_two_ranks(function: Callable[[Rank], Any], folder: Path) -> list[Any]:
    """What `function`, defined in a test module, gives on each of two ranks: tensors, numbers, lists and dicts."""
    return on_ranks(function, folder, 2)


def on_ranks(function: Callable[[Rank], Any], folder: Path, world_size: int) -> list[Any]:
    """The same on any number of ranks; one alone has no process group."""
    context = spawn(_worker, args=(world_size, function, str(folder)), nprocs=world_size, join=False)
    assert context is not None
    deadline = time.monotonic() + 540
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the two processes hang"
    finally:
        for process in filter(None, context.processes):
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{index}.pt") for index in range(world_size)]


def _worker(index: int, world_size: int, function: Callable[[Rank], Any], folder: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=index,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
    rank = Rank(index, world_size, torch.device("cpu"))
    result = function(rank)
    if world_size > 1:
        dist.barrier()
    torch.save(result, Path(folder) / f"rank{index}.pt")
    if world_size > 1:
        dist.destroy_process_group()
