"""Processes that compute together over gloo for the benchmarks, idle between two calls."""

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

from arat_dist.engine import Rank


class RankGroup:
    """Ranks on this machine's CPU, each with an object of its own that answers calls; they end with the context.

    Args:
        world_size: number of processes.
        num_threads: threads that torch uses in each.
        build: from a rank and `args` to that object; picklable.
        args: further arguments.
    """

    def __init__(self, world_size: int, num_threads: int, build: Callable[..., Callable[..., Any]], *args: Any):
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for index in range(world_size):
            ours, theirs = context.Pipe()
            work = (theirs, index, world_size, num_threads, self._folder.name, build, args)
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
    folder: str,
    build: Callable[..., Callable[..., Any]],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(num_threads)
    if world_size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it listens where the host's name leads
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=index, world_size=world_size)
    try:
        answer = build(Rank(index, world_size, torch.device("cpu"), local_index=index), *args)
        while True:
            pipe.send((True, answer(*pipe.recv())))
    except EOFError:  # nobody asks any more
        return
    except BaseException:  # noqa: BLE001 - told where it was asked for
        pipe.send((False, traceback.format_exc()))
