"""Worker groups under Ray: the same function on any number of workers, or in this process without Ray."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from arat_dist.config import ClusterConfig, DataConfig
from arat_dist.data import staging
from arat_dist.engine import Rank
from arat_dist.errors import WorkersError
from arat_dist.storage import Storage

# Read by Ray when it is imported or starts: nothing phones home, and nobody joins without the token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Nothing here reacts to a notice of preemption yet, and Ray 2.60's watcher begins each run with an error line.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# What workers say is little, and Ray would explain its folding of equal lines at length.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

T = TypeVar("T")

# Nothing but a recipe goes through Ray's object store; its default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_TIMEOUT_S = 1800
"""How long a collective waits for all ranks: Ray's own value."""
_COPYING_S = 6 * 3600
"""The same where data is copied to each machine's disk: who is done waits for who still copies."""


def run_workers(work: Callable[[Rank], T], cluster: ClusterConfig, name: str, data: DataConfig | None = None) -> T:
    """Call `work` on every rank of a worker group and return the first rank's answer.

    Args:
        work: picklable; called with the rank once its process group is up.
        cluster: workers 0 calls it in this process.
        name: the group's name in Ray.
        data: what the workers load, if they do.
    """
    if cluster.workers == 0:
        torch.set_num_threads(cluster.cpus_per_worker)
        return work(Rank(0, 1, torch.device("cuda" if cluster.gpus_per_worker else "cpu")))
    connect(cluster)
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    trainer = TorchTrainer(
        partial(_on_worker, work, cluster.cpus_per_worker),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=_TIMEOUT_S if data is None or data.stage_to is None else _COPYING_S),
        # Runs resume from their own checkpoints, so each launch is a new one to Ray.
        run_config=RunConfig(
            name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            storage_path=(Storage(cluster.storage) / ".ray").uri,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # workers say themselves what is news
        ),
    )
    try:
        answer = _in_thread(trainer.fit).return_value
    except WorkerGroupError as error:
        rank, first = min(error.worker_failures.items())
        raise WorkersError(rank, first, str(error)) from None
    if isinstance(answer, FloatingPointError):
        raise answer
    return answer  # pyright: ignore[reportReturnType]


def _in_thread(work: Callable[[], T]) -> T:
    """Call it in a thread of its own: in the main one Ray takes over Ctrl-C, and makes of it an exit with status 0."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True, name="ray train").start()
    return future.result()


def connect(cluster: ClusterConfig) -> None:
    """Join the cluster at cluster.address, or start one in this machine's processes, once."""
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Read on import: without it Ray binds to the address that other machines reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return
    if cluster.address is not None:
        ray.init(cluster.address, logging_level=logging.WARNING)
    else:
        ray.init(
            "local",  # or Ray would join a cluster that RAY_ADDRESS or `ray start` made known
            num_cpus=max(os.cpu_count() or 1, cluster.workers * cluster.cpus_per_worker),
            # Without the dashboard, Ray Train can't see its own controller and leaks placement groups.
            include_dashboard=True,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
    _name_the_cluster()


def disconnect() -> None:
    """Leave the cluster, and end the one that `connect` started."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def _name_the_cluster() -> None:
    """Tell Ray Train's own actors which cluster is theirs: they search, and fail where a machine has several."""
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def _on_worker(work: Callable[[Rank], T], num_threads: int) -> T | FloatingPointError:
    from ray.train import get_context
    from ray.train.torch import get_device

    torch.set_num_threads(num_threads)
    context, device = get_context(), get_device()
    # Ray's own handler takes it to the driver's stderr; what all ranks would say, the first one says.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("arat_dist").setLevel(logging.INFO if context.get_world_rank() == 0 else logging.WARNING)
    # Any worker of a machine may be the one that copies.
    logging.getLogger(staging.__name__).setLevel(logging.INFO)
    assert isinstance(device, torch.device)
    rank = Rank(context.get_world_rank(), context.get_world_size(), device)
    try:
        return work(rank)
    except FloatingPointError as error:
        return error  # all ranks meet it alike, and would again: no failure to restart after
    except Exception as error:
        logging.getLogger("arat_dist").error("worker %d failed: %s: %s", rank.index, type(error).__name__, error)
        raise
