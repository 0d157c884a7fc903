"""The main job on real pictures in minutes: digits, ARAT against plain training, and the checkpoint to take home."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arat_dist.config import Recipe, StandardConfig
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.manifest import check_beton
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError
from arat_dist.export_run import export_run
from arat_dist.recipe import load_recipe
from arat_dist.run import SUMMARY, Run
from launcher.fit import fit
from launcher.progress import console

NAME = "demo"
CONTRAST = "demo-standard"


def demo(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Write the digits, train ARAT and plain training for as long, evaluate both, export ARAT's net; the summary."""
    began = time.perf_counter()
    recipe = load_recipe("digits", overrides)
    contrast = recipe.model_copy(update={"objective": StandardConfig(name="standard")})
    write_digits(recipe)
    start_anew_unless_interrupted(recipe, contrast)
    robust = fit(recipe, NAME)
    standard = fit(contrast, CONTRAST)
    run = Run(recipe.cluster.storage, NAME)
    exported = export_run(run, Path(run.folder.uri if run.storage.is_local else NAME) / "export")
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


def start_anew_unless_interrupted(recipe: Recipe, contrast: Recipe) -> None:
    """Delete the demo's runs if the last one came to its end or had other settings; an interrupted one goes on."""
    runs = {Run(recipe.cluster.storage, NAME): recipe, Run(recipe.cluster.storage, CONTRAST): contrast}
    if all(run.folder.exists(SUMMARY) for run in runs) or not all(map(_is_of, runs, runs.values())):
        for run in runs:
            run.storage.delete(run.name)


def _is_of(run: Run, recipe: Recipe) -> bool:
    try:
        run.check(recipe)
    except UserError:
        return False
    return True
