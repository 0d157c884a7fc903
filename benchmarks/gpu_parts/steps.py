"""A training step of any method on one device, as the trainer takes it; what it takes to check and to time it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arat_dist.config import Recipe
from arat_dist.cuda_graph import NUM_WARMUPS, GraphedStep, build_step, is_captured
from arat_dist.data.loader import Batch
from arat_dist.engine import Rank, build_engine
from arat_dist.objectives import build_objective
from arat_dist.objectives.base import Output
from arat_dist.step import StepResult

from .journal import Skipped, WrongError

State = dict[str, Tensor]
"""Names and tensors."""


def with_mode(recipe: Recipe, *, compiled: bool, graphed: bool) -> Recipe:
    """The recipe with its step eager, compiled, graphed or both; `Skipped` where that can't be."""
    if graphed and recipe.train.precision == "fp16":
        raise Skipped("fp16 steps are not graphed")
    mode = {"compile": compiled, "cuda_graph": graphed}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=mode)})


def mode_name(*, compiled: bool, graphed: bool) -> str:
    """What the table calls it."""
    return "+".join(name for name, is_on in (("compiled", compiled), ("graphed", graphed)) if is_on) or "eager"


class DeviceStep:
    """The trainer's step on a device, weights drawn from seed 0; calls it again and again.

    Args:
        recipe: its `train` says how: precision, compile, cuda_graph.
        device: where.
        sees: keep what a step saw, in memory that a graph writes too.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, sees: bool = False):
        torch.manual_seed(0)
        rank, train = Rank(0, 1, device), recipe.train
        self.objective = build_objective(recipe)
        self.engine = build_engine(
            self.objective,
            recipe.engine,
            recipe.optim,
            rank,
            scales_loss=train.precision == "fp16",
            capturable=is_captured(recipe, rank),
        )
        self.objective.train()
        if train.compile:
            self.objective.compile_backbones({train.global_batch_size})
        self._step = build_step(self.engine, recipe, rank)
        self._is_graphed = train.cuda_graph
        self.seen = Seen(self.objective) if sees else None

    def __call__(self, batch: Batch) -> StepResult:
        """One step."""
        return self._step([batch], 1 / len(batch.labels), lambda: None)

    def warm_up(self, batch: Batch) -> None:
        """Steps until the next is like all that follow; `WrongError` where a graph was asked for and isn't there."""
        for _ in range(NUM_WARMUPS + 1):
            self(batch)
        if self._is_graphed and not (isinstance(self._step, GraphedStep) and self._step.num_recordings):
            raise WrongError("the step could not be captured as a CUDA graph; gpu.log has the warning")

    def state(self) -> State:
        """Weights and buffers, copied to host memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.objective.state_dict().items()}


@dataclass
class Seen:
    """The pictures before and after the attack, as the objective's own calls have them in the newest step.

    The copies are part of the step, so that a graph makes them anew each time.
    """

    objective: Any
    kept: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put itself around the objective's attack."""
        self._perturb = self.objective.perturb_net
        self.objective.perturb_net = self._watched

    def _watched(self, classifier: Any, pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        self._keep("pixels before", pixels)
        adversarial = self._perturb(classifier, pixels, targets, keys)
        self._keep("pixels", pixels)
        self._keep("adversarial", adversarial)
        return adversarial

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name not in self.kept:
            self.kept[name] = torch.empty_like(tensor)
        self.kept[name].copy_(tensor)

    def get(self, name: str) -> Tensor:
        """A copy in host memory."""
        return self.kept[name].detach().to("cpu", copy=True)


@dataclass(frozen=True)
class OnHost:
    """A step computed on the CPU in float64: loss, its gradients by name, and the buffers afterwards."""

    loss: float
    gradients: State
    buffers: State


def on_host(recipe: Recipe, state: State) -> Any:
    """The recipe's objective on the CPU in float64, eager, in training, with given weights and buffers."""
    mode = {"compile": False, "cuda_graph": False, "precision": "fp32"}
    objective = build_objective(recipe.model_copy(update={"train": recipe.train.model_copy(update=mode)}))
    objective.load_state_dict(state)
    return objective.double().train()


def step_on_host(recipe: Recipe, state: State, batch: Batch, adversarial: Tensor | None) -> OnHost:
    """Loss and gradients from given weights on given adversarial pictures, by the product's own code on the CPU.

    Args:
        recipe: its method and its net count.
        state: weights and buffers before the step.
        batch: uint8 pictures, labels, keys.
        adversarial: what the attack makes; None for a method without one.
    """
    objective = on_host(recipe, state)
    if adversarial is not None:
        objective.perturb_net = lambda *_: adversarial.double()
    out: Output = objective(*batch)
    out.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return OnHost(float(out.loss.detach()), gradients, dict(objective.named_buffers()))


def distance(found: State, expected: State) -> float:
    """2-norm of the difference of all tensors, as a share of the norm of the expected ones."""
    assert found.keys() >= expected.keys()
    squares = sum(float((found[name].double() - each).square().sum()) for name, each in expected.items())
    return (squares / max(1e-300, sum(float(each.square().sum()) for each in expected.values()))) ** 0.5


def projection(found: State, expected: State) -> float:
    """Length of a gradient along the expected one, as a share of that one's."""
    along = sum(float((found[name].double() * each).sum()) for name, each in expected.items())
    return along / sum(float(each.square().sum()) for each in expected.values())


def norm(tensors: State) -> float:
    """2-norm of all tensors."""
    return sum(float(each.double().square().sum()) for each in tensors.values()) ** 0.5


def synchronized(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_in_turn(
    work: dict[str, Callable[[], object]], device: torch.device, *, seconds: float, least: int = 3, most: int = 50
) -> dict[str, float]:
    """Median milliseconds of each, one after the other in every round, until the device is done with it.

    Args:
        work: warmed up.
        device: what is waited for.
        seconds: about how long it may take.
        least: rounds at least.
        most: rounds at most.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    began = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - began > seconds:
            break
        for name, run in work.items():
            synchronized(device)
            start = time.perf_counter()
            run()
            synchronized(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
