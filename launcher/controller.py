"""What is added to Ray Train's controller: when it stops the workers, with how many it goes on, when it gives up.

The controller is an actor beside the driver. It asks a scaling policy for the size of the worker group, a failure
policy what to do about an error, and tells callbacks what it does. Ray 2.60 resizes a group by killing it, which would
repeat the work since the last checkpoint, and its own watcher of leaving machines waits for their end with the workers
running. Here both ask the workers to stop first: they write a checkpoint and return, and the group is started anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray._private.state import state  # Ray Train's own watcher asks the same
from ray.experimental import internal_kv
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)

from arat_dist.config import ClusterConfig
from arat_dist.errors import ClusterError, StoppedError, UserError

_NAMESPACE = "arat"
_POLL_S = 0.5

logger = logging.getLogger(__name__)


class Stop:
    """The driver's wish that a run ends, as a key in Ray's own store, where the controller sees it.

    Args:
        name: the group's name in Ray.
    """

    def __init__(self, name: str):
        self._key = f"stop/{name}".encode()

    def ask(self) -> None:
        """Wish it."""
        internal_kv._internal_kv_put(self._key, b"1", namespace=_NAMESPACE)  # noqa: SLF001

    def is_asked(self) -> bool:
        """Whether it is wished."""
        return internal_kv._internal_kv_exists(self._key, namespace=_NAMESPACE)  # noqa: SLF001

    def forget(self) -> None:
        """Leave nothing behind in a cluster that goes on."""
        internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)  # noqa: SLF001


class Trainer(TorchTrainer):
    """Ray Train's TorchTrainer with the policies of this file.

    Args:
        work: called on every worker.
        cluster: the group's sizes and time-outs.
        stop: the driver's wish that the run ends.
        ask_to_stop: picklable; called in each worker's process to have the work stop.
        options: of TorchTrainer.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        *,
        cluster: ClusterConfig,
        stop: Stop,
        ask_to_stop: Callable[[], None],
        **options: Any,
    ):
        super().__init__(work, **options)
        self._cluster, self._stop, self._ask_to_stop = cluster, stop, ask_to_stop

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = FixedSize if isinstance(self._cluster.workers, int) else ElasticSize
        parts["scaling_policy"] = policy(self.scaling_config, self._cluster, self._stop)
        parts["failure_policy"] = Failures(cast("Any", self.run_config.failure_config))
        parts["callbacks"] = [*parts["callbacks"], Stopper(self._cluster, self._stop, self._ask_to_stop)]
        return super()._initialize_and_run_controller(**parts)


class Failures(DefaultFailurePolicy):
    """Starts the workers anew after a failure, but not after what the user has to put right."""

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Give up at a UserError, whichever worker met it; else as Ray does."""
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        if any(isinstance(error, UserError) for error in failures.values()):
            return FailureDecision.RAISE
        decision = super().make_decision(cast("Any", training_failed_error))
        if decision is FailureDecision.RETRY and failures:
            rank, error = min(failures.items())
            first_line = str(error).strip().partition("\n")[0]
            logger.warning("worker %d failed (%s); the workers are started anew", rank, first_line)
        return decision


class _Patience(ScalingPolicy):
    """Waits for room no longer than it may, and has the group leave machines that are about to go."""

    def __init__(self, scaling_config: Any, cluster: ClusterConfig, stop: Stop):
        super().__init__(scaling_config)
        self._cluster, self._stop = cluster, stop
        self._waits_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """As Ray does, until the time is over.

        Raises:
            ClusterError: there was no room for cluster.start_timeout_s.
            StoppedError: the driver doesn't want it any more.
        """
        if self._stop.is_asked():
            raise StoppedError(None)
        self._waits_since = self._waits_since or time.monotonic()
        if time.monotonic() - self._waits_since > self._cluster.start_timeout_s:
            raise ClusterError(no_room(self._cluster))
        decision = super().make_decision_for_non_running_worker_group()  # pyright: ignore[reportAbstractUsage]
        if isinstance(decision, NoopDecision):
            time.sleep(_POLL_S)  # Ray would ask again without a pause
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """As Ray does; but where a machine of the group is about to go, the group starts anew without it."""
        self._waits_since = None
        leaving = draining_nodes() & {worker.metadata.node_id for worker in worker_group_state.workers}
        if leaving:
            logger.warning("%d of the machines are to go; the workers stop and start anew elsewhere", len(leaving))
            return ResizeDecision(self._size_without(leaving, worker_group_state), self._worker_resources)
        decision = super().make_decision_for_running_worker_group(  # pyright: ignore[reportAbstractUsage]
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision):
            before, after = worker_group_state.num_workers, decision.num_workers
            logger.warning("room for %d workers, not %d; they stop and start anew in the other size", after, before)
        return decision

    def _size_without(self, leaving: set[str], worker_group_state: Any) -> int:
        """Workers to go on with when some nodes have gone."""
        if isinstance(self._cluster.workers, int):
            return self._cluster.workers
        stay = sum(worker.metadata.node_id not in leaving for worker in worker_group_state.workers)
        return max(self._cluster.min_workers, stay)

    @property
    def _worker_resources(self) -> dict[str, float]:
        return cast("Any", self.scaling_config)._resources_per_worker_not_none  # noqa: SLF001


class FixedSize(_Patience, FixedScalingPolicy):
    """A group of one size."""


class ElasticSize(_Patience, ElasticScalingPolicy):
    """A group as large as there is room, between the least and the largest size."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """As Ray does, but Ray's figures are up to 20 s old and know nothing of machines that are about to go."""
        here = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining_nodes()
        rooms = {node: room for node, room in reserved_resources.items() if node in here}
        if self._cluster.placement == "strict_spread":
            one = self._worker_resources
            rooms = {node: {key: min(room.get(key, 0), one[key]) for key in one} for node, room in rooms.items()}
        return super()._count_possible_workers(rooms)


class Stopper(WorkerGroupCallback, ControllerCallback):
    """Asks the workers to stop: because the driver wants it, or before the group is started anew in another size."""

    def __init__(self, cluster: ClusterConfig, stop: Stop, ask_to_stop: Callable[[], None]):
        self._patience_s = max(cluster.start_timeout_s, cluster.step_timeout_s)
        self._stop, self._ask_to_stop = stop, ask_to_stop
        self._group: Any = None
        self._asked = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Take note of the group."""
        self._group, self._asked = worker_group, False

    def before_worker_group_shutdown(self, worker_group: Any) -> None:  # noqa: ARG002
        """Forget the group."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:  # noqa: ARG002
        """Pass on the driver's wish, once."""
        if self._group is not None and not self._asked and self._stop.is_asked():
            self._ask()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
        """Before a resize, have the workers write a checkpoint and return; one that fails is killed as Ray does it."""
        if self._group is None or not isinstance(current_state, ResizingState):
            return
        self._ask()
        deadline = time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            status = self._group.poll_status(timeout=_POLL_S)
            if status.finished or status.errors:
                return
            time.sleep(_POLL_S)

    def _ask(self) -> None:
        self._asked = True
        self._group.execute_async(self._ask_to_stop)


def draining_nodes() -> set[str]:
    """Ids of the nodes of which Ray has been told that they are about to go."""
    return set(state.get_draining_nodes())


def no_room(cluster: ClusterConfig) -> str:
    """One line on what the workers would have needed and what is there."""
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.num_gpus}
    free, total = ray.available_resources(), ray.cluster_resources()
    each = " and ".join(f"{count} {name}" for name, count in wanted.items() if count)
    there = ", ".join(
        f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}" for name, count in wanted.items() if count
    )
    return (
        f"cluster.workers: {cluster.min_workers}: of {each} each (placement {cluster.placement}): no room for them in "
        f"{cluster.start_timeout_s:g} s (cluster.start_timeout_s); free are {there}; fewer workers, a longer wait or "
        "more machines would be right"
    )
