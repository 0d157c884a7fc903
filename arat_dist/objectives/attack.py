"""The attack of the training step: what the recipe says, else what the method's authors do, and its schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arat_dist.attacks import APGD, NFGSM, PGD, Attack, Start, random_target
from arat_dist.config import AttackConfig, last_begun
from arat_dist.losses import cross_entropy, dlr, hard_labels, kl, targeted_dlr

NormStats = Literal["batch", "running"]
Net = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttackDefaults:
    """How a method's authors attack in training, where the recipe says auto."""

    loss: str = "ce"
    start: Start = "uniform"
    norm_stats: NormStats = "batch"


TRADES_ATTACK = AttackDefaults(loss="kl", start="gaussian", norm_stats="running")
"""KL from the clean prediction, a Gaussian start of 0.001, the net in eval mode."""
MART_ATTACK = AttackDefaults(start="gaussian", norm_stats="running")
"""Cross-entropy, a Gaussian start of 0.001, the net in eval mode."""


class TrainingAttack:
    """A recipe's section with its autos filled in.

    Args:
        config: the section.
        defaults: the method's own attack.
        seed: of the random starts.
    """

    def __init__(self, config: AttackConfig, defaults: AttackDefaults, seed: int):
        self._config, self._seed = config, seed
        self._start: Start = defaults.start if config.start == "auto" else config.start
        default = "ce" if config.targeted else defaults.loss
        self._loss = default if config.loss == "auto" else config.loss
        self.norm_stats: NormStats = defaults.norm_stats if config.norm_stats == "auto" else config.norm_stats

    def at(self, epoch: float) -> Attack:
        """The attack of the step that begins at an epoch, counted from 0, in parts of one."""
        config = self._config
        eps = eps_at(config, epoch)
        if config.name == "nfgsm":
            return NFGSM(eps, step_size(config, eps), seed=self._seed)
        steps = steps_at(config, epoch)
        if config.name == "apgd":
            return APGD(config.norm, eps, steps, self._start, self._seed)
        return PGD(config.norm, eps, step_size(config, eps), steps, self._start, self._seed)

    def noise_at(self, epoch: float) -> Callable[[Tensor, Tensor], Tensor]:
        """From pictures and keys to pictures at a uniform point of the ball, where no attack is wanted."""
        start = PGD(self._config.norm, eps_at(self._config, epoch), 0.0, steps=0, start="uniform", seed=self._seed)
        return lambda pixels, keys: start(lambda x: x.new_zeros(len(x)), pixels, keys)

    def loss(self, net: Net, pixels: Tensor, targets: Tensor, keys: Tensor) -> Net:
        """What the attack climbs, from pictures [B,3,H,W] to a loss a sample [B].

        Args:
            net: from pixels to logits [B,C], in the mode that it is attacked in.
            pixels: clean pictures [B,3,H,W].
            targets: int64 [B], or shares of the classes [B,C].
            keys: int64 [B], names of the samples' visits.
        """
        if self._config.targeted:
            return lambda x: self._towards_others(net(x), hard_labels(targets), keys)
        if self._loss == "kl":
            with torch.no_grad():
                clean = net(pixels)
            return lambda x: kl(net(x), clean)
        loss = {"ce": cross_entropy, "dlr": dlr}[self._loss]
        return lambda x: loss(net(x), targets)

    def _towards_others(self, logits: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        others = random_target(keys, labels, logits.shape[1], self._seed)
        return targeted_dlr(logits, labels, others) if self._loss == "dlr" else -cross_entropy(logits, others)


def eps_at(config: AttackConfig, epoch: float) -> float:
    """Radius at an epoch: a straight line from zero over the warm-up, then `eps`."""
    warmup = config.eps_warmup_epochs
    return config.eps * min(1.0, epoch / warmup) if warmup else config.eps


def steps_at(config: AttackConfig, epoch: float) -> int:
    """Number of steps at an epoch: that of the last pair of `steps_from` that has begun, else `steps`."""
    return last_begun(config.steps_from, epoch, config.steps or (1 if config.name == "fgsm" else 10))


def step_size(config: AttackConfig, eps: float) -> float:
    """Length of a step when the radius stands at `eps`: what the section gives for its own eps, in proportion."""
    share = {"pgd": 0.25, "fgsm": 1.25, "nfgsm": 1.0}[config.name]
    return eps * (share if config.step_size is None else config.step_size / config.eps)
