"""What the keys of a recipe mean for each other: checks that need nothing but the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from arat_dist.config import ARATConfig, LBGATConfig, Recipe, TRADESConfig
from arat_dist.errors import UserError


def check_fields(recipe: Recipe, source: str) -> None:
    """Refuse keys that don't go together (UserError); `source` names the recipe."""
    faults = (_radius, _attack, _attack_course, _loss, _data, _image_sizes, _starts, _optim, _step, _train, _cluster)
    for message in chain.from_iterable(find(recipe) for find in faults):
        raise UserError(f"{source}: {message}")


def _radius(recipe: Recipe) -> Iterator[str]:
    attack, evaluation = recipe.attack, recipe.eval
    radii = [("attack.eps", attack.norm, attack.eps, recipe.data.training_sizes[0])]
    key, norm = "eval.eps" if evaluation.eps is not None else "attack.eps", evaluation.norm or attack.norm
    radii.append((key, norm, evaluation.eps or attack.eps, recipe.data.image_size))
    for key, norm, eps, side in radii:
        if norm == "linf" and eps > 1:
            yield f"{key}: {eps:g}: pixels are in [0,1], so linf eps is at most 1 (8/255 is usual)"
        if norm == "l1" and eps > 3 * side**2:
            yield f"{key}: {eps:g}: pixels are in [0,1], so l1 eps is at most 3*{side}^2 ({3 * side**2})"
    if evaluation.norm not in (None, attack.norm) and evaluation.eps is None:
        yield f"eval.norm: {evaluation.norm}: give eval.eps too, attack.eps is a radius in {attack.norm}"


def _attack(recipe: Recipe) -> Iterator[str]:
    attack = recipe.attack
    if attack.step_size is not None and attack.name == "apgd":
        yield f"attack.step_size: {attack.step_size:g}: goes without apgd, which finds its own"
    if attack.step_size is not None and attack.step_size > 2 * attack.eps:
        yield f"attack.step_size: {attack.step_size:g}: at most twice attack.eps ({2 * attack.eps:g}) has a use"
    if attack.name in ("fgsm", "nfgsm") and (attack.steps not in (None, 1) or attack.steps_from):
        yield f"attack.steps: {attack.steps}: {attack.name} takes 1 step; pgd takes more"
    if attack.name == "nfgsm" and (attack.norm != "linf" or attack.start not in ("auto", "uniform")):
        yield f"attack.name: nfgsm: goes with norm linf and start uniform, here {attack.norm} and {attack.start}"


def _attack_course(recipe: Recipe) -> Iterator[str]:
    attack, epochs = recipe.attack, recipe.train.epochs
    yield from _course("attack.steps_from", attack.steps_from, epochs)
    if attack.eps_warmup_epochs >= epochs:
        yield f"attack.eps_warmup_epochs: {attack.eps_warmup_epochs:g}: less than train.epochs ({epochs})"


def _course(key: str, course: tuple[tuple[float, int], ...], epochs: int) -> Iterator[str]:
    """Faults of pairs of an epoch and what holds from its beginning on."""
    begins, pairs = [epoch for epoch, _ in course], [list(pair) for pair in course]
    if begins != sorted(set(begins)):
        yield f"{key}: {pairs}: ascending epochs"
    if any(epoch >= epochs for epoch in begins):
        yield f"{key}: {pairs}: epochs below train.epochs ({epochs})"


def _loss(recipe: Recipe) -> Iterator[str]:
    attack, objective, num_classes = recipe.attack, recipe.objective, recipe.data.num_classes
    if attack.targeted and attack.loss == "kl":
        yield "attack.targeted: true: goes with attack.loss ce or dlr, here kl"
    if attack.loss == "dlr" and num_classes < 3 + attack.targeted:
        yield f"attack.loss: dlr: needs {3 + attack.targeted} classes, data.num_classes is {num_classes}"
    by_default = isinstance(objective, TRADESConfig | LBGATConfig) and not attack.targeted
    if attack.start == "none" and (attack.loss == "kl" or (attack.loss == "auto" and by_default)):
        yield (
            "attack.start: none: KL from the clean prediction has no slope at the picture itself; gaussian or uniform "
            "would be right"
        )
    if isinstance(objective, ARATConfig) and objective.gamma > 0 and not objective.taps:
        yield "objective.gamma: goes with at least one of objective.taps; 0, or taps: auto, would be right"


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.augment == "pad_crop" and data.padding > data.image_size // 2:
        yield f"data.padding: {data.padding}: at most half of data.image_size ({data.image_size})"
    if not 0 < data.crop_scale[0] <= data.crop_scale[1]:
        yield f"data.crop_scale: {list(data.crop_scale)}: two fractions, the smaller first and above 0"


def _image_sizes(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    yield from _course("data.image_sizes_from", data.image_sizes_from, recipe.train.epochs)
    if data.image_sizes_from and data.augment == "pad_crop":
        pairs = [list(pair) for pair in data.image_sizes_from]
        yield (
            f"data.image_sizes_from: {pairs}: goes without data.augment pad_crop, whose pictures have one size; "
            "random_resized_crop would be right"
        )


def _starts(recipe: Recipe) -> Iterator[str]:
    models = {"model": recipe.model}
    if isinstance(recipe.objective, LBGATConfig) and recipe.objective.teacher is not None:
        models["objective.teacher"] = recipe.objective.teacher
    for key, model in models.items():
        if model.pretrained and model.checkpoint is not None:
            yield f"{key}.checkpoint: {model.checkpoint}: goes without {key}.pretrained; one of them starts the net"


def _optim(recipe: Recipe) -> Iterator[str]:
    optim, epochs = recipe.optim, recipe.train.epochs
    if optim.warmup_epochs >= epochs:
        yield f"optim.warmup_epochs: {optim.warmup_epochs:g}: less than train.epochs ({epochs})"
    milestones = list(optim.milestones)
    if (optim.schedule == "step") != bool(milestones):
        yield f"optim.milestones: {milestones}: goes with optim.schedule step, here {optim.schedule}"
    if milestones != sorted(set(milestones)):
        yield f"optim.milestones: {milestones}: ascending epochs"
    if any(epoch >= epochs for epoch in milestones):
        yield f"optim.milestones: {milestones}: below train.epochs ({epochs})"
    if optim.schedule == "cosine" and optim.min_lr > optim.lr:
        yield f"optim.min_lr: {optim.min_lr:g}: at most optim.lr ({optim.lr:g})"
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        yield f"optim.nesterov: true: goes with sgd and momentum, here {optim.name}, {optim.momentum:g}"


def _step(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    num_pairs = max(1, train.global_batch_size // (2 * recipe.world_size))
    if train.micro_batches > num_pairs:
        yield (
            f"train.micro_batches: {train.micro_batches}: at most {num_pairs}: a part has 2 pictures or more, and "
            f"{recipe.world_size} workers share train.global_batch_size ({train.global_batch_size})"
        )
    for key, value in (
        ("train.sync_norms", train.sync_norms),
        ("train.grad_checkpointing", train.grad_checkpointing),
        ("track.diagnostics_every", recipe.track.diagnostics_every is not None),
    ):
        if train.compile and value:
            yield f"train.compile: true: goes without {key}"
    for key, value in (
        ("train.precision fp16, whose steps may be taken twice", train.precision == "fp16"),
        ("engine.kind deepspeed", recipe.engine.kind == "deepspeed"),
        ("train.grad_checkpointing", train.grad_checkpointing),
    ):
        if train.cuda_graph and value:
            yield f"train.cuda_graph: true: goes without {key}"


def _train(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.global_batch_size < 2 * recipe.world_size:
        yield f"train.global_batch_size: {train.global_batch_size}: at least 2 a worker ({recipe.world_size})"
    if train.swa_start_epoch is not None and train.swa_start_epoch >= train.epochs:
        yield (
            f"train.swa_start_epoch: {train.swa_start_epoch:g}: less than train.epochs ({train.epochs}), or nothing is "
            "averaged"
        )


def _cluster(recipe: Recipe) -> Iterator[str]:
    cluster = recipe.cluster
    if cluster.placement == "strict_spread" and cluster.address is None and cluster.max_workers > 1:
        yield f"cluster.placement: strict_spread: goes with cluster.address, or with one worker, not {cluster.workers}"
