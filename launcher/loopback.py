"""The process group of workers that are all on this machine: no other machine reaches it.

torch's store listens on every network, whatever its address, and takes orders from anyone; gloo and nccl listen where
the machine's name leads. Here all of them keep to the loopback.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any, cast

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_HOST = "127.0.0.1"

_TCPStore: Any = cast("Any", dist).TCPStore

_served: list[Any] = []
"""In the first worker's process: keeps the store's server alive."""


class LoopbackConfig(TorchConfig):
    """TorchConfig for workers of one machine."""

    @property
    def backend_cls(self) -> Any:
        """What sets the group up."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Join all workers to a group; called in the controller."""
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        port = worker_group.execute_single(0, _serve)
        worker_group.execute(_set_torch_distributed_env_vars)
        group = {"backend": "nccl" if has_gpus else "gloo", "world_size": len(worker_group)}
        timeout = timedelta(seconds=backend_config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, port, index=rank, timeout=timeout, **group)
                for rank in range(len(worker_group))
            ]
        )


def _serve() -> int:
    """Start the store; returns its port."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    fd = listener.detach()  # the store owns it from here on
    _served.append(_TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=fd))
    return port


def _join(port: int, *, index: int, world_size: int, backend: str, timeout: timedelta) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ |= {"MASTER_ADDR": _HOST, "MASTER_PORT": str(port)}  # some libraries read them
    store = _TCPStore(_HOST, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=index, world_size=world_size, timeout=timeout)
