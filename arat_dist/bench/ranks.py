"""Processes that compute together for the benchmarks, over gloo or nccl, idle between two calls."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from arat_dist.devices import why_no_gpu
from arat_dist.engine import Rank
from arat_dist.errors import UserError


def ranks_device(device: str | None, num_ranks: int) -> str:
    """Where so many ranks of this machine compute: "cuda", a GPU each, or "cpu".

    Args:
        device: the one that is asked for; None: GPUs where there are any.
        num_ranks: how many.

    Raises:
        UserError: there aren't as many GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device or ("cuda" if count else "cpu")
    if device == "cuda" and not count:
        raise UserError(f"--device: cuda: {why_no_gpu()}; cpu would be right")
    if device == "cuda" and num_ranks > count:
        raise UserError(f"--workers: {num_ranks}: with a GPU each, at most {count}; or --device cpu")
    return device


class RankGroup:
    """Ranks on this machine, each with an object of its own that answers calls; they end with the context.

    Args:
        world_size: number of processes.
        num_threads: threads that torch uses in each.
        device: "cpu", or "cuda" for the GPU of each rank's number; see `ranks_device`.
        build: from a rank and `args` to that object; picklable.
        args: further arguments.
    """

    def __init__(
        self, world_size: int, num_threads: int, device: str, build: Callable[..., Callable[..., Any]], *args: Any
    ):
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for index in range(world_size):
            ours, theirs = context.Pipe()
            work = (theirs, index, world_size, num_threads, device, self._folder.name, build, args)
            process = context.Process(target=_serve, args=work, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
            process.join()
        self._folder.cleanup()

    def __call__(self, *args: Any) -> list[Any]:
        """What each rank answers.

        Raises:
            RuntimeError: one of them failed; says why.
        """
        for pipe in self._pipes:
            pipe.send(args)
        return [_receive(pipe) for pipe in self._pipes]


def _receive(pipe: Connection) -> Any:
    try:
        is_good, answer = pipe.recv()
    except EOFError:
        raise RuntimeError("a process of the benchmark died") from None
    if not is_good:
        raise RuntimeError(answer)
    return answer


def _serve(
    pipe: Connection,
    index: int,
    world_size: int,
    num_threads: int,
    device_type: str,
    folder: str,
    build: Callable[..., Callable[..., Any]],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(num_threads)
    device = torch.device(device_type, index) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if world_size > 1:
            # Else they listen where the host's name leads.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=index, world_size=world_size)
        answer = build(Rank(index, world_size, device, local_index=index), *args)
        while True:
            pipe.send((True, answer(*pipe.recv())))
    except EOFError:  # nobody asks any more
        return
    except BaseException:  # noqa: BLE001 - told where it was asked for
        pipe.send((False, traceback.format_exc()))
