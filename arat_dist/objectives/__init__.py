"""The training methods, one a file; `build_objective` makes the one that a recipe names."""

from __future__ import annotations

from arat_dist.config import (
    ARATConfig,
    ARRESTConfig,
    ATConfig,
    LBGATConfig,
    MARTConfig,
    ModelConfig,
    Recipe,
    TRADESConfig,
)
from arat_dist.errors import UserError
from arat_dist.mixing import Mixing
from arat_dist.models.classifier import Classifier, build_classifier, check_penultimate
from arat_dist.models.recompute import recompute_stages
from arat_dist.models.sync_norm import synchronise_norms
from arat_dist.objectives.arat import ARAT
from arat_dist.objectives.arrest import ARREST
from arat_dist.objectives.at import AT
from arat_dist.objectives.attack import TrainingAttack
from arat_dist.objectives.base import Objective, Setting
from arat_dist.objectives.lbgat import LBGAT
from arat_dist.objectives.mart import MART
from arat_dist.objectives.standard import Standard
from arat_dist.objectives.trades import TRADES

METHODS: dict[str, type[Objective]] = {
    "standard": Standard,
    "at": AT,
    "trades": TRADES,
    "mart": MART,
    "lbgat": LBGAT,
    "arrest": ARREST,
    "arat": ARAT,
}


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's net inside the recipe's method, on the CPU, weights as the current torch seed draws them."""
    objective = _build_method(recipe)
    if recipe.train.sync_norms:
        synchronise_norms(objective)
    return objective


def _build_method(recipe: Recipe) -> Objective:
    """The method with norms whose batch statistics are each worker's own."""
    classifier, setting = _build_net(recipe, recipe.model), build_setting(recipe)
    match recipe.objective:
        case ARATConfig() as config:
            return ARAT(classifier, setting, config)
        case TRADESConfig() as config:
            return TRADES(classifier, setting, config)
        case MARTConfig() as config:
            return MART(classifier, setting, config)
        case LBGATConfig() as config:
            return LBGAT(classifier, setting, config, _build_teacher(recipe, config))
        case ARRESTConfig() as config:
            check_penultimate(classifier, recipe.model.name, recipe.data.image_size)
            return ARREST(classifier, setting, config)
        case ATConfig():
            return AT(classifier, setting)
        case _:
            return Standard(classifier, setting)


def build_setting(recipe: Recipe) -> Setting:
    """What the recipe gives to every method; the attack's autos are the method's own."""
    data, seed = recipe.data, recipe.train.seed
    defaults = METHODS[recipe.objective.name].attack_defaults
    return Setting(
        attack=TrainingAttack(recipe.attack, defaults, seed),
        precision=recipe.train.precision,
        label_smoothing=recipe.objective.label_smoothing,
        mixing=Mixing(data.mixup, data.cutmix, data.num_classes, seed) if data.mixup or data.cutmix else None,
    )


def _build_teacher(recipe: Recipe, config: LBGATConfig) -> Classifier:
    if config.teacher is None:
        return _build_net(recipe, recipe.model)
    try:
        return _build_net(recipe, config.teacher)
    except UserError as error:
        raise UserError(str(error).replace("model.", "objective.teacher.", 1)) from error


def _build_net(recipe: Recipe, model: ModelConfig) -> Classifier:
    config = recipe.objective if isinstance(recipe.objective, ARATConfig) else None
    classifier = build_classifier(
        model,
        num_classes=recipe.data.num_classes,
        image_size=recipe.data.image_size,
        split=config.split_norm if config else "none",
        taps=config.taps if config else None,
    )
    if recipe.train.grad_checkpointing:
        recompute_stages(classifier)
    return classifier
