"""The training methods, one file each: a module that returns its loss and named parts."""

from __future__ import annotations

from arat_dist.attacks import PGD
from arat_dist.config import ARATConfig, ATConfig, AttackConfig, Recipe
from arat_dist.models.classifier import build_classifier
from arat_dist.objectives.arat import ARAT
from arat_dist.objectives.at import AT
from arat_dist.objectives.base import Objective
from arat_dist.objectives.standard import Standard


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's net inside the recipe's method, on the CPU, weights as the current torch seed draws them."""
    config = recipe.objective
    tapped = isinstance(config, ARATConfig)
    classifier = build_classifier(
        recipe.model,
        num_classes=recipe.data.num_classes,
        image_size=recipe.data.image_size,
        split=config.split_norm if tapped else "none",
        taps=config.taps if tapped else None,
    )
    attack, stats, precision = (
        training_attack(recipe.attack, recipe.train.seed),
        recipe.attack.norm_stats,
        recipe.train.precision,
    )
    if isinstance(config, ARATConfig):
        return ARAT(classifier, attack, config, norm_stats=stats, precision=precision)
    if isinstance(config, ATConfig):
        return AT(classifier, attack, norm_stats=stats, precision=precision, label_smoothing=config.label_smoothing)
    return Standard(classifier, precision=precision, label_smoothing=config.label_smoothing)


def training_attack(config: AttackConfig, seed: int) -> PGD:
    """The attack of the training step, out of the recipe's section."""
    return PGD(config.norm, config.eps, config.step_size, config.steps, config.random_start, seed)
