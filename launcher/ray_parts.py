"""What this package uses of Ray beyond its public interface, and whether this Ray has it."""

from __future__ import annotations

import importlib
from functools import reduce

from arat_dist.errors import UserError

TRIED = "2.60.0"
"""The version of Ray that everything here was tested with."""

# A hook that Ray calls by another name would never be called, and a method that it no longer asks never be asked: the
# run would go on, deaf to SIGTERM and to leaving machines. So what is overridden is in the list as well.
PARTS = (
    "ray._private.state:state.get_draining_nodes",
    "ray._private.state:state.get_max_resources_from_cluster_config",
    "ray.experimental.internal_kv:_internal_kv_put",
    "ray.experimental.internal_kv:_internal_kv_exists",
    "ray.experimental.internal_kv:_internal_kv_del",
    "ray.train:ScalingConfig._resources_per_worker_not_none",
    "ray.train.torch:TorchTrainer._initialize_and_run_controller",
    "ray.train.torch.config:_TorchBackend.on_start",
    "ray.train.torch.config:_set_torch_distributed_env_vars",
    "ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE",
    "ray.train.v2._internal.execution.callback:ControllerCallback.after_controller_state_update",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_start",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_poll_status",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.before_worker_group_shutdown",
    "ray.train.v2._internal.execution.controller.state:ResizingState",
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy.make_decision",
    "ray.train.v2._internal.execution.failure_handling:FailureDecision.RAISE",
    "ray.train.v2._internal.execution.failure_handling:FailureDecision.RETRY",
    "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy._count_possible_workers",
    "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy",
    "ray.train.v2._internal.execution.scaling_policy:NoopDecision",
    "ray.train.v2._internal.execution.scaling_policy:ResizeDecision",
    "ray.train.v2._internal.execution.scaling_policy:ScalingPolicy.make_decision_for_non_running_worker_group",
    "ray.train.v2._internal.execution.scaling_policy:ScalingPolicy.make_decision_for_running_worker_group",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute_async",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.poll_status",
)
"""As module:attribute, or module:class.method."""


def check_parts() -> None:
    """Refuse a Ray that lacks any of it, in one line (UserError)."""
    missing = [part for part in PARTS if not _is_there(part)]
    if missing:
        import ray

        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"ray: {ray.__version__}: lacks {missing[0].replace(':', '.')}{more}; ray=={TRIED} would be right"
        )


def _is_there(part: str) -> bool:
    module, _, path = part.partition(":")
    try:
        reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True
