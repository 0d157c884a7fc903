"""The sets that attacks stay in: all pictures in [0,1] near clean ones, in the norm linf, l2 or l1.

Pure tensor maths on pixels [B,3,H,W]; each sample has its own ball, and none waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from arat_dist.fusion import fusible

_PIXELS = (1, 2, 3)


class Ball(Protocol):
    """All the pictures that an attack may reach from one batch."""

    def start(self, uniform: Tensor) -> Tensor:
        """A random point of the ball out of uniform numbers in [0,1), multiples of 2**-24, of the batch's shape."""
        ...

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """One step of length `step_size` (or one a sample, [B,1,1,1]) along the gradient's direction, projected."""
        ...

    def project(self, moved: Tensor) -> Tensor:
        """The point of the ball for any pictures of the batch's shape; a new tensor."""
        ...


class LinfBall:
    """Pictures with max |x' - x| <= eps and pixels in [0,1]; the start is uniform in the cube."""

    def __init__(self, pixels: Tensor, eps: float):
        self._pixels, self._eps = pixels, eps
        self._low, self._high = _linf_bounds(pixels, eps)

    def start(self, uniform: Tensor) -> Tensor:
        """See `Ball`: each pixel anywhere in its interval."""
        return _linf_start(uniform, self._pixels, self._low, self._high, self._eps)

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Ball`: every pixel moves by step_size, along the gradient's sign."""
        return _linf_ascend(adversarial, gradient, self._low, self._high, step_size)

    def project(self, moved: Tensor) -> Tensor:
        """See `Ball`: the nearest point."""
        return moved.clamp(self._low, self._high)


class L2Ball:
    """Pictures with |x' - x|_2 <= eps per sample and pixels in [0,1]; the start is uniform in the ball."""

    def __init__(self, pixels: Tensor, eps: float):
        # One part in a million inside, so that rounding in the norm can't lead out.
        self._pixels, self._eps = pixels, eps * (1 - 1e-6)

    def start(self, uniform: Tensor) -> Tensor:
        """See `Ball`: a Gaussian direction and a radius whose density grows like the sphere's surface."""
        return self.project(self._pixels + _unit(normal(uniform)) * _radius(uniform, self._eps))

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """See `Ball`: each sample moves by step_size in the 2-norm, along its gradient."""
        return self.project(adversarial + _unit(gradient).mul_(step_size))

    def project(self, moved: Tensor) -> Tensor:
        """See `Ball`: shrunk to the radius, then clipped to [0,1]; in a corner of the box not quite the nearest."""
        # Clipping to [0,1] after shrinking only brings x' nearer to x, whose pixels lie in [0,1] too.
        delta = moved - self._pixels
        shrink = (self._eps / _l2(delta).clamp_min(1e-12)).clamp_max(1)
        return (self._pixels + delta * shrink).clamp_(0, 1)


class L1Ball:
    """Pictures with |x' - x|_1 <= eps per sample (summed over channels and pixels) and pixels in [0,1].

    The start is uniform in the norm's ball and then clipped to [0,1], which only brings it nearer to x.
    """

    def __init__(self, pixels: Tensor, eps: float):
        # Inside for the rounding of the sum; that of each pixel is inwards.
        self._pixels, self._eps = pixels, eps * (1 - 1e-6)

    def start(self, uniform: Tensor) -> Tensor:
        """See `Ball`: a Laplacian direction, uniform on the sphere of the 1-norm, and a radius as in `L2Ball`."""
        signed = uniform.mul(2).sub_(1 - 2**-24)  # odd multiples of 2**-24: never -1, 0 or 1
        laplace = torch.log1p(-signed.abs()).neg_().copysign_(signed)
        return self.project(self._pixels + laplace / _l1(laplace) * _radius(uniform, self._eps))

    def ascend(
        self, adversarial: Tensor, gradient: Tensor, step_size: float | Tensor, share: float | Tensor = 0.01
    ) -> Tensor:
        """See `Ball`: step_size, in the 1-norm, is dealt evenly to the pixels with the largest |gradient|.

        Those that the step would only push out of [0,1] are passed over: on a bounded picture the steepest step
        leaves them out (Croce & Hein 2021, arXiv 2103.01208).

        Args:
            adversarial: pictures in the ball, [B,3,H,W].
            gradient: of the same shape.
            step_size: as in `Ball`.
            share: the part of the 3*H*W numbers that moves, at least one of them, or one a sample, [B,1,1,1]; the
                default is that of SLIDE (Tramer & Boneh 2019).
        """
        blocked = torch.where(gradient > 0, adversarial >= 1, adversarial <= 0)
        size = gradient.abs().masked_fill_(blocked, 0)
        top = (size >= _top_share(size, share)) & (size > 0)
        direction = gradient.sign().mul_(top).div_(top.sum(_PIXELS, keepdim=True).clamp_min_(1))
        return self.project(adversarial + direction.mul_(step_size))

    def project(self, moved: Tensor) -> Tensor:
        """See `Ball`: the nearest point. The problem falls into pixels: a soft threshold, then a clip to [0,1].

        Source: Croce & Hein 2021, arXiv 2103.01208; here the threshold is bisected, not sorted for.
        """
        delta = moved - self._pixels
        size, room = delta.abs(), torch.where(delta > 0, 1 - self._pixels, self._pixels)
        kept = (size - _threshold(size, room, self._eps)).clamp_min_(0)
        return _add_inwards(self._pixels, kept.copysign_(delta)).clamp_(0, 1)


BALLS: dict[str, Callable[[Tensor, float], Ball]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers out of uniform ones in [0,1), cut off at 5.3 standard deviations; a new tensor."""
    return torch.erfinv(uniform.mul(2).sub_(1).clamp_(-0.9999999, 0.9999999)).mul_(math.sqrt(2))


def _radius(uniform: Tensor, eps: float) -> Tensor:
    """Radius of a uniform point of a ball, [B,1,1,1]: its share of the volume is the first number of each sample."""
    return eps * uniform.flatten(1)[:, 0].pow(1 / uniform[0].numel()).view(-1, 1, 1, 1)


@fusible
def _linf_start(uniform: Tensor, pixels: Tensor, low: Tensor, high: Tensor, eps: float | Tensor) -> Tensor:
    """A point of the cube out of uniform numbers, [B,3,H,W] each."""
    return (pixels + uniform.mul(2).sub_(1).mul_(eps)).clamp(low, high)


@fusible
def _linf_ascend(adversarial: Tensor, gradient: Tensor, low: Tensor, high: Tensor, step_size: float | Tensor) -> Tensor:
    """A step along the gradient's sign, kept between the bounds, [B,3,H,W] each."""
    return (adversarial + gradient.sign().mul_(step_size)).clamp(low, high)


@fusible
def _linf_bounds(pixels: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each pixel, rounded inwards so that |x' - x| <= eps holds exactly, not to an ulp."""
    exact = pixels.double()
    low, high = exact - eps, exact + eps
    rounded_low, rounded_high = low.to(pixels.dtype), high.to(pixels.dtype)
    rounded_low = torch.where(rounded_low.double() < low, torch.nextafter(rounded_low, pixels), rounded_low)
    rounded_high = torch.where(rounded_high.double() > high, torch.nextafter(rounded_high, pixels), rounded_high)
    return rounded_low.clamp_min_(0), rounded_high.clamp_max_(1)


def _threshold(size: Tensor, room: Tensor, radius: float) -> Tensor:
    """The least t >= 0 with sum(min(max(size - t, 0), room)) <= radius per sample, [B,1,1,1].

    Bisected: all samples go together and nothing is sorted. Rounded up, in float32 by 2**-27 of the largest size.
    """
    nothing = size.new_zeros(())

    def too_far(t: Tensor) -> Tensor:
        return (size - t).clamp_(nothing, room).sum(_PIXELS, keepdim=True) > radius

    high = size.amax(_PIXELS, keepdim=True)
    low = torch.zeros_like(high)
    outside = too_far(low)
    for _ in range(4 - round(math.log2(torch.finfo(size.dtype).eps))):
        middle = (low + high) / 2
        over = too_far(middle)
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return high * outside


def _top_share(size: Tensor, share: float | Tensor) -> Tensor:
    """The smallest of the top `share` of each sample's numbers, all >= 0, at least one of them: [B,1,1,1].

    Bisected over their bits, which stand in the same order: exact, and without a sort.
    """
    bits = {4: torch.int32, 8: torch.int64}[size.element_size()]
    high = size.amax(_PIXELS, keepdim=True).view(bits).long() + 1
    low = torch.zeros_like(high)
    wanted = (share * size[0].numel() * size.new_ones(high.shape)).round_().clamp_min_(1)
    reached = torch.empty_like(size)  # of floats, whose sum is faster than that of bools
    for _ in range(8 * size.element_size() - 1):
        middle = low + (high - low) // 2
        enough = torch.ge(size, middle.to(bits).view(size.dtype), out=reached).sum(_PIXELS, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.to(bits).view(size.dtype)


def _add_inwards(x: Tensor, delta: Tensor) -> Tensor:
    """Give x + delta rounded towards x, so that |x' - x| <= |delta| holds exactly; rounding by TwoSum (Knuth 1969)."""
    moved = x + delta
    gone = moved - x
    error = (x - (moved - gone)) + (delta - gone)  # x + delta = moved + error, exactly
    return torch.where(error * delta < 0, torch.nextafter(moved, x), moved)


def _l1(x: Tensor) -> Tensor:
    """Sum of each sample's absolute numbers, [B,1,1,1]."""
    return torch.linalg.vector_norm(x, 1, dim=_PIXELS, keepdim=True)


def _l2(x: Tensor) -> Tensor:
    """Norm of each sample, [B,1,1,1]."""
    return torch.linalg.vector_norm(x, dim=_PIXELS, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """Each sample scaled to length 1; a zero one stays zero."""
    return x / _l2(x).clamp_min(torch.finfo(x.dtype).tiny)
