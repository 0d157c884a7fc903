"""What an attack does to a few pictures, and to accuracy as eps grows: computed once, then kept in RUN/report/."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from arat_dist.attacks import PGD, Norm
from arat_dist.checkpoint import MANIFEST, checkpoint_names
from arat_dist.config import EvalConfig
from arat_dist.data.loader import Loader, val_loader
from arat_dist.data.manifest import load_manifest
from arat_dist.data.order import spread
from arat_dist.errors import UserError
from arat_dist.evaluate import eval_config
from arat_dist.evaluation.stages import default_batch_size
from arat_dist.losses import cross_entropy
from arat_dist.models.classifier import Classifier
from arat_dist.numerics import evaluation_numerics
from arat_dist.objectives.base import to_pixels
from arat_dist.report.gather import RunRecord
from arat_dist.storage import Storage
from arat_dist.targets import Target, open_target

logger = logging.getLogger(__name__)

CACHE = "report"
STEPS = 20
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""The radii of the curve, as multiples of the run's own."""
_FORMAT = 1

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Attacked:
    """What PGD-20 (uniform start, steps of eps/4) did to some pictures of the validation set.

    samples: int64 [N], indices in the set; labels and clean_predictions like it.
    broken_at: float64 [N], the smallest of `radii` at which the picture is wrong: 0 without an attack, inf where it
        stood them all.
    radii: ascending, without 0, float64 [R]; eps is the run's own.
    shown: int64 [P], positions in the above of the pictures below.
    clean: uint8 [P,H,W,3]; adversarial: float32 [P,H,W,3] in [0,1], attacked at eps.
    adversarial_predictions: int64 [P].
    confidences: float32 [P,2], softmax of the class that is predicted, before and after.
    """

    samples: NDArray[Any]
    labels: NDArray[Any]
    clean_predictions: NDArray[Any]
    broken_at: NDArray[Any]
    radii: NDArray[Any]
    shown: NDArray[Any]
    clean: NDArray[Any]
    adversarial: NDArray[Any]
    adversarial_predictions: NDArray[Any]
    confidences: NDArray[Any]
    norm: Norm
    eps: float
    class_names: tuple[str, ...]

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Radii, 0 first, and the accuracy that is left at each; what broke in a smaller ball is broken in a larger."""
        radii = np.concatenate([[0.0], self.radii])
        return radii, np.array([(self.broken_at > radius).mean() for radius in radii])

    @property
    def is_clean_right(self) -> NDArray[np.bool_]:
        """Bool [N]."""
        return self.broken_at > 0

    @property
    def is_robust(self) -> NDArray[np.bool_]:
        """Bool [N], at eps."""
        return self.broken_at > self.eps


def attack_run(record: RunRecord, *, limit: int, num_shown: int, on_progress: OnProgress) -> Attacked:
    """The attacked pictures of a run, from its cache where the same was asked before.

    Args:
        record: the run.
        limit: number of pictures, evenly spaced over the validation set.
        num_shown: how many of them are kept as pictures, as many that fell as stood where there are both.
        on_progress: called with the number of attacks done and of all.

    Raises:
        UserError: there is no whole checkpoint, or the validation set isn't at hand.
    """
    names = checkpoint_names(record.run.checkpoints)
    if not names:
        raise UserError(f"{record.run.folder.uri}: has no whole checkpoint yet")
    config, folder = eval_config(record.recipe), record.run.folder / CACHE
    asked = {
        "format": _FORMAT,
        # The manifest has the SHA-256 of every file of the checkpoint.
        "checkpoint": _sha256(record.run.checkpoints / names[-1], MANIFEST),
        "limit": limit,
        "shown": num_shown,
        **{key: getattr(config, key) for key in ("norm", "eps", "seed")},
        "steps": STEPS,
        "factors": FACTORS,
        "loader": record.recipe.data.loader,
    }
    name = f"attacked-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.safetensors"
    if (kept := _read(folder, name, record)) is not None:
        return kept
    target = open_target(record.run.folder.uri)
    attacked = attack_target(target, limit=limit, num_shown=num_shown, on_progress=on_progress)
    try:
        _write(folder, name, attacked, load_manifest(target.data.val).sha256)
    except OSError as error:  # a run of somebody else's may be there to read alone
        logger.warning("%s: %s; the next report attacks again", folder.uri, error.strerror or error)
    return attacked


def attack_target(target: Target, *, limit: int, num_shown: int, on_progress: OnProgress) -> Attacked:
    """`attack_run` without the cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, config = target.classifier.to(device).eval(), target.config
    assert config.norm is not None
    assert config.eps is not None
    # A ball of linf 1 holds every picture there is.
    largest = 1.0 if config.norm == "linf" else np.inf
    radii = np.array([factor * config.eps for factor in FACTORS if factor == 1 or factor * config.eps <= largest])
    data, batch_size = target.data.model_copy(update={"stage_to": None}), _batch_size(target, device)
    with evaluation_numerics(), val_loader(data, batch_size) as loader:
        samples = spread(loader.num_samples, min(limit, loader.num_samples))
        num_attacks = len(samples) * len(radii)
        labels, predictions, broken_at = _break(
            net, loader, _batches(samples, batch_size), radii, config, lambda done: on_progress(done, num_attacks)
        )
        shown = choose(broken_at, config.eps, num_shown)
        pictures = _attack_shown(net, loader, _batches(samples[shown], batch_size), config)
    return Attacked(
        samples,
        labels,
        predictions,
        broken_at,
        radii,
        shown,
        *pictures,
        norm=config.norm,
        eps=config.eps,
        class_names=load_manifest(target.data.val).class_names,
    )


def choose(broken_at: NDArray[Any], eps: float, count: int) -> NDArray[np.int64]:
    """Positions of the pictures to show, ascending: as many that the attack broke as that stood, where there are both.

    Evenly spaced among their kind; pictures that were wrong before the attack come last.
    """
    fell = np.flatnonzero((broken_at > 0) & (broken_at <= eps))
    stood = np.flatnonzero(broken_at > eps)
    wrong = np.flatnonzero(broken_at == 0)
    num_fell = min(len(fell), max(count // 2, count - len(stood)))
    num_stood = min(len(stood), count - num_fell)
    num_wrong = min(len(wrong), count - num_fell - num_stood)
    kinds = ((fell, num_fell), (stood, num_stood), (wrong, num_wrong))
    return np.sort(np.concatenate([kind[spread(len(kind), n)] if n else kind[:0] for kind, n in kinds]))


def _break(
    net: Classifier,
    loader: Loader,
    batches: list[NDArray[np.int64]],
    radii: NDArray[np.float64],
    config: EvalConfig,
    report: Callable[[int], None],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Labels, clean predictions and broken_at of some batches: each radius attacks what all smaller ones left right."""
    found, done = [], 0
    device = net.mean.device
    for images, labels, keys in loader.iterate(batches):
        pixels, labels, keys = to_pixels(images.to(device), net.dtype), labels.to(device), keys.to(device)
        predictions = _logits(net, pixels).argmax(1)
        broken_at = torch.where(predictions == labels, torch.inf, 0.0).double()
        for radius in radii:
            left = broken_at.isinf().nonzero().flatten()
            if len(left):
                adversarial = _pgd(net, pixels[left], labels[left], keys[left], float(radius), config)
                fell = _logits(net, adversarial).argmax(1) != labels[left]
                broken_at[left[fell]] = float(radius)
            done += len(labels)
            report(done)
        found.append([each.cpu().numpy().copy() for each in (labels, predictions, broken_at)])
    labels, predictions, broken_at = (np.concatenate(column) for column in zip(*found, strict=True))
    return labels, predictions, broken_at


def _attack_shown(
    net: Classifier, loader: Loader, batches: list[NDArray[np.int64]], config: EvalConfig
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Clean and adversarial pictures of a few samples, predictions after the attack, and confidences."""
    assert config.eps is not None
    device, found = net.mean.device, []
    if not batches:
        nothing = np.empty((0, 0, 0, 3))
        return nothing.astype(np.uint8), nothing.astype(np.float32), np.empty(0, np.int64), np.empty((0, 2), np.float32)
    for images, labels, keys in loader.iterate(batches):
        pixels, labels, keys = to_pixels(images.to(device), net.dtype), labels.to(device), keys.to(device)
        adversarial = _pgd(net, pixels, labels, keys, config.eps, config)
        before, after = (_logits(net, each).softmax(1).max(1) for each in (pixels, adversarial))
        confidences = torch.stack([before.values, after.values], dim=1).float()
        clean = images.permute(0, 2, 3, 1), adversarial.permute(0, 2, 3, 1).float()
        # The loader uses its buffer again.
        found.append([each.cpu().numpy().copy() for each in (*clean, after.indices, confidences)])
    clean, adversarial, predictions, confidences = (np.concatenate(column) for column in zip(*found, strict=True))
    return clean, adversarial, predictions, confidences


def _pgd(net: Classifier, pixels: Tensor, labels: Tensor, keys: Tensor, eps: float, config: EvalConfig) -> Tensor:
    """PGD-20 in a ball of radius eps, on the branch of the attacked pictures."""
    assert config.norm is not None
    attack = PGD(config.norm, eps, eps / 4, STEPS, seed=config.seed)
    with net.branch("adv"):
        return attack(lambda x: cross_entropy(net(x), labels), pixels, keys)


def _logits(net: Classifier, pixels: Tensor) -> Tensor:
    with torch.no_grad(), net.branch("adv"):
        return net(pixels)


def _batch_size(target: Target, device: torch.device) -> int:
    """The target's own, or what suits the device."""
    return target.config.batch_size or default_batch_size(target.data.image_size, device.type)


def _batches(samples: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def _sha256(folder: Storage, name: str) -> str | None:
    return hashlib.sha256(folder.read(name)).hexdigest() if folder.exists(name) else None


_ABOUT = ("norm", "eps", "class_names")


def _write(folder: Storage, name: str, attacked: Attacked, data_sha256: str) -> None:
    values = vars(attacked)
    about = {"data_sha256": data_sha256, **{key: values[key] for key in _ABOUT}}
    arrays = {key: np.ascontiguousarray(value) for key, value in values.items() if key not in _ABOUT}
    folder.write(name, safetensors.numpy.save(arrays, {"about": json.dumps(about)}))


def _read(folder: Storage, name: str, record: RunRecord) -> Attacked | None:
    """What was kept, unless the validation set has changed since; half a file is computed anew."""
    if not folder.exists(name):
        return None
    content = folder.read(name)
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["about"])
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    if record.manifest is not None and about.pop("data_sha256") != record.manifest.sha256:
        return None
    about.pop("data_sha256", None)
    return Attacked(**arrays, **about | {"class_names": tuple(about["class_names"])})
