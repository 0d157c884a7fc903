"""Ray Train around the loop: the same function on any number of workers, or in this process without Ray."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from arat_dist.checkpoint import checkpoint_names
from arat_dist.config import (
    ARRESTConfig,
    AttackConfig,
    ClusterConfig,
    DataConfig,
    LBGATConfig,
    ModelConfig,
    Recipe,
    StandardConfig,
)
from arat_dist.data import staging
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import Rank
from arat_dist.errors import UserError, WorkersError
from arat_dist.preflight import check_recipe
from arat_dist.run import Run
from arat_dist.storage import Storage, absolute_path
from arat_dist.targets import export_run
from arat_dist.tracking import Follower, Mirror, tracking_uri
from arat_dist.train import num_steps, train
from launcher.progress import TrainingProgress

# Read by Ray when it is imported or starts: nothing phones home, and nobody joins without the token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Nothing here reacts to a notice of preemption yet, and Ray 2.60's watcher begins each run with an error line.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# What workers say is little, and Ray would explain its folding of equal lines at length.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnLine = Callable[[dict[str, Any]], None]

# Nothing but a recipe goes through Ray's object store; its default is 30 % of the machine's memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_TIMEOUT_S = 1800
"""How long a collective waits for all ranks: Ray's own value."""
_COPYING_S = 6 * 3600
"""The same where data is copied to each machine's disk: who is done waits for who still copies."""


def fit(recipe: Recipe, name: str, on_line: OnLine | None = None) -> dict[str, Any]:
    """Train a recipe under a name, or go on with the unfinished run of that name; returns the summary.

    A finished run is left as it is.

    Args:
        recipe: the resolved recipe.
        name: the run's folder under cluster.storage.
        on_line: gets every line of metrics.jsonl as it comes, in a thread of its own; default: a progress bar.

    Raises:
        UserError: something that the user gave can't work; nothing was started or written.
    """
    began = time.perf_counter()
    run = Run(recipe.cluster.storage, name)
    if summary := run.summary():
        return summary
    check_recipe(recipe.without_start() if checkpoint_names(run.checkpoints) else recipe)
    uri = tracking_uri(recipe, run)
    start = clean_start(recipe, run)
    run.open(recipe, load_manifest(recipe.data.train).sha256)
    with run.locked():
        started = trained_start(recipe, *start, on_line) if start else recipe
        mirror = Mirror(run, recipe, uri) if uri else None
        trained = _train(started, run, mirror, on_line)
    summary = {
        "name": name,
        "recipe_sha256": recipe.sha256(),
        "objective": recipe.objective.name,
        "model": recipe.model.name,
        **trained,
        "wall_s": round(time.perf_counter() - began, 1),
        "mlflow_tracking_uri": uri,
        "mlflow_run_id": mirror.run_id if mirror else None,
        "restarts": run.num_attempts() - 1,
    }
    run.finish(summary)
    return summary


def clean_start(recipe: Recipe, run: Run) -> tuple[Recipe, Run] | None:
    """What has to be trained before a run, as RUN-clean: the start of ARREST, where the recipe names none.

    Returns:
        The recipe and the run, or None where nothing is missing.

    Raises:
        UserError: it can't be trained, or the name is another run's.
    """
    objective, model = recipe.objective, recipe.model
    if not isinstance(objective, ARRESTConfig) or model.pretrained or model.checkpoint is not None:
        return None
    if checkpoint_names(run.checkpoints):
        return None
    if not run.storage.is_local:
        raise UserError(
            f"model.checkpoint: missing: with cluster.storage {recipe.cluster.storage}, clean-trained weights in "
            "a file would be right"
        )
    clean, clean_run = clean_recipe(recipe, objective), Run(recipe.cluster.storage, f"{run.name}-clean")
    clean_run.check(clean)
    check_recipe(clean)
    return clean, clean_run


def clean_recipe(recipe: Recipe, objective: ARRESTConfig) -> Recipe:
    """The same net, data and optimizer on clean pictures, as long as the objective says; schedules in proportion."""
    share = objective.clean_epochs / recipe.train.epochs
    milestones = tuple(share * milestone for milestone in recipe.optim.milestones)
    sizes = tuple((share * begin, side) for begin, side in recipe.data.image_sizes_from)
    schedule = {"milestones": milestones, "warmup_epochs": share * recipe.optim.warmup_epochs}
    length = {"epochs": objective.clean_epochs, "ema_decay": None, "swa_start_epoch": None}
    return recipe.model_copy(
        update={
            "objective": StandardConfig(name="standard", label_smoothing=objective.label_smoothing),
            "attack": AttackConfig(norm=recipe.attack.norm, eps=recipe.attack.eps),
            "optim": recipe.optim.model_copy(update=schedule),
            "train": recipe.train.model_copy(update=length),
            "data": recipe.data.model_copy(update={"image_sizes_from": sizes}),
        }
    )


def trained_start(recipe: Recipe, clean: Recipe, run: Run, on_line: OnLine | None) -> Recipe:
    """The recipe with the weights of its clean start, which is trained first unless it is there."""
    fit(clean, run.name, on_line)
    exported = export_run(run, Path(run.folder.uri) / "export")
    start = recipe.model.model_copy(update={"checkpoint": str(exported.folder / "model.safetensors")})
    return recipe.model_copy(update={"model": start})


def _train(recipe: Recipe, run: Run, mirror: Mirror | None, on_line: OnLine | None) -> dict[str, Any]:
    """Train on the workers while their metrics are shown and mirrored; what `train` returns."""
    trained: dict[str, Any] = {}
    shown = max((line["step"] for line in run.metrics()), default=0)
    bar = TrainingProgress(f"{run.name} ({recipe.objective.name})", num_steps(recipe), shown)
    try:
        with nullcontext(on_line) if on_line else bar as show, Follower(run, show):
            if mirror:
                mirror.start()
            work = partial(train, with_absolute_paths(recipe), Run(run.storage.uri, run.name))
            trained = run_workers(work, recipe.cluster, run.name, recipe.data)
    finally:
        if mirror:
            mirror.finish(trained)
    return trained


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


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as workers need it: their working directory is their own."""

    def absolute(model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"checkpoint": model.checkpoint and absolute_path(model.checkpoint)})

    paths = {"train": absolute_path(recipe.data.train), "val": absolute_path(recipe.data.val)}
    objective = recipe.objective
    if isinstance(objective, LBGATConfig) and objective.teacher is not None:
        objective = objective.model_copy(update={"teacher": absolute(objective.teacher)})
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update=paths), "model": absolute(recipe.model), "objective": objective}
    )


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
