"""`arat bench train`: what the trainer costs around the step, in a real run of its own."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from typing import Any

from arat_dist.config import Recipe
from arat_dist.errors import UserError
from arat_dist.metrics import waits_for_device
from arat_dist.run import Run
from launcher.fit import fit


def bench_train(recipe: Recipe) -> dict[str, Any]:
    """Train in this process with everything on, the loader, metrics, MLflow, checkpoints; then drop the run.

    The first line of the metrics is left out: loading and compiling what is used for the first time is no cost of the
    loop. What comes after the last line, the last checkpoint and the evaluation, is left out too. Checkpoints on the
    way count by the time that they keep the loop from its next step; they are written beside it. A GPU is waited for at
    the end of each part, so that times are its own and add up: what the loop would do while it computes counts as well.

    Returns:
        The JSON object of `arat bench train`; its fractions are of the loop's time.

    Raises:
        UserError: the run is too short to tell.
    """
    token = waits_for_device.set(True)
    try:
        lines = _lines(recipe)
    finally:
        waits_for_device.reset(token)
    if len(lines) < 2:
        raise UserError("train.log_every: at least two lines of metrics are needed; a smaller value would be right")
    spans = [(line, line["time_s"] - before["time_s"]) for before, line in pairwise(lines)]
    total = sum(seconds for _, seconds in spans)

    def mean(name: str) -> float:
        return sum(seconds * line[name] for line, seconds in spans) / total

    return {
        "overhead_fraction": 1 - mean("compute_fraction"),
        "loader_wait_fraction": mean("loader_wait_fraction"),
        "checkpoint_fraction": mean("checkpoint_fraction"),
        "images_per_second": mean("images_per_second"),
        "steps": lines[-1]["step"] - lines[0]["step"],
        "wall_s": total,
    }


def _lines(recipe: Recipe) -> list[dict[str, Any]]:
    """The metrics of a run without workers, of which nothing else is kept."""
    with tempfile.TemporaryDirectory() as storage:
        cluster = recipe.cluster.model_copy(update={"workers": 0, "storage": storage})
        track = recipe.track.model_copy(update={"uri": None})
        fit(recipe.model_copy(update={"cluster": cluster, "track": track}), "bench")
        return list(Run(storage, "bench").metrics())
