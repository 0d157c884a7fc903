"""Auto-PGD step by step: what the attack in training and that of an evaluation share.

Pure tensor maths on pixels in [0,1], [B,3,H,W]; the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from arat_dist.balls import BALLS, L1Ball

_PER_SAMPLE = (-1, 1, 1, 1)


class Point(NamedTuple):
    """Where each sample stands: pictures [B,3,H,W], their losses [B] and the losses' gradient."""

    pictures: Tensor
    losses: Tensor
    gradient: Tensor

    def keep(self, mask: Tensor) -> Point:
        """The samples where a mask bool [B] holds, or at positions int64 [n]."""
        return Point(*(tensor[mask] for tensor in self))


Look = Callable[[Tensor], Point]
"""From pictures to the point there; the last one of a climb needs no gradient."""


class Climb(Protocol):
    """A batch on its way up."""

    best: Point
    """Each sample's point of highest loss so far."""

    def step(self, look: Look) -> None:
        """Take one step."""
        ...

    def keep(self, mask: Tensor) -> Self:
        """Go on with the samples that a mask or positions name alone; they climb as they would have. Itself."""
        ...


class MomentumClimb:
    """APGD in linf and l2: algorithm 1 of arXiv 2003.01690; a sample that is stuck goes back before the next step.

    Args:
        norm: "linf" or "l2".
        pixels: clean pictures.
        eps: radius of the ball, in pixel units.
        start: the point to begin at.
        steps: of the whole climb.
        rho: share of steps that must rise.
    """

    def __init__(self, norm: str, pixels: Tensor, eps: float, start: Point, steps: int, rho: float = 0.75):
        self._norm, self._pixels, self._eps, self._rho = norm, pixels, eps, rho
        self._ball = BALLS[norm](pixels, eps)
        self._now = self.best = start
        self._previous, self._best_before = start.pictures, start.losses
        self._step_size = pixels.new_full((len(pixels), 1, 1, 1), 2 * eps)
        self._num_rises = torch.zeros_like(start.losses)
        self._halved = torch.zeros_like(start.losses, dtype=torch.bool)
        self._num_steps = self._last_check = 0
        self._checkpoints = checkpoints(steps)

    def step(self, look: Look) -> None:
        """See `Climb`."""
        self._num_steps += 1
        now, ball = self._now, self._ball
        pictures = ball.ascend(now.pictures, now.gradient, self._step_size)
        if self._num_steps > 1:
            pictures = ball.project(
                now.pictures + 0.75 * (pictures - now.pictures) + 0.25 * (now.pictures - self._previous)
            )
        self._previous, losses_before = now.pictures, now.losses
        self._now = look(pictures)
        self._num_rises = self._num_rises + (self._now.losses > losses_before)
        self.best = choose(self._now.losses > self.best.losses, self._now, self.best)
        if self._num_steps in self._checkpoints:
            self._look_back()

    def keep(self, mask: Tensor) -> Self:
        """See `Climb`."""
        self._pixels = self._pixels[mask]
        self._ball = BALLS[self._norm](self._pixels, self._eps)
        self._now, self.best = self._now.keep(mask), self.best.keep(mask)
        self._previous, self._best_before = self._previous[mask], self._best_before[mask]
        self._step_size, self._num_rises, self._halved = (
            self._step_size[mask],
            self._num_rises[mask],
            self._halved[mask],
        )
        return self

    def _look_back(self) -> None:
        too_few = self._num_rises < self._rho * (self._num_steps - self._last_check)
        self._halved = too_few | (~self._halved & (self.best.losses <= self._best_before))
        self._step_size = torch.where(self._halved.view(_PER_SAMPLE), self._step_size / 2, self._step_size)
        self._now = choose(self._halved, self.best, self._now)
        self._num_rises, self._best_before = torch.zeros_like(self._num_rises), self.best.losses
        self._last_check = self._num_steps


class SparseClimb:
    """APGD in l1; constants from the code of arXiv 2103.01208's authors.

    Args:
        norm: "l1".
        pixels: clean pictures.
        eps: radius of the ball, in pixel units.
        start: the point to begin at.
        steps: of the whole climb.
        goes_on: the start comes from another climb: the share of pixels that moves is taken from it.
    """

    def __init__(self, norm: str, pixels: Tensor, eps: float, start: Point, steps: int, *, goes_on: bool = False):
        assert norm == "l1"
        self._pixels, self._eps = pixels, eps
        self._ball = L1Ball(pixels, eps)
        self._now = self.best = start
        self._step_size = pixels.new_full((len(pixels), 1, 1, 1), eps)
        self._share, self._num_moved = (
            torch.full_like(self._step_size, 0.2),
            torch.full_like(self._step_size, pixels[0].numel()),
        )
        if goes_on:
            self._num_moved = _num_moved(start.pictures, pixels)
            self._share = self._num_moved / (1.5 * pixels[0].numel())
        self._num_steps, self._check_every = 0, max(1, 4 * steps // 100)

    def step(self, look: Look) -> None:
        """See `Climb`."""
        self._num_steps += 1
        now = self._now
        self._now = look(self._ball.ascend(now.pictures, now.gradient, self._step_size, self._share))
        self.best = choose(self._now.losses > self.best.losses, self._now, self.best)
        if self._num_steps % self._check_every == 0:
            num_moved_before, self._num_moved = self._num_moved, _num_moved(self.best.pictures, self._pixels)
            sparser = self._num_moved < 0.95 * num_moved_before
            shorter = (self._step_size / 1.5).clamp_min_(self._eps / 10)
            self._step_size = torch.where(sparser, self._eps, shorter)
            self._share = self._num_moved / (1.5 * self._pixels[0].numel())
            self._now = choose(sparser.flatten(), self.best, self._now)

    def keep(self, mask: Tensor) -> Self:
        """See `Climb`."""
        self._pixels = self._pixels[mask]
        self._ball = L1Ball(self._pixels, self._eps)
        self._now, self.best = self._now.keep(mask), self.best.keep(mask)
        self._step_size, self._share = self._step_size[mask], self._share[mask]
        self._num_moved = self._num_moved[mask]
        return self


def choose(mask: Tensor, a: Point, b: Point) -> Point:
    """Each sample's point from `a` where the mask [B] holds, from `b` elsewhere."""
    wide = mask.view(_PER_SAMPLE)
    return Point(
        torch.where(wide, a.pictures, b.pictures),
        torch.where(mask, a.losses, b.losses),
        torch.where(wide, a.gradient, b.gradient),
    )


def checkpoints(steps: int) -> set[int]:
    """The steps after which APGD looks back: 22 % of them, then in shrinking distances, at least 6 % apart."""
    percent, distance, places = 22, 22, []
    while percent < 100:
        places.append(-(-percent * steps // 100))
        distance = max(distance - 3, 6)
        percent += distance
    return set(places)


def _num_moved(pictures: Tensor, pixels: Tensor) -> Tensor:
    """In how many numbers each sample differs from the clean one, [B,1,1,1]."""
    return (pictures != pixels).sum((1, 2, 3), keepdim=True, dtype=pixels.dtype)
