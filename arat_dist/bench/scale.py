"""`arat bench scale`: several workers of one thread against one of as many threads; or several GPUs against one."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from arat_dist.bench.ranks import RankGroup
from arat_dist.bench.step import Clock, OnProgress, synthetic_batch
from arat_dist.config import Recipe
from arat_dist.data.loader import Batch
from arat_dist.engine import Rank, build_engine
from arat_dist.objectives import build_objective
from arat_dist.step import TrainStep, compute_gradients, micro_batches


class RankStep:
    """The step that the trainer takes, on one rank and its share of one batch again and again."""

    def __init__(self, rank: Rank, recipe: Recipe):
        torch.manual_seed(0)
        self._rank, self.size = rank, recipe.train.global_batch_size
        self.engine = build_engine(build_objective(recipe), recipe.engine, recipe.optim, rank)
        self.engine.objective.train()
        self._take_step, self._clock = TrainStep(self.engine), Clock(rank.device)
        share = slice(self.size * rank.index // rank.world_size, self.size * (rank.index + 1) // rank.world_size)
        whole = synthetic_batch(recipe, rank.device)
        self._parts = micro_batches(
            Batch(*(tensor[share] for tensor in whole)), recipe.train.micro_batches, self.size, rank
        )

    def gradients(self) -> None:
        """All of a step but the update."""
        compute_gradients(self.engine, self._parts, self._rank.world_size / self.size, lambda: None)

    def __call__(self, num_steps: int) -> float:
        """Seconds of some steps, from when all ranks begin."""
        self._rank.all_reduce(torch.zeros((), device=self._rank.device))
        begin = self._clock()
        for _ in range(num_steps):
            self._take_step(self._parts, self._rank.world_size / self.size, lambda: None)
        return self._clock() - begin


def bench_scale(
    recipe: Recipe, *, workers: int, device: str, steps: int, repeats: int, on_progress: OnProgress
) -> dict[str, Any]:
    """Time both in turn, `repeats` times after a warm-up.

    On a CPU both train the same batch with the same number of threads. On GPUs each worker has one, and the one worker
    trains one worker's part of the batch, so that a ratio of 1 is perfect there too.

    Args:
        recipe: what the workers train; see `step_recipe`.
        workers: processes of one thread, and threads of the one process.
        device: see `ranks_device`.
        steps: of each turn.
        repeats: rounds.
        on_progress: told what comes next.

    Returns:
        The JSON object of `arat bench scale`: medians over the rounds; `ratio` is that of the speeds in one round.
    """
    num_alone = 1 if device == "cuda" else workers
    size = recipe.train.global_batch_size
    alone = recipe if device == "cpu" else _with_batch(recipe, size // workers)
    with (
        RankGroup(workers, 1, device, RankStep, recipe) as many,
        RankGroup(1, num_alone, device, RankStep, alone) as one,
    ):
        on_progress("warming up")
        many(1)
        one(1)
        seconds: list[tuple[float, float]] = []
        for i in range(repeats):
            on_progress(f"round {i + 1} of {repeats}")
            # Who goes first changes: the machine warms up, and slows down, in the course of a round.
            order = (many, one) if i % 2 else (one, many)
            taken = {group: max(group(steps)) for group in order}
            seconds.append((taken[many], taken[one]))
    names = (f"{workers}x1", f"1x{num_alone}")
    ratios = [lone / together for together, lone in seconds]
    return {
        "device": device,
        "model": recipe.model.name,
        "image_size": recipe.data.image_size,
        "global_batch_size": recipe.train.global_batch_size,
        "attack_steps": recipe.attack.steps,
        "precision": recipe.train.precision,
        "engine": recipe.engine.kind,
        "workers": workers,
        "images_per_second": {
            names[0]: steps * size / statistics.median(together for together, _ in seconds),
            names[1]: steps * alone.train.global_batch_size / statistics.median(lone for _, lone in seconds),
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _with_batch(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": size})})
