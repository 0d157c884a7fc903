"""Attacks on a batch: from a random start uphill on each sample's loss, without leaving a ball.

Everything here is pure tensor maths on pixels in [0,1], [B,3,H,W]; it knows no net, no config and no rank, and the host
never waits for the device. Random numbers are counter-based: a function of (seed, key) alone, so that a sample is
attacked alike at any world size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from arat_dist.balls import BALLS, Ball, LinfBall, normal
from arat_dist.climb import Climb, MomentumClimb, Point, SparseClimb
from arat_dist.fusion import fusible

Loss = Callable[[Tensor], Tensor]
"""From pictures [B,3,H,W] to the loss of each, [B], that the attack climbs."""

Norm = Literal["linf", "l2", "l1"]
Start = Literal["uniform", "gaussian", "none"]

GAUSSIAN_START = 0.001
"""Standard deviation of the start of TRADES, MART and LBGAT, in pixel units."""

_GOLDEN = 0x9E3779B9 - 2**32
"""2**32 over the golden ratio, as int32."""


class Attack(Protocol):
    """What makes adversarial pictures."""

    def __call__(self, loss: Loss, pixels: Tensor, keys: Tensor) -> Tensor:
        """Attack a batch.

        Args:
            loss: see `Loss`. A targeted attack climbs minus the cross-entropy towards `random_target`.
            pixels: clean pictures in [0,1], [B,3,H,W], left bit-identical.
            keys: int64 [B], the name of each sample's visit.

        Returns:
            Adversarial pictures like `pixels`, detached, inside [0,1] and, unless the attack says otherwise, the ball.
        """
        ...


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry 2018): `steps` steps of `step_size` up the loss from a start in the ball.

    One step of 1.25 eps from a uniform start is FGSM with random start (Wong 2020, arXiv 2001.03994).

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, in pixel units.
        step_size: length of a step, in pixel units and in the ball's norm.
        steps: number of steps, each a gradient.
        start: a uniform point of the ball, the centre with Gaussian noise of 0.001 (projected), or the centre: "none".
        seed: with a sample's key it fixes the random start.
    """

    norm: Norm
    eps: float
    step_size: float
    steps: int
    start: Start = "uniform"
    seed: int = 0

    def __call__(self, loss: Loss, pixels: Tensor, keys: Tensor) -> Tensor:
        """See `Attack`."""
        pixels = pixels.detach()
        ball = BALLS[self.norm](pixels, self.eps)
        adversarial = STARTS[self.start](ball, pixels, keys, self.seed)
        for _ in range(self.steps):
            adversarial = ball.ascend(adversarial, input_gradient(loss, adversarial), self.step_size)
        return adversarial


@dataclass(frozen=True)
class NFGSM:
    """N-FGSM (de Jorge 2022, arXiv 2202.01181): strong uniform noise, then one signed step; for training alone.

    Nothing brings the pictures back: clipped to [0,1] only, they leave the eps ball and end up as far as
    noise * eps + step_size from the clean ones in the norm linf. That is the method: its authors find that clipping to
    the ball is what lets training overfit to the single step.

    Attributes:
        eps: what the noise is measured in, in pixel units.
        step_size: length of the step in the norm linf, in pixel units; the paper's is eps.
        noise: largest noise, as a multiple of eps.
        seed: with a sample's key it fixes the noise.
    """

    eps: float
    step_size: float
    noise: float = 2.0
    seed: int = 0

    def __call__(self, loss: Loss, pixels: Tensor, keys: Tensor) -> Tensor:
        """See `Attack`."""
        pixels = pixels.detach()
        noisy = LinfBall(pixels, self.noise * self.eps).start(uniform_noise(keys, pixels, self.seed))
        return input_gradient(loss, noisy).sign_().mul_(self.step_size).add_(noisy).clamp_(0, 1)


@dataclass(frozen=True)
class APGD:
    """Auto-PGD: `steps` steps whose length each sample finds by itself, and its point of highest loss in the end.

    For linf and l2 (Croce & Hein 2020, arXiv 2003.01690): steps of 2 eps with momentum; at checkpoints, a sample that
    rose in fewer than `rho` of the steps since the last one, or that has no new best and kept its step size there, goes
    on from its best point with half the step size.

    For l1 (Croce & Hein 2021, arXiv 2103.01208): sparse steps of eps without momentum, `rho` unused; every 4 % of the
    steps, the share of pixels that moves becomes 2/3 of those that the best point differs in, and a sample whose best
    point is still growing sparser (by 5 %) goes on from there with steps of eps, another with steps 1.5 times shorter,
    down to eps/10. One radius throughout: the paper's prelude in larger balls is left out.

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, in pixel units.
        steps: number of steps, each a gradient; a forward pass comes on top.
        start: as in `PGD`.
        seed: with a sample's key it fixes the random start.
        rho: share of steps that must rise.
    """

    norm: Norm
    eps: float
    steps: int
    start: Start = "uniform"
    seed: int = 0
    rho: float = 0.75

    def __call__(self, loss: Loss, pixels: Tensor, keys: Tensor) -> Tensor:
        """See `Attack`."""
        pixels = pixels.detach()
        ball = BALLS[self.norm](pixels, self.eps)
        start = STARTS[self.start](ball, pixels, keys, self.seed)
        if self.steps == 0:
            return start
        begin = look_at(loss, start)
        climb: Climb = (
            SparseClimb(self.norm, pixels, self.eps, begin, self.steps)
            if self.norm == "l1"
            else MomentumClimb(self.norm, pixels, self.eps, begin, self.steps, self.rho)
        )
        for k in range(1, self.steps + 1):
            climb.step(partial(look_at, loss, last=k == self.steps))
        return climb.best.pictures


STARTS: dict[str, Callable[[Ball, Tensor, Tensor, int], Tensor]] = {
    "uniform": lambda ball, pixels, keys, seed: ball.start(uniform_noise(keys, pixels, seed)),
    "gaussian": lambda ball, pixels, keys, seed: ball.project(
        normal(uniform_noise(keys, pixels, seed)).mul_(GAUSSIAN_START).add_(pixels)
    ),
    "none": lambda ball, pixels, keys, seed: pixels.clone(),  # noqa: ARG005
}
"""From the ball, its centre, the keys and the seed to where an attack starts: a tensor of its own."""


def loss_and_gradient(loss: Loss, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B] and their gradient with respect to the pictures alone: no weight's is computed or stored."""
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_()
        losses = loss(leaf)
        # Of the sum, not of the mean: each sample's gradient is independent of the batch.
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def input_gradient(loss: Loss, pixels: Tensor) -> Tensor:
    """The gradient of `loss_and_gradient`."""
    return loss_and_gradient(loss, pixels)[1]


def look_at(loss: Loss, pictures: Tensor, *, last: bool = False) -> Point:
    """The point at some pictures; the last one of a climb needs no gradient and gets zeros."""
    if not last:
        return Point(pictures, *loss_and_gradient(loss, pictures))
    with torch.no_grad():
        return Point(pictures, loss(pictures), torch.zeros_like(pictures))


@fusible
def uniform_noise(keys: Tensor, like: Tensor, seed: int) -> Tensor:
    """Uniform numbers in [0,1), a function of (seed, key, position) alone: the same on every device and rank.

    Args:
        keys: int64 [B].
        like: [B,C,H,W], gives shape, dtype, device and memory format.
        seed: below 2**31.

    Source: a 32-bit counter through the finaliser lowbias32 (Wellons 2018), 24 bits of it used.
    """
    position = torch.arange(like[0].numel(), dtype=torch.int32, device=like.device).mul_(_GOLDEN)
    bits = _mix_(_stream(keys, seed)[:, None] ^ position[None, :])
    noise = torch.empty_like(like)
    return noise.copy_(_shifted(bits, 8).view(like.shape)).mul_(2.0**-24)


def random_target(keys: Tensor, labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """A class other than the label for each sample, uniform, a function of (seed, key) alone: int64 [B].

    Args:
        keys: int64 [B].
        labels: int64 [B].
        num_classes: at least 2.
        seed: below 2**31.

    Raises:
        ValueError: one class alone.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}: a target other than the label needs at least 2")
    # A position that no picture has: the target knows nothing of the noise.
    bits = _mix_(~_stream(keys, seed)).long() & 0xFFFFFFFF
    offset = 1 + (bits * (num_classes - 1) >> 32)
    return (labels + offset) % num_classes


def _stream(keys: Tensor, seed: int) -> Tensor:
    """The counter's beginning for each key, 32 bits in int32 [B]."""
    high, low = (keys >> 32).to(torch.int32), keys.to(torch.int32)
    # 0 is a fixed point of the finaliser: without the constant, seed 0 and key 0 would begin with noise 0.
    return _mix_(_mix_(_mix_(high) ^ low) ^ seed ^ _GOLDEN)


def _mix_(x: Tensor) -> Tensor:
    """The finaliser lowbias32 on the bits of an int32 tensor, in place; its products wrap around."""
    x ^= _shifted(x, 16)
    x *= 0x7FEB352D
    x ^= _shifted(x, 15)
    x *= 0x846CA68B - 2**32
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, count: int) -> Tensor:
    """The bits of int32 moved down, zeros moved in: torch moves in the sign."""
    return (x >> count).bitwise_and_(0xFFFFFFFF >> count)
