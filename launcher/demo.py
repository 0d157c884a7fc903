"""The main job on real pictures in minutes: digits, ARAT against plain training, and the checkpoint to take home."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arat_dist.config import Recipe
from arat_dist.data.beton import write_beton
from arat_dist.data.manifest import check_beton
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError
from arat_dist.recipe import load_recipe
from arat_dist.run import SUMMARY, Run
from arat_dist.targets import export_run
from launcher.fit import fit
from launcher.progress import console

NAME = "demo"


def demo(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Write the digits, train ARAT and plain training for as long, evaluate both, export ARAT's net; the summary."""
    began = time.perf_counter()
    recipe = load_recipe("digits", overrides)
    contrast = load_recipe("digits", [*overrides, ("objective.name", "standard")])
    write_digits(recipe)
    for name in (NAME, f"{NAME}-standard"):
        forget_finished(recipe, name)
    robust = fit(recipe, NAME)
    standard = fit(contrast, f"{NAME}-standard")
    run = Run(recipe.cluster.storage, NAME)
    exported = export_run(run, Path(run.folder.uri) / "export")
    summary = robust | {
        "export": str(exported.folder),
        "export_max_difference": exported.max_difference,
        "standard_clean_accuracy": standard["clean_accuracy"],
        "standard_robust_accuracy": standard["robust_accuracy"],
        "wall_s": round(time.perf_counter() - began, 1),
    }
    run.finish(summary)
    return summary


def write_digits(recipe: Recipe) -> None:
    """Write the recipe's two sets unless they are there and whole."""
    for split, path in (("train", recipe.data.train), ("val", recipe.data.val)):
        try:
            check_beton(path)
        except UserError:
            manifest = write_beton(open_source(f"digits:{split}"), path)
            console.print(f"wrote {path}: {manifest.num_samples} pictures of {manifest.num_classes} classes")


def forget_finished(recipe: Recipe, name: str) -> None:
    """The demo starts anew when it has been to its end; an interrupted one goes on."""
    run = Run(recipe.cluster.storage, name)
    if run.folder.exists(SUMMARY):
        run.storage.delete(name)
