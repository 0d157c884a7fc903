"""Clean and robust accuracy: sharded over the ranks, with exact counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arat_dist.attacks import APGD, PGD, Attack
from arat_dist.config import DataConfig, EvalConfig, Recipe
from arat_dist.data.loader import Loader, val_loader
from arat_dist.data.order import eval_shares, spread
from arat_dist.engine import Rank
from arat_dist.losses import cross_entropy
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.base import to_pixels


@dataclass(frozen=True)
class Scores:
    """Exact counts over all ranks, and the attack that they stand for.

    A sample counts as robust when it is right before and after the attack.
    """

    num_samples: int
    num_clean: int
    num_robust: int | None
    attack: str
    attack_steps: int
    norm: str
    eps: float

    @property
    def clean_accuracy(self) -> float:
        """Fraction of clean pictures that are classified rightly."""
        return self.num_clean / self.num_samples

    @property
    def robust_accuracy(self) -> float | None:
        """Fraction that is right before and after the attack; None without an attack."""
        return None if self.num_robust is None else self.num_robust / self.num_samples

    def summary(self) -> dict[str, Any]:
        """The keys of summary.json that it fills."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_attack": self.attack,
            "norm": self.norm,
            "eps": self.eps,
            "attack_steps": self.attack_steps,
            "num_samples": self.num_samples,
        }


def evaluate(
    classifier: Classifier,
    data: DataConfig,
    config: EvalConfig,
    rank: Rank,
    beat: Callable[[], None] = lambda: None,
) -> Scores:
    """Evaluate on data.val with the attack that the section names; every rank calls it and gets the same scores.

    `config.norm` and `config.eps` must be given (`eval_config` fills them from a recipe). `beat` is called after every
    batch.
    """
    assert config.norm is not None
    assert config.eps is not None
    attack = evaluation_attack(config)
    with val_loader(data, config.batch_size) as loader:
        shares = subset_shares(loader.num_samples, config, rank)
        counts = count_correct(classifier, loader, shares, attack, rank.device, beat)
    num_samples, num_clean, num_robust = rank.all_reduce(counts).tolist()
    return Scores(
        num_samples,
        num_clean,
        num_robust if attack else None,
        attack=config.attack,
        attack_steps=attack.steps if attack else 0,
        norm=config.norm,
        eps=config.eps,
    )


def eval_config(recipe: Recipe) -> EvalConfig:
    """The recipe's eval section, norm and eps taken over from the attack in training where it doesn't name them."""
    norm, eps = recipe.eval.norm or recipe.attack.norm, recipe.eval.eps or recipe.attack.eps
    return recipe.eval.model_copy(update={"norm": norm, "eps": eps})


def evaluation_attack(config: EvalConfig) -> PGD | APGD | None:
    """The attack named pgdN (steps of eps/4) or apgdN (100 steps if unsaid), one uniform start; None for "none"."""
    if config.attack == "none":
        return None
    assert config.norm is not None
    assert config.eps is not None
    if config.attack.startswith("apgd"):
        return APGD(config.norm, config.eps, int(config.attack.removeprefix("apgd") or 100), seed=config.seed)
    return PGD(config.norm, config.eps, config.eps / 4, int(config.attack.removeprefix("pgd")), seed=config.seed)


def subset_shares(num_samples: int, config: EvalConfig, rank: Rank) -> list[np.ndarray]:
    """This rank's batches of indices: every sample of the (possibly limited) set exactly once over all ranks."""
    limit = min(num_samples, config.limit or num_samples)
    subset = spread(num_samples, limit)
    return [subset[share] for share in eval_shares(limit, config.batch_size, rank.index, rank.world_size)]


def count_correct(
    classifier: Classifier,
    loader: Loader,
    shares: Sequence[np.ndarray],
    attack: Attack | None,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Samples, those right on the clean picture, and those right on it and after the attack: int64 [3] of this rank.

    The net is in eval mode and in full precision, and its adv branch is the one measured.
    """
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # else convolutions on GPUs use it
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    was_training = classifier.training
    classifier.eval()
    with classifier.branch("adv"):
        for images, labels, keys in loader.iterate(shares):
            pixels = to_pixels(images.to(device), classifier.dtype)
            right = verdicts(classifier, pixels, labels.to(device), keys.to(device), attack)
            counts += torch.stack([counts.new_tensor(len(labels)), *(verdict.sum() for verdict in right)])
            beat()
    classifier.train(was_training)
    torch.backends.cudnn.allow_tf32 = tf32
    return counts


def verdicts(
    classifier: Classifier, pixels: Tensor, labels: Tensor, keys: Tensor, attack: Attack | None
) -> tuple[Tensor, Tensor]:
    """Whether each sample is right on the clean picture, and on it and after the attack: two bool [B]."""
    with torch.no_grad():
        clean = classifier(pixels).argmax(1) == labels
    if attack is None:
        return clean, clean
    adversarial = attack(lambda x: cross_entropy(classifier(x), labels), pixels, keys)
    with torch.no_grad():
        return clean, clean & (classifier(adversarial).argmax(1) == labels)
