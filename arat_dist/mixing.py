"""Mixup and CutMix: neighbours in a batch are blended in pairs, pictures and labels alike, on the device, with no sync.

The sample order deals pairs to the same rank, so a pair is the same at any number of ranks; which partner it is, how
much and where, is a function of (seed, keys) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from arat_dist.attacks import uniform_noise

_QUANTILES = 4096


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang 2018, arXiv 1710.09412) or CutMix (Yun 2019, arXiv 1905.04899) a batch; with both, by equal chance.

    Attributes:
        mixup: alpha of the Beta(alpha, alpha) share that a picture keeps in mixup, 0 for none.
        cutmix: alpha of the share of the area that a picture keeps in CutMix, 0 for none.
        num_classes: number of classes.
        seed: with the keys it fixes all choices.
    """

    mixup: float
    cutmix: float
    num_classes: int
    seed: int

    def __call__(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Blend picture 2i with 2i+1, each keeping its own larger or smaller share; an odd last one stays as it is.

        Args:
            pixels: float [B,3,H,W].
            labels: int64 [B].
            keys: int64 [B].

        Returns:
            New pixels like the old, and targets [B,num_classes] in the pixels' dtype: shares that add up to 1.
        """
        even = len(pixels) // 2 * 2
        own_place = torch.arange(len(pixels), device=pixels.device)
        partner = torch.where(own_place < even, own_place ^ 1, own_place)
        # Both pictures of a pair draw from the key of the first: they are two halves of one exchange.
        pair_keys = keys[torch.minimum(partner, own_place)]
        draws = uniform_noise(pair_keys, pixels.new_empty(len(pixels), 1, 1, 4), self.seed ^ 0x6D6978)[:, 0, 0]
        cuts = draws[:, 0] < self._cut_chance
        kept = torch.where(cuts, self._share(draws[:, 1], self.cutmix), self._share(draws[:, 1], self.mixup))
        patch = _patches(draws[:, 2:], kept, pixels.shape[-2:]) & cuts.view(-1, 1, 1, 1)
        kept = torch.where(cuts, 1 - patch.mean((1, 2, 3), dtype=pixels.dtype), kept)
        others = pixels[partner]
        blended = torch.lerp(others, pixels, kept.view(-1, 1, 1, 1))
        mixed = torch.where(cuts.view(-1, 1, 1, 1), torch.where(patch, others, pixels), blended)
        own = F.one_hot(labels, self.num_classes).to(pixels.dtype)
        return mixed, torch.lerp(own[partner], own, kept[:, None])

    @property
    def _cut_chance(self) -> float:
        return 0.5 if self.mixup and self.cutmix else float(bool(self.cutmix))

    def _share(self, uniform: Tensor, alpha: float) -> Tensor:
        """Beta(alpha, alpha) numbers out of uniform ones, by a table of its quantiles."""
        if not alpha:
            return torch.ones_like(uniform)
        return _beta_quantiles(alpha, uniform.dtype, uniform.device)[(uniform * _QUANTILES).long()]


@lru_cache
def _beta_quantiles(alpha: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at the middles of equal slices of [0,1]."""
    quantiles = betaincinv(alpha, alpha, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    return torch.as_tensor(quantiles, dtype=dtype, device=device)


def _patches(centres: Tensor, kept: Tensor, size: torch.Size) -> Tensor:
    """Which pixels a picture takes from its partner: bool [B,1,H,W].

    A box of the picture's own proportions and of area 1 - kept, its centre anywhere, cut off at the border.
    """
    half = (1 - kept).clamp_min(0).sqrt() / 2
    rows, columns = (torch.arange(n, device=kept.device, dtype=kept.dtype).add(0.5) / n for n in size)
    inside_rows = (rows - centres[:, :1]).abs() < half[:, None]
    inside_columns = (columns - centres[:, 1:]).abs() < half[:, None]
    return (inside_rows[:, None, :, None] & inside_columns[:, None, None, :]).expand(-1, 1, -1, -1)
