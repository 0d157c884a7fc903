"""The loop: `train` reads as the story of a run, from the first weights to the measured accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arat_dist.agreement import Agreement, Wish
from arat_dist.averaging import Average, build_averages, restate
from arat_dist.checkpoint import checkpoint_name, load_newest
from arat_dist.config import Recipe
from arat_dist.cuda_graph import build_step, is_captured
from arat_dist.data.copies import copied_ahead
from arat_dist.data.loader import train_loader
from arat_dist.data.manifest import Manifest, load_manifest
from arat_dist.data.order import SampleOrder
from arat_dist.data.staging import stage_data
from arat_dist.device_augment import build_device_augment
from arat_dist.devices import device_errors, device_name
from arat_dist.diagnostics import branch_distance, gradient_conflict
from arat_dist.engine import Engine, Rank, averaged_statistics, build_engine
from arat_dist.errors import StoppedError
from arat_dist.evaluate import eval_config, evaluate
from arat_dist.guard import DivergedError, SkipCounter
from arat_dist.metrics import MetricsLog
from arat_dist.models.backbone import with_centre_crop
from arat_dist.models.classifier import Classifier
from arat_dist.numerics import training_numerics
from arat_dist.objectives import build_objective
from arat_dist.objectives.base import Objective, Output
from arat_dist.optim import lr_at
from arat_dist.run import Run
from arat_dist.saving import Saver, capture, take_up
from arat_dist.step import micro_batches, part_sizes
from arat_dist.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(recipe: Recipe, run: Run, rank: Rank) -> dict[str, Any]:
    """Train on one rank, going on from the run's newest good checkpoint, and evaluate the result.

    Every rank calls it; the first one writes the run's files. Returns the training's part of the summary.

    Raises:
        StoppedError: `rank.stop_wanted` of some rank; there is a checkpoint.
        DivergedError: the gradient stayed no number, also after going back to the newest checkpoint.
    """
    diverged_at = 0
    while True:
        try:
            return train_once(recipe, run, rank)
        except DivergedError as error:
            if error.step <= diverged_at:
                raise
            diverged_at = error.step
            logger.warning("%s; going back to the newest checkpoint", error)
            # The first rank may still have written one: all look for the newest when it is there.
            rank.all_reduce(torch.zeros(1, device=rank.device))


def train_once(recipe: Recipe, run: Run, rank: Rank) -> dict[str, Any]:
    """`train`, until the gradient is no number too often."""
    with watchdog(recipe, run, rank) as beat, training_numerics(recipe.train), device_errors(recipe, rank):
        stage_data(recipe.data)
        return train_watched(recipe, run, rank, beat)


def train_watched(recipe: Recipe, run: Run, rank: Rank, beat: Callable[..., None]) -> dict[str, Any]:
    """The story; `beat` is called after every step, and every batch of what takes longer than one."""
    settings = recipe.train
    logger.info("training on %s", device_name(rank.device))
    torch.manual_seed(settings.seed)
    order = sample_order(recipe)
    checkpoint = load_newest(run.checkpoints)
    # A checkpoint holds all weights: what the net started from is not asked for again.
    objective = build_objective(recipe if checkpoint is None else recipe.without_start())
    recipe = recipe.model_copy(update={"data": with_centre_crop(recipe.data, objective.classifier.backbone)})
    # Before the engine, which may shard the weights that are copied here.
    averages = build_averages(recipe, objective.to(rank.device).classifier, order.num_samples)
    engine = build_engine(
        objective,
        recipe.engine,
        recipe.optim,
        rank,
        scales_loss=settings.precision == "fp16",
        capturable=is_captured(recipe, rank),
    )
    if checkpoint is not None:
        take_up(checkpoint, engine, averages, rank)
        logger.info("going on after step %d", checkpoint.step)
    start = 0 if checkpoint is None else checkpoint.step
    stop = max(start, num_steps(recipe))
    check_agreement(start, load_manifest(recipe.data.train), rank)
    log, take_step = MetricsLog(run, rank, checkpoint), build_step(engine, recipe, rank)
    skips = SkipCounter(run, order, most=settings.max_skipped_steps, last=stop, writes=rank.is_first)
    agreement = Agreement(rank, settings.checkpoint_minutes, recipe.cluster.collective_timeout_s)
    check = begin(run, rank, step=start, num_steps=stop)
    log.write_only_if(check)

    def inspect(out: Output, share: float) -> None:
        log.note(diagnose(objective, out.terms, share, rank))

    augment = build_device_augment(recipe.data, settings.seed)
    objective.train()
    if settings.compile:
        full_share = order.share(0, rank.index, rank.world_size)
        sizes = set(part_sizes(len(full_share), settings.micro_batches))
        objective.compile_backbones(sizes, num_sides=len(recipe.data.training_sizes))
    with (
        Saver(
            run.checkpoints, keep=settings.keep_checkpoints, check=check, note=lambda: {"mlflow": run.mlflow()}
        ) as saver,
        train_loader(recipe.data, settings.seed, order.largest_share(rank.world_size)) as loader,
    ):
        shares = order.shares(rank.index, rank.world_size, start, stop)
        batches = loader.iterate(shares, lambda at: image_size(recipe, order, start + at))
        for step, batch in enumerate(log.waiting(copied_ahead(batches, rank.device)), start):
            done, global_size = step + 1, order.batch_size_at(step)
            wish = agreement.exchange()
            engine.set_lr(lr := learning_rate(recipe, order, step))
            objective.begin_step(order.epochs_after(step))
            with log.timing("compute"):
                parts = micro_batches(batch, settings.micro_batches, global_size, rank, augment)
                reseed = partial(seed_step, settings.seed, step, rank)
                look = inspect if is_due(done, recipe.track.diagnostics_every) else None
                result = take_step(parts, rank.world_size / global_size, reseed, look)
            log.add(result)
            update_averages(averages, engine, done)
            if order.ends_epoch(step):
                objective.end_epoch(rank.all_reduce)
            if done == stop:
                with engine.gathered():
                    restate_all(objective, averages, recipe, rank, beat)
            about: dict[str, Any] = {}
            if evaluates := is_evaluation_due(recipe, order, step) and done < stop:
                with engine.gathered():
                    about = evaluate_now(objective, averages, recipe, rank, beat)
                scores = {name: torch.tensor(value, dtype=torch.float64) for name, value in about.items()}
                log.note({f"val_{name}": score.to(rank.device) for name, score in scores.items()})
            if done == stop or evaluates or is_due(done, settings.log_every):
                skips.see(done, log.write(done, order.epochs_after(done), lr, result.gradient_norm))
            if wish or done == stop or is_due(done, settings.checkpoint_every, order.ends_epoch(step)):
                with log.timing("checkpoint"):
                    progress, line = log.state()
                    about |= {"recipe_sha256": recipe.sha256(), "line": line}
                    copy = capture(done, engine, averages, rank, progress, about)
                    if copy is not None:
                        saver.submit(copy, None if wish is Wish.STOP or done == stop else result.finite)
                agreement.saved()
            if wish is Wish.STOP and done < stop:
                finish_saves(saver, agreement, rank, beat)
                raise StoppedError(done)
            beat(compiles=settings.compile and image_size(recipe, order, done) != image_size(recipe, order, step))
        finish_saves(saver, agreement, rank, beat)

    weights, classifier = result_of(objective, averages)
    with engine.gathered(), averaged_statistics(classifier, rank):
        measured = evaluate(classifier, recipe.data, eval_config(recipe), rank, beat)
    return {
        "epochs": settings.epochs,
        "steps": stop,
        "samples_seen": sum(order.batch_size_at(step) for step in range(stop)),
        "world_size": rank.world_size,
        "device": device_name(rank.device),
        "tf32": settings.tf32,
        **measured.summary(),
        "weights": weights,
        "checkpoint": (run.checkpoints / checkpoint_name(stop)).uri if rank.is_first else None,
        **log.summary(),
    }


@contextmanager
def watchdog(recipe: Recipe, run: Run, rank: Rank) -> Iterator[Callable[..., None]]:
    """Inside, a rank that hangs is killed, so that it is restarted; gives what it has to call meanwhile.

    Without workers nobody would restart it, and a debugger may hold it for as long as it likes.
    """
    limits = {"start_timeout_s": recipe.cluster.start_timeout_s, "step_timeout_s": recipe.cluster.step_timeout_s}
    if recipe.cluster.workers == 0:
        yield lambda **_: None
        return
    with Watchdog(run.folder, f"rank{rank.index}", **limits) as dog:
        yield dog.beat


def begin(run: Run, rank: Rank, **values: int) -> Callable[[], None]:
    """Note that this start of the run is the newest one; gives a check that it still is, for before files are written.

    A process that was cut off, by its network for example, may live on and come back when others have gone on.
    """
    if not rank.is_first:
        return lambda: None
    return partial(run.check_attempt, run.begin_attempt(**values, world_size=rank.world_size))


def sample_order(recipe: Recipe) -> SampleOrder:
    """The order of the recipe's samples over the whole run."""
    num_samples = load_manifest(recipe.data.train).num_samples
    data, train = recipe.data, recipe.train
    return SampleOrder(
        num_samples, train.global_batch_size, train.epochs, train.seed, data.shuffle_block, data.shuffle_window
    )


def num_steps(recipe: Recipe) -> int:
    """Steps of the whole run."""
    num_steps = sample_order(recipe).num_steps
    return min(num_steps, recipe.train.max_steps or num_steps)


def learning_rate(recipe: Recipe, order: SampleOrder, step: int) -> float:
    """The rate of one step of the run."""
    return lr_at(
        step,
        recipe.optim,
        num_samples=order.num_samples,
        batch_size=order.batch_size,
        epochs=recipe.train.epochs,
    )


def image_size(recipe: Recipe, order: SampleOrder, step: int) -> int:
    """Side of the pictures of one step of the run, in pixels."""
    return recipe.data.image_size_at(order.epochs_after(step))


def seed_step(seed: int, step: int, rank: Rank) -> None:
    """Make dropout and drop-path functions of (seed, step, rank): a resumed run needs no generator's state."""
    torch.manual_seed(((seed << 31) + step) * 1_000_003 + rank.index & 0x7FFFFFFFFFFFFFFF)


def is_due(done: int, every: int | None, otherwise: bool = False) -> bool:
    """Whether something that happens every so many steps happens after this one; `otherwise` where every is None."""
    return otherwise if every is None else done % every == 0


def diagnose(objective: Objective, terms: Mapping[str, Tensor], share: float, rank: Rank) -> dict[str, Tensor]:
    """The measurements of the diagnostics, the same on all ranks; none of the conflict where a method has one term."""
    conflict = gradient_conflict(objective.classifier, terms, share, rank) if terms else {}
    return conflict | branch_distance(objective.classifier)


def update_averages(averages: Mapping[str, Average], engine: Engine, done: int) -> None:
    """Take the weights after so many steps into the averages that they count for; gathers them at most once."""
    due = [average for average in averages.values() if average.is_due(done)]
    with engine.gathered() if due else nullcontext():
        for average in due:
            average.update(engine.objective.classifier, done)


def finish_saves(saver: Saver, agreement: Agreement, rank: Rank, beat: Callable[[], None]) -> None:
    """Wait for the last checkpoint on all ranks, alive; raises on all of them what they all have to hear of."""
    saver.wait(beat)
    agreement.meet(beat)
    saver.finish(rank)


def restate_all(
    objective: Objective, averages: Mapping[str, Average], recipe: Recipe, rank: Rank, beat: Callable[[], None]
) -> None:
    """Measure the norm statistics of every averaged net anew, at the end of the run."""
    for average in averages.values():
        if average.has_begun:
            restate(objective, average.classifier, recipe, rank, beat)


def result_of(objective: Objective, averages: Mapping[str, Average]) -> tuple[str, Classifier]:
    """Name and net of the weights that the run is for: those of the last average that has begun, else the raw ones."""
    nets = {"raw": objective.classifier} | {name: each.classifier for name, each in averages.items() if each.has_begun}
    return list(nets.items())[-1]


def is_evaluation_due(recipe: Recipe, order: SampleOrder, step: int) -> bool:
    """Whether an evaluation in the course of training follows a step."""
    every = recipe.eval.every
    return every is not None and order.ends_epoch(step) and (order.epoch_of(step) + 1) % every == 0


def evaluate_now(
    objective: Objective, averages: Mapping[str, Average], recipe: Recipe, rank: Rank, beat: Callable[[], None]
) -> dict[str, float]:
    """Clean and robust accuracy in the course of training, of the raw weights or their EMA.

    An average of weights that hasn't its norms' statistics measured, SWA's, says nothing yet.
    """
    net = averages["ema"].classifier if "ema" in averages and averages["ema"].has_begun else objective.classifier
    config = eval_config(recipe).model_copy(
        update={"attack": recipe.eval.every_attack, "limit": recipe.eval.every_limit}
    )
    with averaged_statistics(net, rank):
        scores = evaluate(net, recipe.data, config, rank, beat)
    accuracies = {"clean_accuracy": scores.clean_accuracy, "robust_accuracy": scores.robust_accuracy}
    return {name: value for name, value in accuracies.items() if value is not None}


def check_agreement(start: int, manifest: Manifest, rank: Rank) -> None:
    """Refuse ranks that would go on from different steps, or on different pictures; every rank calls it.

    Raises:
        RuntimeError: on all ranks, with what each of them has.
    """
    all_ranks = torch.zeros(rank.world_size, 2, dtype=torch.int64, device=rank.device)
    all_ranks[rank.index] = torch.tensor([start, int(manifest.sha256[:15], 16)])
    steps, sets = rank.all_reduce(all_ranks).unbind(1)
    if (steps != steps[0]).any():
        raise RuntimeError(
            f"the workers found checkpoints of different steps ({steps.tolist()}); a cluster.storage that all machines "
            "share would be right"
        )
    if (sets != sets[0]).any():
        raise RuntimeError("the workers have different files under data.train; copies of one .beton would be right")
