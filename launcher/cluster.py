"""Worker groups under Ray: the same function on any number of workers, or in this process without Ray."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from arat_dist.config import ClusterConfig
from arat_dist.data import staging
from arat_dist.devices import own_device
from arat_dist.engine import Rank
from arat_dist.errors import ClusterError, StoppedError, UserError, WorkersError
from arat_dist.storage import Storage
from launcher.joining import join
from launcher.ray_parts import check_parts

if TYPE_CHECKING:
    from ray.train import WorkerGroupError

    from launcher.controller import Stop, Trainer

# Read by Ray when it is imported or starts: nothing phones home, and nobody joins without the token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray 2.60's watcher of leaving machines would keep the workers running until they are cut off: see controller.py.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Seconds between two looks at the workers: a failure is seen, and a stop passed on, after about as long.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
# What workers say is little, and Ray would explain its folding of equal lines at length.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray Tune: no files for each trial, no tables, no tracebacks of trials; what it would save is read by nobody.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

T = TypeVar("T")

# Nothing but a recipe goes through Ray's object store; its default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20

_POLL_S = 0.5
"""Seconds between two looks of the driver at its wish to stop."""

_WATCHDOG_S = 60
"""Seconds in which a rank that its watchdog gives up is gone."""

_stop_wanted = threading.Event()
"""In a worker's process: whether the work in it is to stop."""


def run_workers(
    work: Callable[[Rank], T],
    cluster: ClusterConfig,
    name: str,
    stop: threading.Event | None = None,
) -> T:
    """Call `work` on every rank of a worker group and return the first rank's answer.

    A worker that dies or fails costs a restart of all (cluster.max_failures). A group that is to leave a machine, or
    gets another size, is asked to stop (`Rank.stop_wanted`) and starts anew once all of `work` has raised StoppedError.

    Args:
        work: picklable; called with the rank once its process group is up.
        cluster: workers 0 calls it in this process.
        name: the group's name in Ray.
        stop: asks the work to stop once it is set.

    Raises:
        UserError, FloatingPointError, StoppedError: as `work` raised it; the workers were not started anew.
        WorkersError: a worker failed once too often.
        ClusterError: the cluster has no room for the workers.
    """
    stop = threading.Event() if stop is None else stop
    if cluster.workers == 0:
        torch.set_num_threads(cluster.cpus_per_worker)
        return work(Rank(0, 1, own_device(cluster), stop_wanted=stop.is_set))
    connect(cluster)
    from ray.train import ControllerError, WorkerGroupError

    from launcher.controller import Stop

    # Runs resume from their own checkpoints, so each launch is a new one to Ray.
    name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    asked = Stop(name)
    try:
        answer = in_thread(_trainer(work, cluster, name, asked).fit, stop, asked).return_value
    except WorkerGroupError as error:
        raise _first_failure(error) from None
    except ControllerError as error:
        if isinstance(error.controller_failure, ClusterError | StoppedError):
            raise error.controller_failure from None
        raise
    finally:
        asked.forget()
    if isinstance(answer, FloatingPointError | StoppedError):
        raise answer
    return answer  # pyright: ignore[reportReturnType]


def _trainer(work: Callable[[Rank], T], cluster: ClusterConfig, name: str, stop: Stop) -> Trainer:
    """Ray's trainer of one launch."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from launcher.controller import Trainer
    from launcher.loopback import LoopbackConfig

    longest_s = math.ceil(cluster.collective_timeout_s)
    # Ray would take a worker for dead whose Python says nothing for 10 minutes; how long it may is up to the watchdog.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(longest_s + _WATCHDOG_S)
    # Ray waits so long for places, then asks the scaling policy again: soon, for a group that may be smaller, since Ray
    # may have counted a machine that is gone.
    places_s = 60 if isinstance(cluster.workers, int) else 10
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(min(places_s, cluster.start_timeout_s))
    return Trainer(
        partial(_on_worker, work, cluster.cpus_per_worker),
        cluster=cluster,
        stop=stop,
        ask_to_stop=_ask_to_stop,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=bool(cluster.num_gpus),
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": cluster.num_gpus},
            placement_strategy=cluster.placement.upper(),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        torch_config=(TorchConfig if cluster.address else LoopbackConfig)(timeout_s=longest_s),
        run_config=RunConfig(
            name=name,
            storage_path=(Storage(cluster.storage) / ".ray").uri,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # workers say themselves what is news
        ),
    )


def _first_failure(error: WorkerGroupError) -> Exception:
    """What to raise for failed workers: what the user has to put right before what follows from it."""
    failures = sorted(
        error.worker_failures.items(), key=lambda failure: (not isinstance(failure[1], UserError), failure)
    )
    rank, first = failures[0]
    return first if isinstance(first, UserError) else WorkersError(rank, first, str(error))


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that the first SIGTERM sets, inside the context; the second ends the program as Ctrl-C does.

    Signals reach the main thread alone: in another one the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_: int, __: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def in_thread(work: Callable[[], T], stop: threading.Event, asked: Stop) -> T:
    """Call it in a thread of its own: in the main one Ray takes over Ctrl-C, and makes of it an exit with status 0.

    Meanwhile the controller is told when the event is set.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True, name="ray train").start()
    while not wait([future], _POLL_S).done:
        if stop.is_set() and not asked.is_asked():
            asked.ask()
    return future.result()


def connect(cluster: ClusterConfig) -> None:
    """Join the cluster at cluster.address, or start one in this machine's processes, once.

    Raises:
        UserError: there is no such cluster, it doesn't take the token, or this version of Ray lacks what is used of it.
    """
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Read on import: without it Ray binds to the address that other machines reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        _name_the_cluster()
        return
    check_parts()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if cluster.address is not None:
        join(cluster.address)
    else:
        ray.init(
            "local",  # or Ray would join a cluster that RAY_ADDRESS or `ray start` made known
            num_cpus=max(os.cpu_count() or 1, cluster.max_workers * cluster.cpus_per_worker),
            # Without the dashboard, Ray Train can't see its own controller and leaks placement groups.
            include_dashboard=True,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in the place
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


def _ask_to_stop() -> None:
    """Called in a worker's process by the controller."""
    _stop_wanted.set()


def _on_worker(work: Callable[[Rank], T], num_threads: int) -> T | FloatingPointError | StoppedError:
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
    rank = Rank(
        context.get_world_rank(),
        context.get_world_size(),
        device,
        node=context.get_node_rank(),
        local_index=context.get_local_rank(),
        stop_wanted=_stop_wanted.is_set,
    )
    try:
        return work(rank)
    except (FloatingPointError, StoppedError) as error:
        return error  # all ranks meet it alike: no failure to restart after
    except UserError:
        raise  # perhaps one rank alone meets it: the controller ends the others, and no restart helps
    except Exception as error:
        logging.getLogger("arat_dist").error("worker %d failed: %s: %s", rank.index, type(error).__name__, error)
        raise
