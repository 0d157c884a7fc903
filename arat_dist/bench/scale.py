"""`arat bench scale`: several workers of one thread against one worker with as many threads."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from arat_dist.bench.ranks import RankGroup
from arat_dist.bench.step import OnProgress, synthetic_batch
from arat_dist.config import Recipe
from arat_dist.data.loader import Batch
from arat_dist.engine import Rank, build_engine
from arat_dist.objectives import build_objective
from arat_dist.step import compute_gradients, micro_batches


class RankStep:
    """The step that the trainer takes, on one rank and its share of one batch again and again."""

    def __init__(self, rank: Rank, recipe: Recipe):
        torch.manual_seed(0)
        self._rank, self.size = rank, recipe.train.global_batch_size
        self.engine = build_engine(build_objective(recipe), recipe.engine, recipe.optim, rank)
        self.engine.objective.train()
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
        self._rank.all_reduce(torch.zeros(()))
        begin = time.perf_counter()
        for _ in range(num_steps):
            self.gradients()
            self.engine.step()
        return time.perf_counter() - begin


def bench_scale(recipe: Recipe, *, workers: int, steps: int, repeats: int, on_progress: OnProgress) -> dict[str, Any]:
    """Time both in turn, `repeats` times after a warm-up.

    Args:
        recipe: what both train; see `step_recipe`.
        workers: processes of one thread, and threads of the one process.
        steps: of each turn.
        repeats: rounds.
        on_progress: told what comes next.

    Returns:
        The JSON object of `arat bench scale`: medians over the rounds; `ratio` is that of the speeds in one round.
    """
    with RankGroup(workers, 1, RankStep, recipe) as many, RankGroup(1, workers, RankStep, recipe) as one:
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
    pictures = steps * recipe.train.global_batch_size
    ratios = [alone / together for together, alone in seconds]
    return {
        "model": recipe.model.name,
        "image_size": recipe.data.image_size,
        "global_batch_size": recipe.train.global_batch_size,
        "attack_steps": recipe.attack.steps,
        "precision": recipe.train.precision,
        "engine": recipe.engine.kind,
        "workers": workers,
        "images_per_second": {
            f"{workers}x1": pictures / statistics.median(together for together, _ in seconds),
            f"1x{workers}": pictures / statistics.median(alone for _, alone in seconds),
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
