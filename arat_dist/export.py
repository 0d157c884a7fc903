"""The hand-off: a trained net as a plain timm checkpoint that `timm.create_model("local-dir:FOLDER")` loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, save_for_hf
from torch import Tensor, nn

from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.models.backbone import create_backbone, pretrained_cfg
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode, fold_branch

METADATA_KEY = "arat_dist"
"""Key of our own notes in config.json; timm ignores keys at the top level, but not those inside pretrained_cfg."""

NOTES = ("config.json", "model.json")
"""Files that may hold them: beside a timm checkpoint, and beside model.onnx."""

OWN_NETS = "arat_dist.models"
"""What has to be imported before timm knows the nets that are registered here."""

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference between the logits of a net and of its export, in float32."""


@contextmanager
def new_folder(out_dir: str | Path) -> Iterator[Path]:
    """A folder to write an export into, under a name of its own: it takes out_dir's place when the context ends well.

    An earlier export in out_dir is replaced; it stays if anything fails, and nothing of the new one does.

    Raises:
        UserError: out_dir holds something that isn't an export, or can't be written.
    """
    if re.match(r"[a-z0-9]+:/", str(out_dir)):
        raise UserError(f"{out_dir}: a folder of this machine would be right")
    out_dir = Path(out_dir).resolve()
    _check_target(out_dir)
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out_dir}: {error.strerror}: a folder that can be written would be right") from error
    try:
        yield temporary
        _replace(out_dir, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plain_net(state: Mapping[str, Tensor], model: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The adv branch of a trained Classifier as the plain timm net, in evaluation mode on the CPU.

    Args:
        state: the Classifier's state dict, split or not.
        model: the backbone it was built from.
        num_classes: number of logits.
        image_size: side of the square pictures that it was trained on, in pixels.
    """
    backbone = create_backbone(
        model.model_copy(update={"pretrained": False}), num_classes=num_classes, image_size=image_size
    )
    plain = fold_branch(state)
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in plain.items()})
    return backbone.eval()


@dataclass(frozen=True)
class Handover:
    """What whoever loads a net has to know beside its weights.

    num_classes: number of logits.
    image_size: side of the square pictures, in pixels.
    mean, std: of the pixels in [0,1] per channel.
    interpolation, crop_pct: how pictures of another size come to it, as timm understands it.
    class_names: name of each class, in the order of the logits; None where they are not known.
    metadata: JSON-ready notes, kept under "arat_dist".
    """

    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    class_names: Sequence[str] | None
    metadata: Mapping[str, Any]


def handover(
    backbone: nn.Module,
    model: ModelConfig,
    image_size: int,
    class_names: Sequence[str] | None,
    metadata: Mapping[str, Any],
    *,
    crop_pct: float | None = None,
) -> Handover:
    """What a recipe says of its net, and timm where it doesn't.

    Raises:
        UserError: not as many class_names as logits.
    """
    num_classes: Any = backbone.num_classes
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"class_names: {len(class_names)} names; {num_classes}, one per logit, would be right")
    cfg = pretrained_cfg(backbone)
    return Handover(
        num_classes,
        image_size,
        model.mean or cfg["mean"],
        model.std or cfg["std"],
        cfg["interpolation"],
        crop_pct or cfg["crop_pct"],
        class_names,
        metadata,
    )


def write_timm(folder: Path, backbone: nn.Module, model: ModelConfig, about: Handover) -> None:
    """Write model.safetensors and config.json, which `timm.create_model` loads, from a hub too."""
    data_config = {
        "input_size": (3, about.image_size, about.image_size),
        "mean": about.mean,
        "std": about.std,
        "interpolation": about.interpolation,
        "crop_pct": about.crop_pct,
    }
    requires = {"requires": OWN_NETS} if is_own_net(model.name) else {}
    top_level: dict[str, Any] = {METADATA_KEY: {**about.metadata, **requires}}
    if about.class_names is not None:
        top_level["label_names"] = list(about.class_names)
    if not model.pretrained:
        # What timm notes on the origin of its own weights doesn't hold for weights that never were timm's.
        top_level["pretrained_cfg"] = dict.fromkeys(("tag", "license", "origin_url"))
    save_for_hf(backbone, str(folder), model_config=top_level, safe_serialization=True, data_config=data_config)
    # safetensors keeps its files from everyone but their owner; an export is as readable as its folder.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


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
    """Whether a folder was written by `arat export`."""
    return any(METADATA_KEY in _read_notes(folder / name) for name in NOTES)


def _read_notes(file: Path) -> Mapping[str, Any]:
    """A JSON object; empty where the file isn't there or is none."""
    try:
        notes = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def is_own_net(name: str) -> bool:
    """Whether an architecture is one that this project registers, so that timm alone doesn't know it."""
    return model_entrypoint(name.partition(".")[0]).__module__.startswith("arat_dist.")


def loading_code(out_dir: str | Path) -> str:
    """The Python that loads an export."""
    if not (Path(out_dir) / "config.json").is_file():
        return f"onnxruntime.InferenceSession('{out_dir}/model.onnx')"
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
