"""Ray Train around the loop: the same function on any number of workers, or in this process without Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from arat_dist.checkpoint import checkpoint_names, load_newest
from arat_dist.config import (
    ARRESTConfig,
    AttackConfig,
    LBGATConfig,
    ModelConfig,
    Recipe,
    StandardConfig,
)
from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError
from arat_dist.export_run import export_run
from arat_dist.mirror import Follower, Mirror
from arat_dist.preflight import check_recipe
from arat_dist.run import Run
from arat_dist.storage import absolute_path
from arat_dist.tracking import Replica, tracking_uri, without_password
from arat_dist.train import num_steps, train
from launcher.cluster import run_workers, stop_on_sigterm
from launcher.progress import TrainingProgress

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnLine = Callable[[dict[str, Any]], None]


def fit(
    recipe: Recipe, name: str, on_line: OnLine | None = None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train a recipe under a name, or go on with the unfinished run of that name; returns the summary.

    A finished run is left as it is.

    Args:
        recipe: the resolved recipe.
        name: the run's folder under cluster.storage.
        on_line: gets every line of metrics.jsonl as it comes, in a thread of its own; default: a progress bar.
        stop: asks it to stop once it is set; default: SIGTERM does.

    Raises:
        UserError: something that the user gave can't work; mostly nothing was started or written.
        StoppedError: it was asked to stop; there is a checkpoint to go on from.
    """
    began = time.perf_counter()
    run = Run(recipe.cluster.storage, name)
    if summary := run.summary():
        return summary
    check_recipe(recipe.without_start() if checkpoint_names(run.checkpoints) else recipe)
    uri = tracking_uri(recipe, run)
    start = clean_start(recipe, run)
    run.check(recipe)
    # Before anything is written: a second start of a run that is at work must leave its files alone.
    with run.locked():
        if summary := run.summary():  # another process has just come to its end
            return summary
        run.open(recipe, load_manifest(recipe.data.train).sha256)
        started = trained_start(recipe, *start, on_line, stop) if start else recipe
        mirror = Mirror(Replica(run, recipe, uri)) if uri else None
        trained = _train(started, run, mirror, on_line, stop)
        summary = {
            "name": name,
            "recipe_sha256": recipe.sha256(),
            "objective": recipe.objective.name,
            "model": recipe.model.name,
            **trained,
            "wall_s": round(time.perf_counter() - began, 1),
            "mlflow_tracking_uri": uri and without_password(uri),
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
    # Not one that a first save left half way: the workers would begin with weights that nobody has trained.
    if load_newest(run.checkpoints) is not None:
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
            "eval": recipe.eval.model_copy(update={"every": None}),
        }
    )


def trained_start(
    recipe: Recipe, clean: Recipe, run: Run, on_line: OnLine | None, stop: threading.Event | None
) -> Recipe:
    """The recipe with the weights of its clean start, which is trained first unless it is there."""
    fit(clean, run.name, on_line, stop)
    exported = export_run(run, Path(run.folder.uri) / "export", formats=("timm",))
    start = recipe.model.model_copy(update={"checkpoint": str(exported.folder / "model.safetensors")})
    return recipe.model_copy(update={"model": start})


def _train(
    recipe: Recipe, run: Run, mirror: Mirror | None, on_line: OnLine | None, stop: threading.Event | None
) -> dict[str, Any]:
    """Train on the workers while their metrics are shown and mirrored; what `train` returns."""
    trained: dict[str, Any] = {}
    shown = max((line["step"] for line in run.metrics()), default=0)
    bar = TrainingProgress(f"{run.name} ({recipe.objective.name})", num_steps(recipe), shown)
    try:
        with nullcontext(on_line) if on_line else bar as show, Follower(run, show):
            if mirror:
                mirror.start()
            work = partial(train, with_absolute_paths(recipe), Run(run.storage.uri, run.name))
            with nullcontext(stop) if stop else stop_on_sigterm() as asked:
                trained = run_workers(work, recipe.cluster, run.name, asked)
    finally:
        if mirror:
            mirror.finish(trained)
    return trained


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
