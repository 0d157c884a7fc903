"""Checkpoints: written whole or not at all, verified before use, the newest good one found.

A folder checkpoints/step_00001234/ holds model.safetensors (the objective: net, predictors, balance), ema.safetensors
(the net's averaged weights, if kept), optimizer.pt (read with weights_only=True) and manifest.json (the step and each
file's SHA-256), which is written last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from arat_dist.storage import Storage

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Everything else (sample order, augmentation, attack starts, dropout, learning rate) is a function of the recipe and
    the step.
    """

    step: int
    """Steps done."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """State dicts by name: "model" is the objective's, "ema" the averaged classifier's."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The optimizer's state dict; empty when it was not asked for."""


def save_checkpoint(folder: Storage, checkpoint: Checkpoint, *, keep: int) -> str:
    """Write a checkpoint into the folder of all, then delete those before it but `keep - 1`; returns its name."""
    name = _name(checkpoint.step)
    target = folder / name
    target.delete(MANIFEST)
    files = {f"{part}.safetensors": _to_safetensors(state) for part, state in checkpoint.weights.items()}
    files["optimizer.pt"] = _to_torch(checkpoint.optimizer)
    for file, content in files.items():
        target.write(file, content)
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    target.write_json(MANIFEST, {"step": checkpoint.step, "sha256": hashes})
    _retire(folder, name, keep - 1)
    return name


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _retire(folder: Storage, newest: str, keep: int) -> None:
    """Delete the checkpoints before `newest` but the last `keep` whole ones: a save that broke off is worth nothing."""
    older = [name for name in checkpoint_names(folder) if name < newest]
    whole = [name for name in older if (folder / name).exists(MANIFEST)]
    kept = whole[max(0, len(whole) - keep) :]
    for name in older:
        if name not in kept:
            folder.delete(name)


def checkpoint_names(folder: Storage) -> list[str]:
    """Names of the checkpoints in a folder, oldest first, whole or not."""
    return [name for name in folder.names() if name.startswith("step_")]


def load_newest(folder: Storage, *, with_optimizer: bool = True) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over."""
    for name in reversed(checkpoint_names(folder)):
        try:
            return load_checkpoint(folder / name, with_optimizer=with_optimizer)
        except DamagedError as error:
            logger.warning("passed over a damaged checkpoint: %s", error)
    return None


class DamagedError(Exception):
    """A checkpoint that is not what its manifest says; names the file."""


def load_checkpoint(folder: Storage, *, with_optimizer: bool = True) -> Checkpoint:
    """Read one checkpoint, every file checked against the manifest (DamagedError)."""
    try:
        manifest = json.loads(folder.read(MANIFEST))
        step, hashes = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.path(MANIFEST)}: {type(error).__name__}") from error
    if not folder.uri.endswith(f"/{_name(step)}"):
        raise DamagedError(f"{folder.path(MANIFEST)}: says step {step}")
    if missing := {"model.safetensors", "optimizer.pt"} - hashes.keys():
        raise DamagedError(f"{folder.path(MANIFEST)}: names no {' and no '.join(sorted(missing))}")
    weights: dict[str, dict[str, Tensor]] = {}
    optimizer: dict[str, Any] = {}
    for file, expected in hashes.items():
        if file == "optimizer.pt" and not with_optimizer:
            continue
        content = _read_verified(folder, file, expected)
        if file.endswith(".safetensors"):
            weights[file.removesuffix(".safetensors")] = safetensors.torch.load(content)
        else:
            try:
                optimizer = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise DamagedError(f"{folder.path(file)}: holds more than tensors and plain values") from error
    return Checkpoint(step, weights, optimizer)


def _read_verified(folder: Storage, file: str, expected: str) -> bytes:
    try:
        content = folder.read(file)
    except OSError as error:
        raise DamagedError(f"{folder.path(file)}: {type(error).__name__}") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise DamagedError(f"{folder.path(file)}: SHA-256 is not the manifest's")
    return content


def _to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses strided memory: channels-last weights are stored in plain order.
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _to_torch(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
