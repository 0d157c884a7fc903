"""The hand-off: a trained net as a plain timm checkpoint that `timm.create_model("local-dir:FOLDER")` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, save_for_hf
from torch import Tensor

from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.models.backbone import create_backbone, pretrained_cfg
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode, fold_branch

METADATA_KEY = "arat_dist"
"""Key of our own notes in config.json; timm ignores keys at the top level, but not those inside pretrained_cfg."""

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference between the logits of a net and of its export, in float32."""


def export_timm(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    num_classes: int,
    image_size: int,
    out_dir: str | Path,
    class_names: Sequence[str] | None,
    metadata: Mapping[str, Any],
    *,
    crop_pct: float | None = None,
) -> Path:
    """Write the adv branch of a trained Classifier as a folder that timm loads, whole or not at all.

    Args:
        state: the Classifier's state dict, split or not.
        model: the backbone it was built from.
        num_classes: number of logits.
        image_size: side of the square pictures that it was trained on, in pixels.
        out_dir: the folder; an earlier export in it is replaced.
        class_names: name of each class, in the order of the logits; None where they are not known.
        metadata: JSON-ready notes, kept in config.json under "arat_dist".
        crop_pct: side of the centre crop that the net was evaluated on, as a fraction; default: timm's.

    Returns:
        The folder.

    Raises:
        UserError: out_dir holds something that isn't an export, or class_names are not num_classes.
    """
    out_dir = Path(out_dir).resolve()
    _check_target(out_dir)
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"class_names: {len(class_names)} names; {num_classes}, one per logit, would be right")
    backbone = create_backbone(
        model.model_copy(update={"pretrained": False}), num_classes=num_classes, image_size=image_size
    )
    plain = fold_branch(state)
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in plain.items()})

    cfg = pretrained_cfg(backbone)
    data_config = {
        "input_size": (3, image_size, image_size),
        "mean": model.mean or cfg["mean"],
        "std": model.std or cfg["std"],
        "interpolation": cfg["interpolation"],
        "crop_pct": crop_pct or cfg["crop_pct"],
    }
    top_level: dict[str, Any] = {METADATA_KEY: {**metadata, **_requirement(model.name)}}
    if class_names is not None:
        top_level["label_names"] = list(class_names)
    if not model.pretrained:
        # What timm notes on the origin of its own weights doesn't hold for weights that never were timm's.
        top_level["pretrained_cfg"] = dict.fromkeys(("tag", "license", "origin_url"))

    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out_dir}: {error.strerror}: a folder that can be written would be right") from error
    save_for_hf(backbone, str(temporary), model_config=top_level, safe_serialization=True, data_config=data_config)
    # safetensors keeps its files from everyone but their owner; an export is as readable as its folder.
    (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode)
    _replace(out_dir, temporary)
    return out_dir


def verify_export(out_dir: str | Path, classifier: Classifier) -> float:
    """Load an export by timm alone and compare it with the net that it came from, on random pixels.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RuntimeError: it is above MAX_LOGIT_DIFFERENCE.
    """
    exported = load_exported(out_dir).to(classifier.mean.device, classifier.dtype)
    side = pretrained_cfg(exported.backbone)["input_size"][-1]
    pixels = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(classifier.mean.device, classifier.dtype)
    with torch.no_grad(), AttackMode(classifier)("running"), classifier.branch("adv"):
        difference = (classifier(pixels) - exported.eval()(pixels)).abs().max().item()
    # Written so that a NaN fails too.
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise RuntimeError(f"{out_dir}: the exported net's logits differ by {difference:g} from the trained net's")
    return difference


def load_exported(out_dir: str | Path) -> Classifier:
    """An exported folder as a Classifier that takes pixels in [0,1]: one branch, no taps, evaluation mode.

    Raises:
        UserError: the folder holds no timm checkpoint.
    """
    if not (Path(out_dir) / "config.json").is_file():
        raise UserError(f"{out_dir}: no config.json in it; a folder written by arat export would be right")
    try:
        backbone = timm.create_model(f"local-dir:{out_dir}", pretrained=True)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{out_dir}: timm can't load it: {' '.join(str(error).split())[:200]}") from error
    cfg = pretrained_cfg(backbone)
    return Classifier(backbone, cfg["mean"], cfg["std"]).eval()


def _check_target(out_dir: Path) -> None:
    """Refuse (UserError) to write over anything but an empty folder or an earlier export."""
    if out_dir.is_dir() and (not any(out_dir.iterdir()) or _is_export(out_dir)):
        return
    if out_dir.exists():
        raise UserError(f"{out_dir}: exists and is no earlier export; a new or empty folder would be right")


def _is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_timm`."""
    try:
        return METADATA_KEY in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _requirement(name: str) -> dict[str, str]:
    """What has to be imported before timm knows the architecture, if anything."""
    ours = model_entrypoint(name).__module__.startswith("arat_dist.")
    return {"requires": "arat_dist.models"} if ours else {}


def loading_code(out_dir: str | Path) -> str:
    """The Python that loads an export."""
    requires = read_metadata(out_dir).get("requires")
    return (f"import {requires}; " if requires else "") + f"timm.create_model('local-dir:{out_dir}', pretrained=True)"


def _replace(target: Path, source: Path) -> None:
    """Put a finished folder in the place of an earlier one; a crash leaves one of the two whole."""
    if target.exists():
        old = target.with_name(f".{target.name}.old.{os.getpid()}")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)


def read_metadata(out_dir: str | Path) -> dict[str, Any]:
    """Our own notes in an exported folder's config.json; empty where timm's own tools wrote it."""
    return json.loads((Path(out_dir) / "config.json").read_text()).get(METADATA_KEY, {})
