"""How many kernels a step launches, about: the host, which launches them one by one, is what small nets wait for."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
from fake_training import FakeTraining
from watch import Watch

from arat_dist.bench.step import step_recipe


class Budget(NamedTuple):
    """A step of ARAT on a net of its real depth; how wide it is, and how large pictures are, changes no number."""

    model: str
    args: dict[str, Any]
    attack_steps: int
    most: int
    """Kernels that its step may launch: 10 % more than it did when this was written."""


BUDGETS = [
    Budget("cifar_resnet18", {"channels": [8, 8, 8, 8]}, 10, 2293),
    Budget("resnet50", {"channels": [8, 8, 8, 8], "zero_init_last": False}, 3, 2492),
    Budget("vit_small_patch16_224", {"embed_dim": 48, "num_heads": 3}, 2, 2224),
]


def step_of(budget: Budget) -> Counter[str]:
    """The kernels of a step by name."""
    shape = {"image_size": 32, "num_classes": 10, "batch_size": 4, "attack_steps": budget.attack_steps}
    recipe = step_recipe(budget.model, precision="bf16", overrides=[("model.args", budget.args)], **shape)
    with Watch():
        training = FakeTraining(recipe)
        parts = training.begin_step()
    with Watch() as watch:
        training.take_step(parts)
    return watch.found.kernels


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.model)
def test_a_step_launches_no_more_kernels_than_before(on_fake_gpu, budget, record_property):
    kernels = on_fake_gpu(step_of, budget)
    num_kernels = kernels.total()
    record_property("kernels", f"{num_kernels} of at most {budget.most}")
    assert num_kernels <= budget.most, kernels.most_common(12)
    assert num_kernels > budget.most / 2, "a budget of twice as many sees nothing any more: lower it"
