"""`arat bench engine`: what each rank holds under DDP and under DeepSpeed ZeRO 0 to 3, and how long a step takes."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from arat_dist.bench.ranks import RankGroup
from arat_dist.bench.scale import RankStep
from arat_dist.bench.step import OnProgress
from arat_dist.config import EngineConfig, Recipe
from arat_dist.engine import Rank

ENGINES: dict[str, EngineConfig] = {"ddp": EngineConfig()} | {
    f"zero{stage}": EngineConfig(kind="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)
}
"""What is compared, by name."""


class _Measure:
    """Answers a call with an engine's name."""

    def __init__(self, rank: Rank, recipe: Recipe):
        self._rank, self._recipe = rank, recipe

    def __call__(self, name: str, repeats: int) -> dict[str, float]:
        step = RankStep(self._rank, self._recipe.model_copy(update={"engine": ENGINES[name]}))
        # ZeRO-3 learns the course of a step in the second.
        step(3)
        seconds = statistics.median(step(1) for _ in range(repeats))
        held = step.engine.held()
        weights, optimizer_state = megabytes(held.weights), megabytes(held.optimizer_state)
        step.gradients()
        gradients = megabytes(step.engine.held().gradients)
        step.engine.step()
        del step
        gc.collect()
        return {
            "optimizer_state_mb": optimizer_state,
            "gradients_mb": gradients,
            "weights_mb": weights,
            "step_ms": 1000 * seconds,
        }


def megabytes(tensors: Iterable[Tensor]) -> float:
    """MiB of the memory behind some tensors, that of several counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / 2**20


def bench_engine(recipe: Recipe, *, workers: int, device: str, repeats: int, on_progress: OnProgress) -> dict[str, Any]:
    """Measure every engine on the same ranks, one after the other, from the tensors that they really hold.

    Weights and optimizer state are those between two steps, gradients those between a backward pass and the update.

    Args:
        recipe: what is trained; see `step_recipe`.
        workers: ranks, of one thread each.
        device: see `ranks_device`.
        repeats: timed steps, of which medians are taken.
        on_progress: told what comes next.

    Returns:
        The JSON object of `arat bench engine`: for each engine a list with the MiB of each rank, and step_ms.
    """
    engines = []
    with RankGroup(workers, 1, device, _Measure, recipe) as group:
        for name in ENGINES:
            on_progress(name)
            ranks = group(name, repeats)
            sizes = {key: [rank[key] for rank in ranks] for key in ranks[0] if key.endswith("_mb")}
            engines.append({"engine": name, **sizes, "step_ms": max(rank["step_ms"] for rank in ranks)})
    return {
        "model": recipe.model.name,
        "optimizer": recipe.optim.name,
        "global_batch_size": recipe.train.global_batch_size,
        "precision": recipe.train.precision,
        "workers": workers,
        "device": device,
        "engines": engines,
    }
