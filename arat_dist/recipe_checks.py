"""What keys of a recipe say to each other: checks that need nothing but the recipe."""

from __future__ import annotations

from arat_dist.config import ARATConfig, LBGATConfig, Recipe, TRADESConfig
from arat_dist.errors import UserError


def check_fields(recipe: Recipe, source: str) -> None:
    """Checks between fields that need nothing but the recipe (UserError; `source` names it)."""
    attack, optim, data = recipe.attack, recipe.optim, recipe.data
    climbs_kl = isinstance(recipe.objective, TRADESConfig | LBGATConfig) and not attack.targeted
    teacher = recipe.objective.teacher if isinstance(recipe.objective, LBGATConfig) else None
    largest_l1 = 3 * data.image_size**2
    l1_limit = f"pixels are in [0,1], so l1 eps is at most 3*image_size^2 ({largest_l1})"
    checks = [
        (
            attack.norm == "linf" and attack.eps > 1,
            f"attack.eps: {attack.eps:g}: pixels are in [0,1], so linf eps is at most 1 (8/255 is usual)",
        ),
        (
            recipe.eval.eps is not None and (recipe.eval.norm or attack.norm) == "linf" and recipe.eval.eps > 1,
            f"eval.eps: {recipe.eval.eps or 0:g}: pixels are in [0,1], so linf eps is at most 1 (8/255 is usual)",
        ),
        (
            attack.norm == "l1" and attack.eps > largest_l1,
            f"attack.eps: {attack.eps:g}: {l1_limit}",
        ),
        (
            recipe.eval.eps is not None and (recipe.eval.norm or attack.norm) == "l1" and recipe.eval.eps > largest_l1,
            f"eval.eps: {recipe.eval.eps or 0:g}: {l1_limit}",
        ),
        (
            recipe.eval.norm not in (None, attack.norm) and recipe.eval.eps is None,
            f"eval.norm: {recipe.eval.norm}: give eval.eps too, attack.eps is a radius in {attack.norm}",
        ),
        (
            attack.step_size is not None and attack.step_size > 2 * attack.eps,
            f"attack.step_size: {attack.step_size or 0:g}: at most twice attack.eps ({2 * attack.eps:g}) has a use",
        ),
        (
            attack.name == "apgd" and attack.step_size is not None,
            f"attack.step_size: {attack.step_size or 0:g}: goes without apgd, which finds its own",
        ),
        (
            attack.name in ("fgsm", "nfgsm") and (attack.steps not in (None, 1) or bool(attack.steps_from)),
            f"attack.steps: {attack.steps}: {attack.name} takes 1 step; pgd takes more",
        ),
        (
            attack.name == "nfgsm" and (attack.norm != "linf" or attack.start not in ("auto", "uniform")),
            f"attack.name: nfgsm: goes with norm linf and start uniform, here {attack.norm} and {attack.start}",
        ),
        (
            attack.targeted and attack.loss == "kl",
            "attack.targeted: true: goes with attack.loss ce or dlr, here kl",
        ),
        (
            [epoch for epoch, _ in attack.steps_from] != sorted({epoch for epoch, _ in attack.steps_from}),
            f"attack.steps_from: {[list(pair) for pair in attack.steps_from]}: ascending epochs",
        ),
        (
            attack.loss == "dlr" and data.num_classes < 3 + attack.targeted,
            f"attack.loss: dlr: needs {3 + attack.targeted} classes, data.num_classes is {data.num_classes}",
        ),
        (
            isinstance(recipe.objective, ARATConfig) and recipe.objective.gamma > 0 and not recipe.objective.taps,
            "objective.gamma: goes with at least one of objective.taps; 0, or taps: auto, would be right",
        ),
        (
            recipe.train.swa_start_epoch is not None and recipe.train.swa_start_epoch >= recipe.train.epochs,
            f"train.swa_start_epoch: {recipe.train.swa_start_epoch or 0:g}: less than train.epochs "
            f"({recipe.train.epochs}), or nothing is averaged",
        ),
        (
            optim.warmup_epochs >= recipe.train.epochs,
            f"optim.warmup_epochs: {optim.warmup_epochs:g}: less than train.epochs ({recipe.train.epochs})",
        ),
        (
            optim.schedule == "step" and list(optim.milestones) != sorted(set(optim.milestones)),
            f"optim.milestones: {list(optim.milestones)}: ascending epochs",
        ),
        (
            optim.schedule == "step" and any(epoch >= recipe.train.epochs for epoch in optim.milestones),
            f"optim.milestones: {list(optim.milestones)}: below train.epochs ({recipe.train.epochs})",
        ),
        (
            data.augment == "pad_crop" and data.padding > data.image_size // 2,
            f"data.padding: {data.padding}: at most half of data.image_size ({data.image_size})",
        ),
        (
            (optim.schedule == "step") != bool(optim.milestones),
            f"optim.milestones: {list(optim.milestones)}: goes with optim.schedule step, here {optim.schedule}",
        ),
        (
            optim.schedule == "cosine" and optim.min_lr > optim.lr,
            f"optim.min_lr: {optim.min_lr:g}: at most optim.lr ({optim.lr:g})",
        ),
        (
            optim.nesterov and (optim.name != "sgd" or optim.momentum == 0),
            f"optim.nesterov: true: goes with sgd and momentum, here {optim.name}, {optim.momentum:g}",
        ),
        (
            recipe.train.global_batch_size < 2 * recipe.world_size,
            f"train.global_batch_size: {recipe.train.global_batch_size}: at least 2 a worker ({recipe.world_size})",
        ),
        (
            data.crop_scale[0] <= 0 or data.crop_scale[0] > data.crop_scale[1],
            f"data.crop_scale: {list(data.crop_scale)}: two fractions, the smaller first and above 0",
        ),
        (
            attack.eps_warmup_epochs >= recipe.train.epochs and attack.eps_warmup_epochs > 0,
            f"attack.eps_warmup_epochs: {attack.eps_warmup_epochs:g}: less than train.epochs ({recipe.train.epochs})",
        ),
        (
            any(epoch >= recipe.train.epochs for epoch, _ in attack.steps_from),
            f"attack.steps_from: {[list(pair) for pair in attack.steps_from]}: epochs below train.epochs "
            f"({recipe.train.epochs})",
        ),
        (
            attack.start == "none" and (attack.loss == "kl" or (attack.loss == "auto" and climbs_kl)),
            "attack.start: none: KL from the clean prediction has no slope at the picture itself; gaussian or uniform "
            "would be right",
        ),
        (
            teacher is not None and teacher.pretrained and teacher.checkpoint is not None,
            "objective.teacher.checkpoint: goes without objective.teacher.pretrained; one of them starts the net",
        ),
        (
            recipe.model.pretrained and recipe.model.checkpoint is not None,
            f"model.checkpoint: {recipe.model.checkpoint}: goes without model.pretrained; one of them starts the net",
        ),
    ]
    for failed, message in checks:
        if failed:
            raise UserError(f"{source}: {message}")
