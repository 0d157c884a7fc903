"""Common corruptions (Hendrycks & Dietterich 2019, arXiv 1903.12261), by the library imagecorruptions.

The fifteen of ImageNet-C and its four extra ones, at five severities each. What is random in a corruption is a function
of the seed, the corruption and the picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from arat_dist.errors import UserError
from arat_dist.evaluation.stages import Runner, Samples, Stage, pixels_of
from arat_dist.evaluation.verdicts import Nets, predictions_of

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMON = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen that a mean corruption accuracy is taken over: "all"."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 32
"""Side of the smallest pictures that the library takes, in pixels."""

_OWN_SEED = ("impulse_noise", "glass_blur")
"""They take a seed of their own; the others draw from numpy's global generator, glass_blur from numba's too."""


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, 1 to 5."""

    name: str
    severity: int
    seed: int = 0

    def __call__(self, picture: np.ndarray[Any, Any], sample: int) -> np.ndarray[Any, Any]:
        """A picture uint8 [H,W,3], corrupted."""
        from imagecorruptions import corrupt

        seed = zlib.crc32(f"{self.seed} {self.name} {self.severity} {sample}".encode())
        own = {"seed": seed & 0x7FFFFFFF} if self.name in _OWN_SEED else {}
        with _numpy_seed(seed):
            return corrupt(picture, self.severity, self.name, **own)


def parse_corruptions(names: str, severity: int | None, seed: int) -> list[Corruption]:
    """What --corruptions and --severity name (UserError: there is no such one)."""
    chosen = list(COMMON) if names == "all" else names.split(",")
    for name in chosen:
        if name not in COMMON + EXTRA:
            raise UserError(f"--corruptions: {name}: all, or some of {', '.join(COMMON + EXTRA)}, would be right")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--corruptions: {names}: each of them once would be right")
    return [Corruption(name, each, seed) for name in chosen for each in ([severity] if severity else SEVERITIES)]


def measure_corruptions(
    nets: Nets, corruptions: Sequence[Corruption], runner: Runner, samples: Samples, labels: Samples
) -> list[dict[str, Any]]:
    """Accuracy under each corruption, of all samples; every rank calls it and gets the same figures."""
    figures = []
    for place, corruption in enumerate(corruptions):
        stage = Stage(
            f"{corruption.name}-{corruption.severity}", samples, ("prediction",), partial(_classify, nets, corruption)
        )
        answer = runner.run(stage, num_samples=len(samples), cost=1, later_cost=len(corruptions) - place - 1)
        right = answer.columns["prediction"] == labels
        figures.append(
            {"name": corruption.name, "severity": corruption.severity, "accuracy": float(right.sum() / len(samples))}
        )
    return figures


def _classify(nets: Nets, corruption: Corruption, images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG001
    """A `Compute`: predictions of the corrupted pictures."""
    pictures = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    corrupted = np.stack([corruption(each, key) for each, key in zip(pictures, keys.tolist(), strict=True)])
    moved = torch.from_numpy(corrupted).permute(0, 3, 1, 2).to(images.device)
    return {"prediction": predictions_of(nets.judge, pixels_of(moved, nets.dtype))}


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Inside, numpy's global generator begins with a seed; afterwards it goes on as before."""
    before = np.random.get_state()  # noqa: NPY002 - the library draws from it
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
