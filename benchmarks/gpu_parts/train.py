"""Part train: CIFAR-10 with ARAT for the time that is left, then its accuracy under attack."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from arat_dist.bench.step import synthetic_batch
from arat_dist.checkpoint import load_newest
from arat_dist.config import Recipe
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import Rank
from arat_dist.errors import StoppedError
from arat_dist.evaluate import eval_config, evaluate
from arat_dist.evaluation.attacks import evaluation_attacks
from arat_dist.evaluation.net import attacked
from arat_dist.evaluation.stages import cut
from arat_dist.numerics import training_numerics
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from arat_dist.targets import load_weights
from arat_dist.train import train

from .journal import Journal, WrongError
from .pictures import NUM_CLASSES, Sets, cifar_or_digits
from .settings import Settings
from .steps import DeviceStep, timed_in_turn

ATTACKS = ("pgd20", "apgd-ce,apgd-t")
_NUM_EVALUATED = 1000
_SAVE_S = 10.0
"""For the last checkpoint, and for what else is not foreseen."""


def run(settings: Settings, journal: Journal) -> None:
    """Measure a few steps, fix the number of epochs, train, evaluate."""
    sets: list[Sets] = []

    def make() -> dict[str, Any]:
        sets.append(cifar_or_digits(settings.archive, settings.scratch))
        return {"pictures": sets[0].name, "num_train": load_manifest(sets[0].train).num_samples}

    journal.run("make pictures", make, limit_s=50)
    if not sets:
        return
    recipe = train_recipe(settings, sets[0])
    plan = journal.run("a few steps", partial(measure, recipe, settings, journal), limit_s=170)
    if plan["status"] != "ok":
        return
    recipe = with_epochs(recipe, plan["epochs"])
    until = time.monotonic() + journal.seconds_left() - plan["evaluation_s"] - _SAVE_S / 2
    journal.run("training", partial(trained, recipe, settings, until), limit_s=3600)
    for attack, count in zip(ATTACKS, (recipe.eval.limit or _NUM_EVALUATED, plan["num_evaluated"]), strict=True):
        journal.run(f"clean and {attack}", partial(evaluated, recipe, settings, attack, count), limit_s=600)
    journal.run("accuracies", partial(check_accuracies, journal, settings))


def train_recipe(settings: Settings, sets: Sets) -> Recipe:
    """The paper's settings on a cosine schedule, compiled and graphed on a GPU; a small net where all is small."""
    is_gpu = settings.device.type == "cuda"
    overrides: dict[str, Any] = {
        "data.train": str(sets.train),
        "data.val": str(sets.val),
        "data.loader": "torchvision",
        "data.loader_threads": max(1, len(os.sched_getaffinity(0)) - 2),
        "optim.schedule": "cosine",
        "optim.milestones": [],
        "train.precision": "bf16",
        "train.compile": is_gpu,
        "train.cuda_graph": is_gpu,
        "train.log_every": 100,
        "train.keep_checkpoints": 1,
        "eval.attack": "none",
        "eval.limit": _NUM_EVALUATED,
        "track.mlflow": False,
        "cluster.workers": 0,
    }
    if sets.name == "digits":
        overrides |= {"data.flip": False}
    if settings.small:
        overrides |= {"model.args": {"channels": [8, 8, 8, 8]}, "attack.steps": 2, "train.log_every": 2}
        overrides |= {"eval.limit": 24, "train.max_steps": 6}
    return load_recipe("cifar10_resnet18", list(overrides.items()))


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with so many epochs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})


def measure(recipe: Recipe, settings: Settings, journal: Journal) -> dict[str, Any]:
    """How long a step takes, how long the attacks will, and how many epochs fit in between."""
    device, began = settings.device, time.perf_counter()
    with training_numerics(recipe.train):
        step, batch = DeviceStep(recipe, device), synthetic_batch(recipe, device)
        step.warm_up(batch)
        start_s = time.perf_counter() - began
        seconds = 0.2 if settings.small else 2.0
        step_s = timed_in_turn({"step": lambda: step(batch)}, device, seconds=seconds)["step"] / 1000
    num_steps = load_manifest(recipe.data.train).num_samples / recipe.train.global_batch_size
    # The training's net takes over what was compiled here; its loop is a little slower than the bare step.
    left = journal.seconds_left() - min(start_s, 10.0) - _SAVE_S
    count, evaluation_s = affordable_evaluation(recipe, step, device, 0.4 * left)
    epochs = 1 if settings.small else max(1, int((left - evaluation_s) / (1.1 * step_s * num_steps)))
    return {
        "step_ms": 1000 * step_s,
        "start_s": start_s,
        "num_evaluated": count,
        "evaluation_s": evaluation_s,
        "epochs": epochs,
    }


def affordable_evaluation(recipe: Recipe, step: DeviceStep, device: torch.device, most_s: float) -> tuple[int, float]:
    """How many pictures all attacks get, 1,000 unless that would take longer than `most_s`; and about how long."""
    assert recipe.eval.limit is not None
    for part in (1, 2, 4, 8):
        count = recipe.eval.limit // part
        seconds = evaluation_seconds(recipe, step, device, count)
        if seconds <= most_s:
            break
    return count, seconds


def evaluation_seconds(recipe: Recipe, step: DeviceStep, device: torch.device, count: int) -> float:
    """What the attacks will take on so many pictures, from one forward and backward pass of a batch of theirs."""
    config = eval_config(recipe).model_copy(update={"attack": ",".join(ATTACKS)})
    assert config.batch_size is not None
    batches = cut(np.arange(count), config.batch_size)
    classifier, side = step.objective.classifier, recipe.data.image_size
    pixels = torch.rand(len(batches[0]), 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    with classifier.branch("adv"), attacked(classifier) as net:

        def both_ways() -> None:
            x = pixels.detach().requires_grad_()
            torch.autograd.grad(net(x).sum(), x)

        both_ways()
        seconds = timed_in_turn({"pass": both_ways}, device, seconds=0.5)["pass"] / 1000
    # An attack's cost counts a step as three passes. What else a step does, and what falls early, cancel about out.
    return 5 + sum(attack.cost for attack in evaluation_attacks(config)) / 3 * len(batches) * seconds


def the_run(settings: Settings) -> Run:
    """Where the run lies."""
    return Run(str(settings.scratch / "runs"), "train")


def trained(recipe: Recipe, settings: Settings, until: float) -> dict[str, Any]:
    """Train; where the time turns out too short, up to there: then the net is what it was at that moment."""
    run, rank = the_run(settings), Rank(0, 1, settings.device)
    rank = replace(rank, stop_wanted=lambda: time.monotonic() > until)
    run.open(recipe, load_manifest(recipe.data.train).sha256)
    try:
        summary = train(recipe, run, rank)
    except StoppedError as stopped:
        summary = {"steps": stopped.step, "stopped": True}
    lines = run.metrics()
    if not lines:
        raise WrongError("the training wrote no line of metrics")
    last = lines[-1]
    # The first line has compilation in it.
    rates = [line["images_per_second"] for line in lines[1:] or lines]
    values = {
        "epochs": round(last["epoch"], 2),
        "steps": summary["steps"],
        "stopped_early": bool(summary.get("stopped")),
        "images_per_second": statistics.median(rates),
        **{key: last[key] for key in last if key.startswith("loss") or key.endswith(("accuracy", "_fraction"))},
        "memory_mb": last["memory_mb"],
        "skipped_steps": last.get("skipped_steps", 0),
    }
    if values["skipped_steps"]:
        raise WrongError(f"{values['skipped_steps']} steps were skipped: their gradient was no number", **values)
    return values


def evaluated(recipe: Recipe, settings: Settings, attack: str, count: int) -> dict[str, Any]:
    """Clean and robust accuracy of so many pictures in fp32, as a run measures its own."""
    run = the_run(settings)
    if load_newest(run.checkpoints) is None:
        raise WrongError("the training left no checkpoint")
    loaded = load_weights(run, recipe)
    config = eval_config(recipe).model_copy(update={"attack": attack, "limit": count})
    scores = evaluate(loaded.classifier.to(settings.device), recipe.data, config, Rank(0, 1, settings.device))
    return {
        "step": loaded.step,
        "num_samples": scores.num_samples,
        "clean_accuracy": scores.clean_accuracy,
        "robust_accuracy": scores.robust_accuracy,
    }


def check_accuracies(journal: Journal, settings: Settings) -> dict[str, Any]:
    """Stronger attacks leave less, and a net that was trained for some epochs has learned something."""
    lines = [journal.line(f"clean and {attack}") for attack in ATTACKS]
    if any(line.get("status") != "ok" for line in lines):
        raise WrongError("an evaluation is missing")
    (clean, pgd), (other_clean, apgd) = ((line["clean_accuracy"], line["robust_accuracy"]) for line in lines)
    values = {"clean": clean, "pgd20": pgd, "apgd": apgd}
    # APGD may miss a few that PGD's other start breaks; and where it gets fewer pictures, they are others.
    slack = 0.01 if lines[0]["num_samples"] == lines[1]["num_samples"] else 0.1
    if not abs(clean - other_clean) <= slack:
        raise WrongError(f"clean accuracy is {clean} and {other_clean}", **values)
    if not apgd <= pgd + slack <= clean + slack:
        raise WrongError("stronger attacks leave more", **values)
    epochs = journal.line("training")["epochs"]
    least = 0.0 if settings.small or epochs < 3 else 2 / NUM_CLASSES
    if not (clean >= 2 * least and apgd >= least / 2):
        raise WrongError(f"after {epochs} epochs the net has learned next to nothing", **values)
    return values
