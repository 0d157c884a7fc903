"""Part smoke, whole runs: one that was stopped and went on, its evaluation on two devices, its export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from arat_dist.checkpoint import Checkpoint, load_newest
from arat_dist.config import Recipe
from arat_dist.data.loader import val_loader
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import Rank
from arat_dist.errors import StoppedError
from arat_dist.evaluate import Scores, eval_config, evaluate
from arat_dist.evaluation.attacks import evaluation_attacks
from arat_dist.evaluation.net import attacked
from arat_dist.evaluation.stages import pixels_of
from arat_dist.export_run import export_run
from arat_dist.models.classifier import Classifier
from arat_dist.numerics import evaluation_numerics
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from arat_dist.targets import load_weights
from arat_dist.train import train

from .journal import Journal, Skipped, WrongError
from .pictures import digits
from .settings import Settings

EDGE = 1e-3
"""Margin of the logits below which a sample may fall to either side."""
_CPU = torch.device("cpu")
_NUM_TRAIN, _NUM_VAL = 384, 96


def run_cases(settings: Settings, journal: Journal) -> None:
    """The runs, and what is made of the first one."""
    for graphed in (False, True):
        name = "stopped and resumed, " + ("graphed" if graphed else "eager")
        journal.run(name, partial(check_resume, settings, graphed), limit_s=90)
    journal.run("evaluation on both devices", partial(check_evaluation, settings))
    journal.run("export loads in timm", partial(check_export, settings))


def run_recipe(settings: Settings, graphed: bool) -> Recipe:
    """A few epochs on some digits, everything on that a run may have, and the same bits each time."""
    sets = digits(settings.scratch, _NUM_TRAIN, _NUM_VAL)
    width = 8 if settings.small else 32
    overrides = {
        "data.train": str(sets.train),
        "data.val": str(sets.val),
        "data.loader": "torchvision",
        "data.loader_threads": 2,
        "model.args": {"channels": [width, width, 2 * width, 2 * width], "stem_width": width, "zero_init_last": False},
        "attack.eps": "8/255",
        "attack.step_size": "2/255",
        "attack.steps": 2 if settings.small else 7,
        "optim.warmup_epochs": 0,
        "train.epochs": 2 if settings.small else 4,
        "train.precision": "fp32" if settings.small else "bf16",
        "train.ema_decay": 0.8,
        "train.norm_samples": 128,
        "train.log_every": 3,
        "train.deterministic": True,
        "train.cuda_graph": graphed,
        "eval.attack": "pgd5" if settings.small else "pgd20",
        "track.mlflow": False,
        "cluster.workers": 0,
    }
    return load_recipe("digits", list(overrides.items()))


class _StopAfter:
    """Asks to stop at a step, as a machine does that is about to leave."""

    def __init__(self, step: int):
        self._calls, self._step = count(1), step

    def __call__(self) -> bool:
        return next(self._calls) > self._step


def _trained(recipe: Recipe, run: Run, rank: Rank) -> dict[str, Any]:
    run.open(recipe, load_manifest(recipe.data.train).sha256)
    return train(recipe, run, rank)


def check_resume(settings: Settings, graphed: bool) -> dict[str, Any]:
    """A run that was stopped amid an epoch and went on has the weights of one that wasn't, to the bit."""
    if graphed and settings.device.type == "cpu":
        raise Skipped("not on a CPU")
    recipe, storage = run_recipe(settings, graphed), str(settings.scratch / "runs")
    kind, rank = "graphed" if graphed else "eager", Rank(0, 1, settings.device)
    whole, cut = Run(storage, f"whole-{kind}"), Run(storage, f"cut-{kind}")
    summary = _trained(recipe, whole, rank)
    stop = summary["steps"] * 2 // 3
    try:
        _trained(recipe, cut, replace(rank, stop_wanted=_StopAfter(stop)))
    except StoppedError:
        pass
    else:
        raise WrongError("the run did not stop when it was asked to")
    stopped_at = _newest(cut).step
    if not 0 < stopped_at < summary["steps"]:
        raise WrongError(f"the run stopped at step {stopped_at} of {summary['steps']}")
    _trained(recipe, cut, rank)
    differing = list(differences(_newest(whole), _newest(cut)))
    values = {"steps": summary["steps"], "stopped_at": stopped_at, "accuracy": round(summary["clean_accuracy"], 4)}
    if differing:
        raise WrongError(f"{len(differing)} tensors differ after the resume: {', '.join(differing[:3])}", **values)
    return values


def _newest(run: Run) -> Checkpoint:
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is not None
    return checkpoint


def differences(one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Names of all that isn't the same, to the bit, in two checkpoints."""
    if one.step != other.step:
        yield f"step {one.step} or {other.step}"
    states = {name: (state, other.weights[name]) for name, state in one.weights.items()}
    optimizers = one.optimizer["state"], other.optimizer["state"]
    states |= {f"optimizer {name}": (state, optimizers[1][name]) for name, state in optimizers[0].items()}
    for part, (ours, theirs) in states.items():
        for name, tensor in ours.items():
            if not torch.equal(tensor, theirs[name]):
                yield f"{part} {name}"


class Answers(NamedTuple):
    """What a device says of the validation pictures; tensors on the CPU."""

    scores: Scores
    margins: Tensor
    """Of the clean pictures, [N]: the right class's logit over the largest other one."""
    attacked_margins: Tensor
    """Of the adversarial pictures, [N]."""
    adversarial: Tensor


def check_evaluation(settings: Settings) -> dict[str, Any]:
    """The verdicts in fp32 are those of the CPU, but for samples on the edge, which are counted."""
    recipe, classifier = _first_run(settings)
    here, host = (answers(recipe, classifier, device) for device in (settings.device, _CPU))
    labels = _labels(recipe)
    # The very pictures that the device made, judged by the CPU.
    judged = margins_of(classifier.to(_CPU), here.adversarial, labels)
    pairs = {
        "clean": (here.margins, host.margins),
        "judged": (here.attacked_margins, judged),
        "attacked": (here.attacked_margins, host.attacked_margins),
    }
    others = {name: (one > 0) != (other > 0) for name, (one, other) in pairs.items()}
    near = {name: torch.minimum(one.abs(), other.abs()) < EDGE for name, (one, other) in pairs.items()}
    on_edge = {f"{name}_on_edge": int((others[name] & near[name]).sum()) for name in pairs}
    beyond = {name: int((others[name] & ~near[name]).sum()) for name in pairs}
    # Two attacks part where a gradient is about 0; a sample whose end is far from the edge on both is no such.
    values = {**on_edge, "attacked_beyond": beyond["attacked"], "robust": here.scores.num_robust}
    if beyond["clean"] or beyond["judged"]:
        raise WrongError(f"other verdicts than the CPU's away from the edge: {beyond}", **values)
    if beyond["attacked"] > len(labels) // 50:
        raise WrongError(f"{beyond['attacked']} of {len(labels)} attacks end on the other side", **values)
    counted = {"clean": here.margins, "robust": torch.minimum(here.margins, here.attacked_margins)}
    for name, margins in counted.items():
        number, other = getattr(here.scores, f"num_{name}"), int((margins > 0).sum())
        # Batches of other sizes may be rounded otherwise.
        if abs(number - other) > max(1, int((margins.abs() < EDGE).sum())):
            raise WrongError(f"evaluate() counts {number} {name} samples, their logits say {other}")
    return values


def _first_run(settings: Settings) -> tuple[Recipe, Classifier]:
    """The first run's recipe and net; `Skipped` where it has none."""
    run = Run(str(settings.scratch / "runs"), "whole-eager")
    if load_newest(run.checkpoints) is None:
        raise Skipped("the run that it needs has no checkpoint")
    return run.recipe(), load_weights(run, run.recipe()).classifier


def _labels(recipe: Recipe) -> Tensor:
    with val_loader(recipe.data, _NUM_VAL) as loader:
        return torch.from_numpy(loader.labels).clone()  # pyright: ignore[reportAttributeAccessIssue]


def answers(recipe: Recipe, classifier: Classifier, device: torch.device) -> Answers:
    """The product's evaluation, and the same attack once more on all pictures at once, whose logits are kept."""
    classifier = classifier.to(device)
    config = eval_config(recipe).model_copy(update={"batch_size": _NUM_VAL})
    scores = evaluate(classifier, recipe.data, config, Rank(0, 1, device))
    (attack,) = evaluation_attacks(config)
    with val_loader(recipe.data, _NUM_VAL) as loader:
        batch = next(iter(loader.iterate([range(_NUM_VAL)])))  # pyright: ignore[reportArgumentType]
        pixels = pixels_of(batch.images.to(device), classifier.dtype)
        labels, keys = batch.labels.clone(), batch.keys.to(device)
    with classifier.branch("adv"), attacked(classifier) as net:
        adversarial = attack(net, pixels, labels.to(device), keys)
    return Answers(
        scores,
        margins_of(classifier, pixels, labels),
        margins_of(classifier, adversarial, labels),
        adversarial.detach().cpu(),
    )


def margins_of(classifier: Classifier, pixels: Tensor, labels: Tensor) -> Tensor:
    """The right class's logit over the largest other one, [N], on the CPU."""
    device = classifier.mean.device
    with torch.no_grad(), classifier.branch("adv"), attacked(classifier) as net:
        logits = net(pixels.to(device)).cpu()
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def check_export(settings: Settings) -> dict[str, Any]:
    """The folder that timm alone loads gives the adv branch's logits, on the device in fp32."""
    recipe, classifier = _first_run(settings)
    device, side = settings.device, recipe.data.image_size
    run = Run(str(settings.scratch / "runs"), "whole-eager")
    exported = export_run(run, settings.scratch / "export", formats=("timm",))
    net: Any = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval().to(device)
    mean, std = (torch.tensor(net.pretrained_cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = torch.rand(16, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    classifier = classifier.to(device).eval()
    with torch.no_grad(), evaluation_numerics(), classifier.branch("adv"):
        ours, theirs = classifier(pixels), net((pixels - mean) / std)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference < 1e-4:
        raise WrongError(f"the logits differ by {difference:.2g} of the largest", difference=difference)
    return {"difference": float(f"{difference:.2g}")}
