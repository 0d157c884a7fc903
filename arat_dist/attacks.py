"""Projected gradient descent out of three pieces: a start, a step up the loss, a projection back into the ball.

Everything here is pure tensor maths on pixels in [0,1], [B,3,H,W]; it knows no net, no config and no rank. The random
start is counter-based: a function of (seed, key) alone, so that a sample is attacked alike at any world size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Ball(Protocol):
    """All the pictures that an attack may reach from one batch."""

    def start(self, uniform: Tensor) -> Tensor:
        """A random point of the ball out of uniform numbers in [0,1) of the batch's shape."""
        ...

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """One step of length `step_size` along the gradient's direction, projected back."""
        ...


class LinfBall:
    """Pictures with max |x' - x| <= eps and pixels in [0,1]; the start is uniform in the cube."""

    def __init__(self, pixels: Tensor, eps: float):
        self._pixels, self._eps = pixels, eps
        self._low, self._high = _linf_bounds(pixels, eps)

    def start(self, uniform: Tensor) -> Tensor:
        """See `Ball`: each pixel anywhere in its interval."""
        return self._project(self._pixels + uniform.mul(2).sub_(1).mul_(self._eps))

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """See `Ball`: every pixel moves by step_size, along the gradient's sign."""
        return self._project(adversarial + gradient.sign().mul_(step_size))

    def _project(self, moved: Tensor) -> Tensor:
        return moved.clamp_(self._low, self._high)


class L2Ball:
    """Pictures with |x' - x|_2 <= eps per sample and pixels in [0,1]; the start is uniform in the ball."""

    def __init__(self, pixels: Tensor, eps: float):
        # One part in a million inside, so that rounding in the norm can't lead out.
        self._pixels, self._eps = pixels, eps * (1 - 1e-6)

    def start(self, uniform: Tensor) -> Tensor:
        """See `Ball`: a Gaussian direction and a radius whose density grows like the sphere's surface."""
        # The first number of each sample draws the radius, all of them the direction.
        radius = self._eps * uniform.flatten(1)[:, 0].pow(1 / uniform[0].numel())
        direction = _unit(torch.erfinv(uniform.mul(2).sub_(1).clamp_(-0.9999999, 0.9999999)))
        return self._project(self._pixels + direction * radius.view(-1, 1, 1, 1))

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """See `Ball`: each sample moves by step_size in the 2-norm, along its gradient."""
        return self._project(adversarial + _unit(gradient).mul_(step_size))

    def _project(self, moved: Tensor) -> Tensor:
        # Clipping to [0,1] after shrinking only brings x' nearer to x, whose pixels lie in [0,1] too.
        delta = moved - self._pixels
        shrink = (self._eps / _l2(delta).clamp_min(1e-12)).clamp_max(1)
        return (self._pixels + delta * shrink).clamp_(0, 1)


BALLS: dict[str, Callable[[Tensor, float], Ball]] = {"linf": LinfBall, "l2": L2Ball}


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry 2018): `steps` steps of `step_size` up the loss from a start in the ball.

    Attributes:
        norm: "linf" or "l2".
        eps: radius of the ball, in pixel units.
        step_size: length of a step, in pixel units.
        steps: number of steps.
        random_start: start from a uniform point of the ball instead of its centre.
        seed: with a sample's key it fixes the random start.
    """

    norm: str
    eps: float
    step_size: float
    steps: int
    random_start: bool = True
    seed: int = 0

    def __call__(self, loss: Callable[[Tensor], Tensor], pixels: Tensor, keys: Tensor) -> Tensor:
        """Attack a batch.

        Args:
            loss: from pictures [B,3,H,W] to the 0-d loss to climb, summed over the samples so that each one's gradient
                is independent of the batch.
            pixels: clean pictures in [0,1], [B,3,H,W], left bit-identical.
            keys: int64 [B], the name of each sample's visit.

        Returns:
            Adversarial pictures like `pixels`, detached: inside the ball and inside [0,1].
        """
        pixels = pixels.detach()
        ball = BALLS[self.norm](pixels, self.eps)
        adversarial = ball.start(uniform_noise(keys, pixels, self.seed)) if self.random_start else pixels.clone()
        for _ in range(self.steps):
            adversarial = ball.ascend(adversarial, input_gradient(loss, adversarial), self.step_size)
        return adversarial


def input_gradient(loss: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Gradient of a 0-d loss with respect to the pictures alone: no weight's gradient is computed or stored."""
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient


def uniform_noise(keys: Tensor, like: Tensor, seed: int) -> Tensor:
    """Uniform numbers in [0,1), a function of (seed, key, position) alone: the same on every device and rank.

    Args:
        keys: int64 [B].
        like: [B,C,H,W], gives shape, dtype, device and memory format.
        seed: below 2**31.

    Source: a 32-bit counter through the finaliser lowbias32 (Wellons 2018), 24 bits of it used.
    """
    # 0 is a fixed point of the finaliser: without the constant, seed 0 and key 0 would begin with noise 0.
    stream = _mix(_mix(_mix(keys >> 32 & _MASK) ^ (keys & _MASK)) ^ seed ^ 0x9E3779B9)
    position = torch.arange(like[0].numel(), device=like.device) * 0x9E3779B9 & _MASK
    bits = _mix(stream[:, None] ^ position[None, :]) >> 8
    noise = torch.empty_like(like)
    return noise.copy_(bits.view(like.shape)).mul_(2.0**-24)


def _mix(x: Tensor) -> Tensor:
    """The finaliser lowbias32 on int64 tensors that hold 32-bit values; int64 products keep their low bits right."""
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16


def _linf_bounds(pixels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each pixel, rounded inwards so that |x' - x| <= eps holds exactly, not to an ulp."""
    exact = pixels.double()
    low, high = exact - eps, exact + eps
    rounded_low, rounded_high = low.to(pixels.dtype), high.to(pixels.dtype)
    rounded_low = torch.where(rounded_low.double() < low, torch.nextafter(rounded_low, pixels), rounded_low)
    rounded_high = torch.where(rounded_high.double() > high, torch.nextafter(rounded_high, pixels), rounded_high)
    return rounded_low.clamp_min_(0), rounded_high.clamp_max_(1)


def _l2(x: Tensor) -> Tensor:
    """Norm of each sample, [B,1,1,1]."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """Each sample scaled to length 1; a zero one stays zero."""
    return x / _l2(x).clamp_min(torch.finfo(x.dtype).tiny)
