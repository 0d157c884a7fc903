"""Part smoke: is the product right on this device? Steps against float64 on the CPU; runs, evaluation and export."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from arat_dist.bench.step import synthetic_batch
from arat_dist.config import Recipe
from arat_dist.data.loader import Batch
from arat_dist.numerics import training_numerics
from arat_dist.objectives.base import to_pixels
from arat_dist.recipe import parse_recipe

from .journal import Journal, Skipped, WrongError
from .settings import Settings
from .smoke_run import run_cases
from .steps import DeviceStep, OnHost, distance, mode_name, norm, on_host, projection, step_on_host, with_mode

METHODS = ("arat", "trades", "at", "mart", "lbgat", "arrest", "standard")
PRECISIONS = ("bf16", "fp32", "fp16")
EAGER, COMPILED, GRAPHED, BOTH = (False, False), (True, False), (False, True), (True, True)
LR = 0.05
"""Of the step that is checked; those before it have another."""

ALLOWED = {
    "loss_error": {"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-3},
    "gradient_error": {"fp32": 0.03, "bf16": 0.8, "fp16": 0.4},
    "projection_error": {"fp32": 0.01, "bf16": 0.3, "fp16": 0.15},
    "norm_error": {"fp32": 1e-3, "bf16": 1e-3, "fp16": 1e-3},
    "statistics_error": {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3},
}
"""By precision. A ReLU whose input is about 0 falls to either side: the CPU's own gradients are 1 % off in fp32, and in
bf16 30 %. Nearly all of that is noise, which `projection_error` is blind to: it shows terms that are missing or
weighed wrongly."""
_LEAST_GAIN = {"ce": 0.8, "kl": 0.5}
"""Share of what the attack gains in loss, in float64, that the device's own pictures gain as well."""


class Case(NamedTuple):
    """One kind of step."""

    method: str
    precision: str
    compiled: bool
    graphed: bool

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.method} {self.precision} {mode_name(compiled=self.compiled, graphed=self.graphed)}"


def run(settings: Settings, journal: Journal) -> None:
    """All cases, the most important ones first."""
    # As a run with train.deterministic sets it before cuBLAS starts, which it has here when the first one begins.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, rest = cases(settings)
    for case in first:
        journal.run(case.name, partial(check_step, case, settings), limit_s=120)
    for method in ("arat", "trades"):
        journal.run(f"{method} fp32 one step of the attack", partial(check_one_attack_step, method, settings))
    run_cases(settings, journal)
    for case in rest:
        journal.run(case.name, partial(check_step, case, settings), limit_s=120)


def cases(settings: Settings) -> list[list[Case]]:
    """Those before the runs, and the others; each once."""
    first = [Case("arat", "fp32", *EAGER), *(Case("arat", "bf16", *mode) for mode in (EAGER, GRAPHED))]
    # A cold compiler takes most of a minute: behind the runs.
    compiled = [Case("arat", "bf16", *mode) for mode in (BOTH, COMPILED)]
    kinds = [EAGER, GRAPHED, BOTH, COMPILED]
    rest = [Case(m, p, *mode) for mode in kinds for p in PRECISIONS for m in METHODS]
    # What fp16 adds comes last.
    rest = [case for is_last in (False, True) for case in rest if (case.precision == "fp16") == is_last]
    if settings.small:
        # On a CPU compiling and fp16 take long.
        compiled = compiled[1:]
        rest = [case for case in rest if not case.compiled]
        rest = [case for case in rest if case.precision != "fp16" or case.method in ("arat", "trades", "standard")]
    rest = compiled + [case for case in rest if case not in first + compiled]
    if settings.device.type == "cpu":
        rest = [case for case in rest if not case.graphed or case.method == "arat"]
    return [first, rest]


def smoke_recipe(method: str, precision: str, settings: Settings, *, steps: int = 3, shallow: bool = False) -> Recipe:
    """A narrow net on small pictures; no momentum and no decay, so that a step's change is lr times its gradient."""
    channels, side, batch = ([8, 8, 8, 8], 16, 8) if settings.small else ([16, 16, 32, 32], 32, 16)
    model = {"name": "cifar_resnet18", "args": {"channels": channels}}
    objective = {"name": method}
    if shallow:
        model, side = {"name": "test_vit", "args": {"patch_size": 8, "depth": 2}}, 32
        objective |= {"split_norm": "layer"} if method == "arat" else {}
    return parse_recipe(
        {
            "data": {"train": "none", "val": "none", "num_classes": 10, "image_size": side},
            "model": model,
            "objective": objective,
            "attack": {"eps": "8/255", "steps": steps},
            "optim": {"lr": 2 * LR, "momentum": 0, "weight_decay": 0},
            "train": {"epochs": 1, "global_batch_size": batch, "precision": precision},
        }
    )


def check_step(case: Case, settings: Settings) -> dict[str, Any]:
    """A case's step against the CPU in float64."""
    if case.graphed and settings.device.type == "cpu":
        raise Skipped("not on a CPU")
    # Compiling takes a CPU long.
    recipe = smoke_recipe(case.method, case.precision, settings, shallow=case.compiled and settings.small)
    recipe = with_mode(recipe, compiled=case.compiled, graphed=case.graphed)
    torch.compiler.reset()  # it compiles a function's code a limited number of times, whatever the net
    counters.clear()
    values = compare_with_host(recipe, settings.device)
    num_graphs = counters["stats"]["unique_graphs"]
    if case.compiled and (not num_graphs or counters["graph_break"]):
        raise WrongError(f"{num_graphs} graphs were compiled; breaks: {list(counters['graph_break'])[:1]}", **values)
    return values


def compare_with_host(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """A step that follows others, of which a graph would be a replay, against the CPU in float64.

    Weights, batch and adversarial pictures are the device's; batch and learning rate are others than before.

    Raises:
        WrongError: one is too far from the other, or the attack is none.
    """
    with training_numerics(recipe.train):
        step = DeviceStep(recipe, device, sees=True)
        step.warm_up(synthetic_batch(recipe, device, seed=1))
        before = step.state()
        step.engine.set_lr(LR)
        batch = synthetic_batch(recipe, device, seed=2)
        images = batch.images.clone()
        result = step(batch)
        loss, gradient_norm = float(result.metrics[0][0]["loss"]), float(result.gradient_norm)
        after = step.state()
    if not torch.equal(images, batch.images):
        raise WrongError("the step changed its pictures")
    host_batch = synthetic_batch(recipe, torch.device("cpu"), seed=2)
    assert step.seen is not None
    adversarial = None
    if recipe.objective.name != "standard":
        adversarial = step.seen.get("adversarial")
        check_ball(step.seen.get("pixels before"), step.seen.get("pixels"), adversarial, recipe)
    exact = step_on_host(recipe, before, host_batch, adversarial)
    found = {name: (before[name].double() - after[name].double()) / LR for name in exact.gradients}
    values = check_errors(errors_of(found, loss, gradient_norm, after, exact), recipe.train.precision)
    if adversarial is not None:
        values["attack_gain"] = check_gain(recipe, before, host_batch, adversarial)
    return values


def check_ball(before: Tensor, pixels: Tensor, adversarial: Tensor, recipe: Recipe) -> None:
    """The attack left the clean pictures alone, and its own lie in the ball, exactly."""
    if not torch.equal(before, pixels):
        raise WrongError("the attack changed the clean pictures")
    # float64 holds the difference of two float32 numbers of this size exactly.
    farthest = float((adversarial.double() - pixels.double()).abs().max())
    if not farthest <= recipe.attack.eps:
        raise WrongError(f"|x' - x| is {farthest:.9f}, eps {recipe.attack.eps:.9f}")
    if not (adversarial.min() >= 0 and adversarial.max() <= 1):
        raise WrongError("adversarial pixels are outside [0,1]")
    if not farthest > recipe.attack.eps / 2:
        raise WrongError(f"the attack moved no pixel further than {farthest:.6f}")


def errors_of(
    found: dict[str, Tensor], loss: float, gradient_norm: float, after: dict[str, Tensor], exact: OnHost
) -> dict[str, float]:
    """How far a step is from the one in float64.

    Args:
        found: its gradients, as its weights changed.
        loss: its loss.
        gradient_norm: as its engine has it.
        after: its weights and buffers afterwards.
        exact: the step in float64.
    """
    buffers = {n: b for n, b in exact.buffers.items() if n.rpartition(".")[2] in ("running_mean", "running_var")}
    return {
        "loss_error": abs(loss / exact.loss - 1),
        "gradient_error": distance(found, exact.gradients),
        "projection_error": abs(projection(found, exact.gradients) - 1),
        "norm_error": abs(gradient_norm / norm(found) - 1),
        "statistics_error": distance({name: after[name] for name in buffers}, buffers),
    }


def check_errors(errors: dict[str, float], precision: str) -> dict[str, float]:
    """The errors, rounded; `WrongError` where one isn't within what is `ALLOWED`."""
    values = {name: float(f"{error:.3g}") for name, error in errors.items()}
    # Written so that a NaN is wrong too.
    wrong = [name for name, error in errors.items() if not error <= ALLOWED[name][precision]]
    if wrong:
        said = (f"{name.replace('_', ' ')} {values[name]:g} ({ALLOWED[name][precision]:g} allowed)" for name in wrong)
        raise WrongError("; ".join(said), **values)
    return values


def check_gain(recipe: Recipe, state: dict[str, Tensor], batch: Batch, adversarial: Tensor) -> float:
    """What the device's attack gains in the loss that it climbs, as a share of the gain of the attack in float64."""
    loss, pixels, exact = attack_in_float64(recipe, state, batch)
    with torch.no_grad():
        clean, own, best = (float(loss(x).mean()) for x in (pixels, adversarial.double(), exact))
    gain = (own - clean) / (best - clean)
    kind = "kl" if recipe.objective.name in ("trades", "lbgat") else "ce"
    if not gain >= _LEAST_GAIN[kind]:
        raise WrongError(f"the attack gains {gain:.3f} of what it gains in float64", attack_gain=round(gain, 4))
    return round(gain, 4)


def attack_in_float64(recipe: Recipe, state: dict[str, Tensor], batch: Batch) -> tuple[Any, Tensor, Tensor]:
    """What the attack climbs, the clean pixels, and the pictures that it makes of them, on the CPU in float64."""
    objective = on_host(recipe, state)
    pixels, (_, labels, keys) = to_pixels(batch.images, torch.float64), batch
    kept: list[Any] = []
    setting: Any = objective._setting  # noqa: SLF001 - the loss that the attack climbs is made inside it
    climb = setting.attack.loss

    def noted(*args: Any) -> Any:
        kept.append(climb(*args))
        return kept[-1]

    setting.attack.loss = noted
    adversarial = objective.perturb(pixels, labels, keys)

    def loss(x: Tensor) -> Tensor:
        with objective._attack_mode(setting.attack.norm_stats), objective.classifier.branch("adv"):  # noqa: SLF001
            return kept[-1](x)

    return loss, pixels, adversarial


def check_one_attack_step(method: str, settings: Settings) -> dict[str, Any]:
    """One step of the attack in fp32: the same sign as in float64 wherever the start isn't at an edge."""
    recipe = smoke_recipe(method, "fp32", settings, steps=1)
    with training_numerics(recipe.train):
        step = DeviceStep(recipe, settings.device)
        batch = synthetic_batch(recipe, settings.device, seed=3)
        adversarial = step.objective.perturb(to_pixels(batch.images, torch.float32), batch.labels, batch.keys).cpu()
    _, _, exact = attack_in_float64(recipe, step.state(), synthetic_batch(recipe, torch.device("cpu"), seed=3))
    other = float(((adversarial.double() - exact).abs() > 1e-5).double().mean())
    if not other <= 0.005:
        raise WrongError(f"{other:.2%} of the pixels moved another way", other_pixels=other)
    return {"other_pixels": round(other, 6)}
