"""Checkpoints: written whole or not at all, verified before use, the newest good one found.

A folder checkpoints/step_00001234/ holds model.safetensors (the objective: net, predictors, balance), ema.safetensors
and swa.safetensors (the net's averaged weights, if kept), optimizer.pt (read with weights_only=True),
progress.safetensors (what each rank has of its own), about.json (what is known of the run and of the weights) and
manifest.json (the step and each file's SHA-256), which is written last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from arat_dist.storage import Storage

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ABOUT = "about.json"
_NEEDED = {"model.safetensors", "optimizer.pt", "progress.safetensors", ABOUT}


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
    progress: Mapping[str, Tensor] = field(default_factory=dict)
    """Small tensors with a row for each rank, [world_size, ...]: running statistics, the sums of an unfinished line."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: hash of the run's recipe, its run in MLflow, the accuracies of the weights, counts of the log."""

    @property
    def robust_accuracy(self) -> float | None:
        """Of an evaluation in the course of training; None if these weights had none."""
        return self.about.get("robust_accuracy")


def save_checkpoint(
    folder: Storage, checkpoint: Checkpoint, *, keep: int, check: Callable[[], None] = lambda: None
) -> str:
    """Write a checkpoint into the folder of all, then delete those before it but `keep - 1` and the best.

    What is there stays until the new one is whole: a save that breaks off, on a full disk for example, takes away what
    it has written and nothing else.

    Args:
        folder: of all checkpoints of the run.
        checkpoint: what to write.
        keep: newest ones that are kept; besides, the one with the best robust accuracy is.
        check: called before each file; what it raises ends the save.

    Returns:
        Its name.

    Raises:
        OSError: it can't be written.
    """
    name = checkpoint_name(checkpoint.step)
    target = folder / name
    check()
    target.delete(MANIFEST)
    files = {f"{part}.safetensors": _to_safetensors(state) for part, state in checkpoint.weights.items()}
    files["optimizer.pt"] = _to_torch(checkpoint.optimizer)
    files["progress.safetensors"] = _to_safetensors(checkpoint.progress)
    files[ABOUT] = json.dumps(checkpoint.about, indent=2).encode() + b"\n"
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    try:
        for file, content in files.items():
            check()
            target.write(file, content)
        check()
        target.write_json(MANIFEST, {"step": checkpoint.step, "sha256": hashes})
    except OSError:
        check()  # the folder may be another process's by now
        folder.delete(name)
        raise
    try:
        check()
        _retire(folder, name, keep - 1)
    except OSError as error:  # the next save tries again; this one is whole
        logger.warning("%s: older checkpoints can't be retired now: %s", folder.uri, error)
    return name


def checkpoint_name(step: int) -> str:
    """Name of the folder of a checkpoint after so many steps."""
    return f"step_{step:08d}"


def _retire(folder: Storage, newest: str, keep: int) -> None:
    """Delete what lies before `newest`, broken-off saves too, but the last `keep` whole ones and the best."""
    older = [name for name in checkpoint_names(folder) if name < newest]
    whole = [name for name in older if (folder / name).exists(MANIFEST)]
    kept = {*whole[max(0, len(whole) - keep) :], best_checkpoint(folder)}
    for name in older:
        if name not in kept:
            folder.delete(name)


def best_checkpoint(folder: Storage) -> str | None:
    """Name of the checkpoint with the best robust accuracy, the newest of equals; None where none was measured.

    Raises:
        OSError: one can't be read now; it may be the best.
    """
    scores = {name: about.get("robust_accuracy") for name, about in _abouts(folder)}
    measured = [(score, name) for name, score in scores.items() if score is not None]
    return max(measured)[1] if measured else None


def newest_about(folder: Storage) -> dict[str, Any]:
    """What the newest checkpoint knows of the run and its weights; its other files aren't looked at (OSError)."""
    return next((about for _, about in _abouts(folder)), {})


def _abouts(folder: Storage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and plain values of the checkpoints, newest first, but for damaged ones; OSError: not to be read now."""
    for name in reversed(checkpoint_names(folder)):
        try:
            hashes = _read_manifest(folder / name)[1]
            about = json.loads(_read_verified(folder / name, ABOUT, hashes.get(ABOUT, "")))
        except DamagedError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from error
            continue
        yield name, about


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
    step, hashes = _read_manifest(folder)
    if not folder.uri.endswith(f"/{checkpoint_name(step)}"):
        raise DamagedError(f"{folder.path(MANIFEST)}: says step {step}")
    if missing := _NEEDED - hashes.keys():
        raise DamagedError(f"{folder.path(MANIFEST)}: names no {' and no '.join(sorted(missing))}")
    weights: dict[str, dict[str, Tensor]] = {}
    optimizer: dict[str, Any] = {}
    progress: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for file, expected in hashes.items():
        if file == "optimizer.pt" and not with_optimizer:
            continue
        content = _read_verified(folder, file, expected)
        if file == ABOUT:
            about = json.loads(content)
        elif file == "progress.safetensors":
            progress = safetensors.torch.load(content)
        elif file.endswith(".safetensors"):
            weights[file.removesuffix(".safetensors")] = safetensors.torch.load(content)
        else:
            try:
                optimizer = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise DamagedError(f"{folder.path(file)}: holds more than tensors and plain values") from error
    return Checkpoint(step, weights, optimizer, progress, about)


def _read_manifest(folder: Storage) -> tuple[int, dict[str, str]]:
    """Step and SHA-256 by file (DamagedError)."""
    try:
        manifest = json.loads(folder.read(MANIFEST))
        return int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"{folder.path(MANIFEST)}: {type(error).__name__}") from error


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
