"""From a recipe's model section to a timm net with the weights that it starts from, and one line when that can't be."""

from __future__ import annotations

import difflib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

import arat_dist.models.cifar  # noqa: F401  (registers this project's own nets with timm)
from arat_dist.config import DataConfig, ModelConfig
from arat_dist.errors import UserError

logger = logging.getLogger(__name__)

_WRAPPERS = ("normaliz", "attacker.")
"""Beginnings of the keys that wrappers around robust nets have beside the net's."""

RESERVED_ARGS = {
    "num_classes": "data.num_classes",
    "img_size": "data.image_size",
    "pretrained": "model.pretrained",
    "pretrained_cfg": "model.checkpoint, model.mean and model.std",
    "pretrained_cfg_overlay": "model.checkpoint, model.mean and model.std",
    "checkpoint_path": "model.checkpoint",
    "in_chans": "nothing (pictures have 3 channels)",
    "features_only": "nothing (the net is a classifier)",
}
"""Arguments of timm.create_model that model.args may not set, and the key that does."""


def create_backbone(model: ModelConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """The timm net that a recipe names, in training mode; timm's pretrained weights if asked, no local checkpoint.

    Raises:
        UserError: unknown name, arguments that the architecture doesn't take, pretrained weights out of reach.
    """
    cfg = _find_cfg(model.name)
    for key, right in RESERVED_ARGS.items():
        if key in model.args:
            raise UserError(f"model.args: {key}: is set by {right}")
    args: dict[str, Any] = dict(model.args)
    # ViT, Swin and kin fix their size when they are built; the others would not know the argument.
    if cfg.get("fixed_input_size") and tuple(cfg["input_size"][1:]) != (image_size, image_size):
        args["img_size"] = image_size
    try:
        net = timm.create_model(model.name, num_classes=num_classes, **args)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        key = f"model.args: {model.args}" if model.args else f"data.image_size: {image_size}"
        raise UserError(f"{key}: {model.name} can't be built so: {_one_line(error)}") from error
    return _load_pretrained(model, num_classes, args) if model.pretrained else net


def pretrained_cfg(net: nn.Module) -> dict[str, Any]:
    """What timm notes on a net that it built: mean, std, input_size, the classifier's name."""
    return cast("dict[str, Any]", getattr(net, "pretrained_cfg", {}))


def with_centre_crop(data: DataConfig, net: nn.Module) -> DataConfig:
    """A recipe's section with its centre crop filled in: what timm notes on the net, unless the recipe says it."""
    return data if data.val_crop is not None else data.model_copy(update={"val_crop": pretrained_cfg(net)["crop_pct"]})


def load_checkpoint(net: nn.Module, path: str, *, new_head: bool = True) -> None:
    """Load a local weights file in the net's own keys, before norms are split.

    Args:
        net: the net.
        path: .safetensors, or .pth with tensors only.
        new_head: leave out a classifier of another size, for training; False refuses it.

    Raises:
        UserError: no such file, a file that only loads by running code, or weights of another net.
    """
    expected = net.state_dict()
    state = _unwrapped(_read_weights(path), expected, path)
    head = _head_keys(net)
    dropped = {k for k in head if k in expected and (k not in state or state[k].shape != expected[k].shape)}
    if dropped and not new_head:
        raise UserError(f"{path}: its classifier ({', '.join(sorted(dropped))}) has another number of classes")
    if dropped:
        logger.warning("model.checkpoint: %s: its classifier doesn't fit and starts anew: %s", path, sorted(dropped))
    state = {key: value for key, value in state.items() if key not in dropped}
    wrong = [key for key in state if key not in expected or state[key].shape != expected[key].shape]
    wrong += [key for key in expected if key not in state and key not in dropped]
    if wrong:
        raise UserError(f"model.checkpoint: {path}: not the weights of this net; {len(wrong)} differ, as {wrong[0]}")
    net.load_state_dict(state, strict=False)


def _find_cfg(name: str) -> dict[str, Any]:
    """What timm notes on an architecture (UserError if timm doesn't know it, with names that it knows)."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() names them all"
        raise UserError(f"model.name: {name}: timm has no such architecture{hint}")
    try:
        cfg = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"model.name: {name}: {_one_line(error)}") from error
    return cfg.to_dict() if cfg is not None else {}


def _load_pretrained(model: ModelConfig, num_classes: int, args: dict[str, Any]) -> nn.Module:
    """The net with timm's weights, which are downloaded or in the cache (UserError if neither)."""
    try:
        return timm.create_model(model.name, pretrained=True, num_classes=num_classes, **args)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"model.pretrained: true: the weights of {model.name} can't be had ({_one_line(error)}); a network, or a "
            "file in model.checkpoint, would be right"
        ) from error


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, out of the usual wrappings; never runs code from it."""
    if not Path(path).is_file():
        raise UserError(f"model.checkpoint: {path}: no such file")
    try:
        state = load_state_dict(path, device="cpu", weights_only=True)
    except (EOFError, KeyError, OSError, RuntimeError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.checkpoint: {path}: can't be read as plain weights (.safetensors, or .pth with tensors only): "
            f"{_one_line(error)}"
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.checkpoint: {path}: holds more than named tensors; a state dict would be right")
    return state


def _unwrapped(state: dict[str, Tensor], expected: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The net's own part of a file in which a wrapper that normalises the pixels, or attacks, has its keys too.

    Args:
        state: what the file holds.
        expected: the net's state dict.
        path: the file's.
    """
    first = next(iter(expected))
    for prefix in sorted({key.removesuffix(first) for key in state if key.endswith(first)}, key=len):
        rest = [key for key in state if key.removeprefix(prefix) not in expected or not key.startswith(prefix)]
        is_whole = all(prefix + key in state for key in expected)
        if is_whole and (prefix or all(key.startswith(_WRAPPERS) for key in rest)):
            if rest:
                logger.info("%s: %d entries are not the net's and are left out, as %s", path, len(rest), rest[0])
            return {key: state[prefix + key] for key in expected}
    return state


def _head_keys(net: nn.Module) -> set[str]:
    """State-dict keys of the classifier layers."""
    names = pretrained_cfg(net).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def _one_line(error: Exception) -> str:
    """The first line of a library's error."""
    return " ".join(str(error).split())[:200]
