"""RandAugment and colour jitter of training pictures, on the device, in groups that drew the same operation.

What happens to sample i in epoch e is a function of (seed, key) alone, to the bit: the same in any batch, at any number
of ranks and parts of a step, and after any resume. The choices are hashed on the host, where the loader's keys are, so
that the groups are known without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arat_dist.attacks import uniform_noise
from arat_dist.config import DataConfig
from arat_dist.picture_ops import PICTURE_OPS


class Round(NamedTuple):
    """What is done to each of B pictures next."""

    ops: NDArray[np.str_]
    """Names out of PICTURE_OPS [B], or "identity"."""
    amounts: NDArray[np.float32]
    """Their amounts [B]."""


class Policy(Protocol):
    """What draws the operations."""

    def rounds(self, keys: Tensor, height: int, width: int) -> Iterator[Round]:
        """The operations, in their order.

        Args:
            keys: int64 [B], in host memory.
            height: of the pictures, in pixels.
            width: of the pictures, in pixels.
        """
        ...


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk 2019, arXiv 1909.13719): `num_ops` operations, each drawn evenly from 14.

    Operations and their ranges are torchvision's, whose 31 bins are 0 to 10 here: bin = 3 * magnitude.

    Attributes:
        num_ops: operations a picture.
        magnitude: how far each goes within its range, 0 to 10, the paper's scale.
        seed: with the keys it fixes all choices.
    """

    num_ops: int
    magnitude: float
    seed: int

    def rounds(self, keys: Tensor, height: int, width: int) -> Iterator[Round]:
        """See `Policy`."""
        ranges = amount_ranges(self.magnitude, height, width)
        names = np.array(list(ranges))
        middles, spreads = np.array(list(ranges.values())).T
        for draws in np.split(_uniform(keys, 2 * self.num_ops, self.seed ^ 0x72616E), self.num_ops, axis=1):
            choice = (draws[:, 0] * len(names)).astype(np.int64)
            sign = np.where(draws[:, 1] < 0.5, -1, 1)
            yield Round(names[choice], (middles[choice] + sign * spreads[choice]).astype(np.float32))


def amount_ranges(magnitude: float, height: int, width: int) -> dict[str, tuple[float, float]]:
    """RandAugment's operations: to each the middle and what is added or, as often, taken away, in the op's unit."""
    share = magnitude / 10
    return {
        "identity": (0, 0),
        "shear_x": (0, 0.3 * share),
        "shear_y": (0, 0.3 * share),
        "translate_x": (0, int(150 / 331 * width * share)),
        "translate_y": (0, int(150 / 331 * height * share)),
        "rotate": (0, math.sin(math.radians(30 * share))),
        "brightness": (1, 0.9 * share),
        "saturation": (1, 0.9 * share),
        "contrast": (1, 0.9 * share),
        "sharpness": (1, 0.9 * share),
        "posterize": (2 ** (8 - round(8 - 4 * share)), 0),
        "solarize": (255 * (1 - share), 0),
        "autocontrast": (0, 0),
        "equalize": (0, 0),
    }


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: four changes by uniform amounts, in a random order.

    Attributes:
        brightness: the factor is in [max(0, 1 - brightness), 1 + brightness]; 0 leaves it.
        contrast: as brightness.
        saturation: as brightness.
        hue: the shift is in [-hue, hue], in turns of the colour circle, hue at most 0.5.
        seed: with the keys it fixes all choices.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    seed: int

    def rounds(self, keys: Tensor, height: int, width: int) -> Iterator[Round]:  # noqa: ARG002
        """See `Policy`."""
        ranges = {
            name: (max(0.0, 1 - spread), 1 + spread) if spread else (1.0, 1.0)
            for name, spread in (
                ("brightness", self.brightness),
                ("contrast", self.contrast),
                ("saturation", self.saturation),
            )
        } | {"hue": (-self.hue, self.hue)}
        low, high = np.array(list(ranges.values())).T
        names = np.array([name if low[i] < high[i] else "identity" for i, name in enumerate(ranges)])
        draws = _uniform(keys, 2 * len(names), self.seed ^ 0x6A6974)
        amounts = (low + (high - low) * draws[:, : len(names)]).astype(np.float32)
        order = draws[:, len(names) :].argsort(axis=1, kind="stable")
        for position in order.T:
            yield Round(names[position], amounts[np.arange(len(position)), position])


@dataclass(frozen=True)
class DeviceAugment:
    """The policies of a recipe, one after the other.

    Attributes:
        policies: at least one.
    """

    policies: tuple[Policy, ...]

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Augment pictures.

        Args:
            images: uint8 [B,3,H,W] on any device; left as they are.
            keys: int64 [B], in host memory.

        Returns:
            New pictures like the old, channels-last in memory.
        """
        pictures = images.clone(memory_format=torch.contiguous_format)
        for policy in self.policies:
            for ops, amounts in policy.rounds(keys, *images.shape[-2:]):
                apply_ops_(pictures, ops, amounts)
        return pictures.contiguous(memory_format=torch.channels_last)


def build_device_augment(data: DataConfig, seed: int) -> DeviceAugment | None:
    """What a recipe's section asks for, None where that is nothing."""
    policies: list[Policy] = []
    if data.color_jitter is not None:
        policies.append(ColorJitter(*data.color_jitter, seed=seed))
    if data.rand_augment is not None:
        policies.append(RandAugment(*data.rand_augment, seed=seed))
    return DeviceAugment(tuple(policies)) if policies else None


def apply_ops_(pictures: Tensor, ops: NDArray[np.str_], amounts: NDArray[np.float32]) -> None:
    """Do to each of the pictures uint8 [B,3,H,W], in place, what is named for it: those of one operation together."""
    order = np.argsort(ops, kind="stable")
    names, counts = np.unique(ops, return_counts=True)
    rows, sorted_amounts = (
        torch.from_numpy(array).to(pictures.device, non_blocking=True).split(counts.tolist())
        for array in (order, amounts[order])
    )
    at_once = _num_at_once(pictures)
    for name, group, group_amounts in zip(names, rows, sorted_amounts, strict=True):
        if name == "identity":
            continue
        for row, amount in zip(group.split(at_once), group_amounts.split(at_once), strict=True):
            changed = PICTURE_OPS[name](pictures.index_select(0, row), amount.view(-1, 1, 1, 1))
            pictures.index_copy_(0, row, changed)


def _num_at_once(pictures: Tensor) -> int:
    """Pictures that one call takes: what a CPU keeps in its cache, and what costs a GPU half a GB for a moment."""
    num_pixels = 2**18 if pictures.device.type == "cpu" else 2**24
    return max(1, num_pixels // (pictures.shape[2] * pictures.shape[3]))


def _uniform(keys: Tensor, count: int, seed: int) -> NDArray[np.float64]:
    """Uniform numbers in [0,1) for each key, float64 [B,count], on the host."""
    return uniform_noise(keys, torch.empty(len(keys), 1, 1, count), seed).view(len(keys), count).double().numpy()
