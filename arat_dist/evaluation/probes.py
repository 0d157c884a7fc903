"""Probes: cheap attacks on a few pictures beside every attacked evaluation, for the guards to judge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from arat_dist.attacks import PGD, Norm, input_gradient
from arat_dist.data.order import spread
from arat_dist.evaluation.attacks import EvaluationAttack, Net, RestartedPGD, Square
from arat_dist.evaluation.guards import ProbeFigures
from arat_dist.evaluation.stages import Runner, Stage, pixels_of
from arat_dist.evaluation.verdicts import Nets, Verdicts, predictions_of
from arat_dist.losses import cross_entropy

NUM_SAMPLES = 32
"""Pictures that are probed: a net that hides its gradients shows it in most of them."""


@dataclass(frozen=True)
class FGSM:
    """One step of eps from the clean picture (Goodfellow 2015)."""

    norm: Norm
    eps: float
    steps: int = 1
    cost: int = 3
    name: str = "fgsm"

    def __call__(
        self,
        net: Net,
        pixels: Tensor,
        labels: Tensor,
        keys: Tensor,
        judge: Net | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `EvaluationAttack`."""
        return PGD(self.norm, self.eps, self.eps, 1, "none")(lambda x: cross_entropy(net(x), labels), pixels, keys)


@dataclass(frozen=True)
class Probes:
    """The attacks of `ProbeFigures`, in one ball."""

    norm: Norm
    eps: float
    seed: int = 0

    @property
    def attacks(self) -> dict[str, EvaluationAttack]:
        """By the name of the figure that they are for."""
        return {
            "single_step": FGSM(self.norm, self.eps),
            "few_steps": RestartedPGD(self.norm, self.eps, 10, seed=self.seed),
            "many_steps": RestartedPGD(self.norm, self.eps, 50, restarts=2, seed=self.seed),
            "black_box": Square(self.norm, self.eps, 500, seed=self.seed),
        }

    @property
    def cost(self) -> int:
        """Forward passes that a picture takes."""
        return sum(attack.cost for attack in self.attacks.values())

    def compute(self, nets: Nets, other: Net | None, images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """A `Compute`: whether each picture still stands after each attack, 0 or 1."""
        pixels = pixels_of(images, nets.dtype)
        stands = {
            name: predictions_of(nets.judge, attack(nets.attacked, pixels, labels, keys)) == labels
            for name, attack in self.attacks.items()
        }
        gradient = input_gradient(lambda x: cross_entropy(nets.attacked(x), labels), pixels)
        stands["zero_gradient"] = ~gradient.flatten(1).any(1)
        if other is not None:
            moved = self.attacks["few_steps"](other, pixels, labels, keys)
            stands["other_branch"] = predictions_of(other, moved) == labels
        return {name: stand.long() for name, stand in stands.items()}


class Probed(NamedTuple):
    """What the probes found, and how long they took, in seconds."""

    figures: ProbeFigures
    wall_s: float


def probe(nets: Nets, other: Net | None, probes: Probes, runner: Runner, verdicts: Verdicts) -> Probed:
    """Probe a few of the pictures that are right when clean; every rank calls it and gets the same figures.

    Args:
        nets: those of the evaluation.
        other: the branch that isn't measured, of a net with two.
        probes: the attacks.
        runner: what answers stages.
        verdicts: the evaluation's own.
    """
    right = np.flatnonzero(verdicts.clean_right)
    places = right[spread(len(right), min(NUM_SAMPLES, len(right)))] if len(right) else right
    columns = (*probes.attacks, "zero_gradient", *(["other_branch"] if other is not None else []))
    stage = Stage("probes", verdicts.samples[places], columns, partial(probes.compute, nets, other))
    answer = runner.run(stage, num_samples=len(places), cost=probes.cost, later_cost=0)
    counts = {name: int(column.sum()) for name, column in answer.columns.items()}
    figures = ProbeFigures(
        num_samples=len(places),
        measured=int(verdicts.standing()[places].sum()),
        zero_gradients=counts.pop("zero_gradient"),
        **counts,
    )
    return Probed(figures, answer.wall_s)
