"""What can be evaluated: a run, an exported folder, or any timm architecture with a weights file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm

from arat_dist.checkpoint import load_newest
from arat_dist.config import ClusterConfig, DataConfig, EvalConfig, ModelConfig, Recipe
from arat_dist.data.manifest import check_beton
from arat_dist.errors import UserError
from arat_dist.evaluate import eval_config
from arat_dist.export import load_exported, read_metadata
from arat_dist.export_onnx import MODEL
from arat_dist.models.backbone import create_backbone, load_checkpoint, pretrained_cfg, with_centre_crop
from arat_dist.models.classifier import Classifier
from arat_dist.objectives import build_objective
from arat_dist.run import RECIPE, Run
from arat_dist.storage import absolute_path

Weights = Literal["raw", "ema", "swa"]

TIMM = "timm:"


@dataclass(frozen=True)
class Target:
    """A net to evaluate, and what is known of how.

    uri: what opens it from any working directory.
    classifier: in evaluation mode, on the CPU.
    cluster: the run's own section; None for a net that no run made.
    data: val is the set to evaluate on.
    config: attack, norm and eps; the latter two None where nothing says them.
    weights: which of a run's; None for a net that no run made.
    run: the run.
    step: steps that its weights were trained for; None for a net that no run made.
    notes: what an export's config.json says of it; empty elsewhere.
    """

    uri: str
    classifier: Classifier
    cluster: ClusterConfig | None
    data: DataConfig
    config: EvalConfig
    weights: Weights | None = None
    run: Run | None = None
    step: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def open_target(target: str, *, weights: Weights | None = None, val: str | None = None) -> Target:
    """Open RUN, EXPORT_DIR or timm:ARCH[:WEIGHTS_FILE].

    Args:
        target: a run's folder, an exported folder, or timm:...
        weights: for a run, which of its weights; default: the averaged ones where it keeps them.
        val: data set to evaluate on; default: the run's own.

    Raises:
        UserError: it is none of the three, or doesn't fit the data.
    """
    if target.startswith(TIMM):
        return _open_timm(target, _needed(val, target))
    if (Path(target) / "config.json").is_file():
        return _open_export(target, _needed(val, target))
    if (Path(target) / MODEL).is_file():
        raise UserError(f"{target}: an ONNX export; the run, or its export as --format timm, would be right")
    try:
        run = Run.at(target)
    except UserError:
        right = f"a run ({RECIPE} in it), an export (config.json in it) or {TIMM}ARCH[:WEIGHTS_FILE] would be right"
        raise UserError(f"{target}: {right}") from None
    recipe = run.recipe()
    data = recipe.data.model_copy(update={"val": absolute_path(val or recipe.data.val)})
    check_classes(data.val, recipe.data.num_classes)
    loaded = load_weights(run, recipe, weights)
    data = with_centre_crop(data, loaded.classifier.backbone)
    config = eval_config(recipe)
    return Target(
        run.folder.uri, loaded.classifier, recipe.cluster, data, config, loaded.weights, run, step=loaded.step
    )


@dataclass(frozen=True)
class Loaded:
    """The net of one checkpoint.

    classifier: in evaluation mode, on the CPU.
    weights: which of the checkpoint's.
    step: steps that it was trained for.
    """

    classifier: Classifier
    weights: Weights
    step: int


def load_run(run: Run, recipe: Recipe, weights: Weights | None = None) -> Classifier:
    """The classifier in a run's newest good checkpoint (UserError: there is none, or it lacks those weights)."""
    return load_weights(run, recipe, weights).classifier


def load_weights(run: Run, recipe: Recipe, weights: Weights | None = None) -> Loaded:
    """The same, with what was loaded: averaged weights where the checkpoint keeps them, unless told."""
    checkpoint = load_newest(run.checkpoints, with_optimizer=False)
    if checkpoint is None:
        raise UserError(f"{run.folder.uri}: has no whole checkpoint yet")
    classifier = build_objective(recipe.without_start()).classifier
    kept: list[Weights] = [name for name in get_args(Weights) if name == "raw" or name in checkpoint.weights]
    chosen = weights or kept[-1]
    if chosen not in kept:
        key = {"ema": "train.ema_decay", "swa": "train.swa_start_epoch"}[chosen]
        raise UserError(f"--weights: {chosen}: {run.folder.uri} keeps none ({key}); {' or '.join(kept)} would be right")
    if chosen != "raw":
        classifier.load_state_dict(checkpoint.weights[chosen])
    else:
        prefix = "classifier."
        state = {k.removeprefix(prefix): v for k, v in checkpoint.weights["model"].items() if k.startswith(prefix)}
        classifier.load_state_dict(state)
    return Loaded(classifier.eval(), chosen, checkpoint.step)


def check_classes(val: str, num_classes: int) -> None:
    """Refuse a data set with another number of classes than the net (UserError)."""
    manifest = check_beton(val)
    if manifest.num_classes != num_classes:
        raise UserError(f"--data: {val}: has {manifest.num_classes} classes, the net has {num_classes}")


def _open_export(folder: str, val: str) -> Target:
    metadata = read_metadata(folder)
    config = EvalConfig(norm=metadata.get("norm"), eps=metadata.get("eps"))
    return replace(_bare_target(absolute_path(folder), load_exported(folder), val, config), notes=metadata)


def _open_timm(target: str, val: str) -> Target:
    name, _, file = target.removeprefix(TIMM).partition(":")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    backbone = create_backbone(
        ModelConfig(name=name, pretrained=not file),
        # A head of another size would be a random one.
        num_classes=known.num_classes if known and not file else check_beton(val).num_classes,
        image_size=known.input_size[-1] if known else 224,
    )
    if file:
        load_checkpoint(backbone, file, new_head=False)
    cfg = pretrained_cfg(backbone)
    uri = f"{TIMM}{name}" + (f":{absolute_path(file)}" if file else "")
    return _bare_target(uri, Classifier(backbone, cfg["mean"], cfg["std"]).eval(), val, EvalConfig())


def _bare_target(uri: str, classifier: Classifier, val: str, config: EvalConfig) -> Target:
    """A net without a recipe: picture size and crop as timm notes them."""
    cfg = pretrained_cfg(classifier.backbone)
    num_classes = int(classifier.backbone.num_classes)  # pyright: ignore[reportArgumentType]
    check_classes(val, num_classes)
    val = absolute_path(val)
    data = DataConfig(
        train=val, val=val, num_classes=num_classes, image_size=cfg["input_size"][-1], val_crop=cfg["crop_pct"]
    )
    return Target(uri, classifier, None, data, config)


def _needed(val: str | None, target: str) -> str:
    if val is None:
        raise UserError(f"--data: missing: {target} doesn't say what to evaluate on; FILE.beton would be right")
    return val
