"""Folders of runs for the report's tests: one that was trained, and others whose files are written by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from toys import Sets, toy_recipe

from arat_dist.data.manifest import manifest_path
from arat_dist.engine import Rank
from arat_dist.report.gather import RunRecord, read_runs
from arat_dist.run import Run
from arat_dist.train import train

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NOWHERE = Sets("nowhere/train.beton", "nowhere/val.beton")


def trained_run(sets: Sets, folder: Path, name: str = "trained") -> Run:
    """A finished run on the toy pictures, its summary as `fit` writes it."""
    recipe = toy_recipe(sets, eval={"attack": "pgd2", "every": 1, "eps": 0.05}, track={"diagnostics_every": 2})
    run = Run(str(folder), name)
    run.open(recipe, "a" * 64)
    trained = train(recipe, run, Rank(0, 1, torch.device("cpu")))
    run.finish({"name": name, "objective": "arat", "model": recipe.model.name, "wall_s": 9.0, **trained})
    return run


def written_run(
    folder: Path,
    name: str,
    lines: list[dict[str, Any]] = [],  # noqa: B006
    summary: dict[str, Any] | None = None,
    sets: Sets = NOWHERE,
    **sections: Any,
) -> Run:
    """A run whose files say what they are told to."""
    run = Run(str(folder), name)
    run.open(toy_recipe(sets, **sections), "a" * 64)
    if lines:
        run.log(*lines)
    if summary is not None:
        run.finish(summary)
    return run


def summary(clean: float, robust: float | None, *, attack: str = "pgd20", **more: Any) -> dict[str, Any]:
    """What a report reads of summary.json."""
    about = {"norm": "linf", "eps": 8 / 255, "num_samples": 10_000, "weights": "raw", "world_size": 1}
    return {"clean_accuracy": clean, "robust_accuracy": robust, "robust_attack": attack, **about, **more}


def line(step: int, **metrics: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, ten steps an epoch."""
    return {"step": step, "epoch": step / 10, "time_s": step / 2, "images_per_second": 100.0 + step, **metrics}


def write_evaluation(
    run: Run, label: str, result: dict[str, Any], verdicts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An evaluation as `arat eval` keeps it; returns its result."""
    folder = run.folder / "evaluations" / label
    whole = {"attack": "autoattack", "norm": "linf", "eps": 8 / 255, "num_samples": 10_000, "weights": "raw"} | result
    if verdicts is not None:
        buffer = io.BytesIO()
        pq.write_table(pa.table(verdicts), buffer)
        folder.write("verdicts.parquet", buffer.getvalue())
    folder.write_json("result.json", whole)
    return whole


def write_manifest(path: Path, class_names: tuple[str, ...], num_samples: int, sha256: str = "b" * 64) -> str:
    """A manifest without its .beton; returns the path that a recipe would name."""
    counts = np.bincount(np.arange(num_samples) % len(class_names), minlength=len(class_names)).tolist()
    about = {
        "num_samples": num_samples,
        "class_names": class_names,
        "class_counts": counts,
        "num_bytes": 1,
        "sha256": sha256,
        "source": "test",
        "max_side": 32,
        "jpeg_quality": 90,
        "raw_below": 1,
        "raw_share": 0.0,
        "min_size": [32, 32],
        "max_size": [32, 32],
    }
    manifest_path(path).write_text(json.dumps(about))
    return str(path)


def record(run: Run) -> RunRecord:
    """The run as a report reads it."""
    return read_runs([run.folder.uri])[0]
