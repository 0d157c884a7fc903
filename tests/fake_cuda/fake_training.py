"""A recipe's training as `train` sets it up, on a GPU that isn't there: the one place here that knows its parts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fake_gpu import GPU
from torch import Tensor
from toys import Sets, toy_recipe

from arat_dist.averaging import build_averages
from arat_dist.bench.step import synthetic_batch
from arat_dist.config import Recipe
from arat_dist.cuda_graph import is_captured
from arat_dist.data.copies import copied_ahead
from arat_dist.data.loader import Batch
from arat_dist.device_augment import build_device_augment
from arat_dist.engine import Rank, build_engine
from arat_dist.objectives import build_objective
from arat_dist.step import StepResult, TrainStep, micro_batches
from arat_dist.train import diagnose, seed_step, update_averages

NUM_SAMPLES = 64
"""Of the training set that isn't there either."""
Sections = dict[str, dict[str, Any]]


def small_recipe(sections: Sections) -> Recipe:
    """A net of nine convolutions and 10 classes, in bf16, under one step of attack; the sections come on top."""
    base: Sections = {
        "data": {"num_classes": 10},
        "model": {"name": "cifar_wrn_34_10", "args": {"depth": 10, "width": 1}},
        "train": {"precision": "bf16"},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return toy_recipe(Sets("none", "none"), **merged)


class FakeTraining:
    """A training between two steps; made and used inside `Watch`."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(0)
        self.recipe, self.rank, self.num_steps = recipe, Rank(0, 1, GPU), 0
        self.objective = build_objective(recipe)
        self.averages = build_averages(recipe, self.objective.to(GPU).classifier, NUM_SAMPLES)
        captured, scales_loss = is_captured(recipe, self.rank), recipe.train.precision == "fp16"
        self.engine = build_engine(
            self.objective, recipe.engine, recipe.optim, self.rank, scales_loss=scales_loss, capturable=captured
        )
        self._take_step = TrainStep(self.engine, on_device=captured)
        self._augment = build_device_augment(recipe.data, recipe.train.seed)
        self.notes: dict[str, Tensor] = {}
        self.objective.train()

    def begin_step(self) -> list[Batch]:
        """What comes before a step; its samples, from host memory."""
        count = self.recipe.train.global_batch_size
        self.engine.set_lr(0.1 / (1 + self.num_steps))
        self.objective.begin_step(self.num_steps * count / NUM_SAMPLES)
        loaded = synthetic_batch(self.recipe, torch.device("cpu"), seed=self.num_steps)
        (batch,) = copied_ahead(iter([loaded]), GPU)
        return micro_batches(batch, self.recipe.train.micro_batches, count, self.rank, self._augment)

    def take_step(self, parts: Sequence[Batch], *, diagnosed: bool = False) -> StepResult:
        """The step itself; what the diagnostics measure goes into `notes`."""
        train = self.recipe.train
        reseed = partial(seed_step, train.seed, self.num_steps, self.rank)
        inspect = self._inspect if diagnosed else None
        return self._take_step(parts, 1 / train.global_batch_size, reseed, inspect)

    def end_step(self) -> None:
        """What follows a step."""
        self.num_steps += 1
        update_averages(self.averages, self.engine, self.num_steps)

    def step(self, *, diagnosed: bool = False) -> StepResult:
        """All of a step."""
        result = self.take_step(self.begin_step(), diagnosed=diagnosed)
        self.end_step()
        return result

    def kept(self) -> dict[str, Tensor]:
        """All tensors that are kept between steps, by name."""
        nets = {"model": self.objective} | {name: each.classifier for name, each in self.averages.items()}
        found = {f"{net}.{name}": value for net, held in nets.items() for name, value in held.state_dict().items()}
        for name, entry in self.engine.state_dict()["state"].items():
            found |= {f"optimizer.{name}.{key}": value for key, value in entry.items()}
        return found

    def _inspect(self, out: Any, share: float) -> None:
        self.notes |= diagnose(self.objective, out.terms, share, self.rank)
