"""What a report is made of: one run's recipe, metrics, summary and evaluations, as they lie in its folder."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from arat_dist.config import Recipe
from arat_dist.data.manifest import Manifest, load_manifest
from arat_dist.errors import UserError
from arat_dist.run import METRICS, SKIPPED, SUMMARY, Run
from arat_dist.storage import Storage

T = TypeVar("T")
EVALUATIONS = "evaluations"
RESULT = "result.json"
VERDICTS = "verdicts.parquet"


@dataclass(frozen=True)
class Series:
    """One metric over a run: epochs and values, float64 [N], in order."""

    epochs: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Evaluation:
    """One finished `arat eval` of a run.

    folder: where it is kept, with the verdict of each picture.
    result: its JSON object.
    """

    folder: Storage
    result: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """Its warnings, a line each."""
        return [str(warning) for warning in self.result.get("warnings") or ()]


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder has it; `label` tells it from the others of the report."""

    label: str
    run: Run
    recipe: Recipe
    lines: Sequence[dict[str, Any]]
    summary: dict[str, Any]
    evaluations: Sequence[Evaluation]

    @cached_property
    def manifest(self) -> Manifest | None:
        """Of the validation set; None where that isn't at hand."""
        try:
            return load_manifest(self.recipe.data.val)
        except UserError:
            return None

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def epochs_done(self) -> float:
        """Epochs trained so far, as metrics.jsonl knows them."""
        return float(self.lines[-1]["epoch"]) if self.lines else 0.0

    @property
    def num_skipped(self) -> int:
        """Steps skipped because their gradient was no number."""
        folder = self.run.folder
        return folder.read(SKIPPED).count(b"\n") if folder.exists(SKIPPED) else 0

    @property
    def num_restarts(self) -> int:
        """How often the work was taken up again."""
        return max(0, self.run.num_attempts() - 1)

    def series(self, key: str) -> Series:
        """A metric over the epochs; lines without it, or where it is no number, are left out."""
        found = [
            (line["epoch"], line[key])
            for line in self.lines
            if isinstance(line.get(key), int | float) and math.isfinite(line[key])
        ]
        epochs, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return Series(epochs, values)

    def keys(self, prefix: str) -> list[str]:
        """Metrics whose names begin so, in the order in which they first appear."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix)))


def read_runs(targets: Sequence[str], labels: Mapping[str, str] | None = None) -> list[RunRecord]:
    """Read each run; its label is its name, or its folder where two share it, unless `labels` has one by target.

    Raises:
        UserError: one of them is no run, is given twice, or holds a file that can't be read.
    """
    runs = [Run.at(target) for target in targets]
    folders = [run.folder.uri for run in runs]
    for target, folder in zip(targets, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{target}: is given twice; each run once would be right")
    names = [run.name for run in runs]
    given = labels or {}
    own = [run.name if names.count(run.name) == 1 else run.folder.uri for run in runs]
    shown = [given.get(target, name) for target, name in zip(targets, own, strict=True)]
    return [read_run(run, printable(label)) for run, label in zip(runs, shown, strict=True)]


def printable(text: str) -> str:
    """A name for a page or a plot: signs that XML or UTF-8 can't hold become question marks."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def read_run(run: Run, label: str) -> RunRecord:
    """Read one run's files (UserError: one is damaged)."""
    return RunRecord(
        label,
        run,
        run.recipe(),
        _intact(run.folder.path(METRICS), run.metrics),
        _intact(run.folder.path(SUMMARY), run.summary),
        read_evaluations(run.folder / EVALUATIONS),
    )


def read_evaluations(folder: Storage) -> list[Evaluation]:
    """The finished evaluations in a folder; one without its result is still at work (UserError: one is damaged)."""
    found = [folder / name for name in folder.names()]
    read = [Evaluation(each, _intact(each.path(RESULT), lambda each=each: each.read_json(RESULT))) for each in found]
    for evaluation in read:
        missing = {"attack", "clean_accuracy", "robust_accuracy", "num_samples"} - evaluation.result.keys()
        if evaluation.result and missing:
            raise UserError(f"{evaluation.folder.path(RESULT)}: has no {', '.join(sorted(missing))}")
    return [evaluation for evaluation in read if evaluation.result]


def _intact(path: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged: {error}") from error


@dataclass(frozen=True)
class ClassAccuracies:
    """Accuracy of each class: labels of those that have pictures, and two shares of 1 with their number of pictures."""

    labels: NDArray[np.int64]
    clean: NDArray[np.float64]
    robust: NDArray[np.float64]
    num_samples: NDArray[np.int64]


def class_accuracies(labels: NDArray[Any], clean: NDArray[Any], robust: NDArray[Any]) -> ClassAccuracies:
    """Per-class accuracies from labels int [N] and whether each picture is right before, and also after the attack."""
    present, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)

    def share(right: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(inverse, weights=right.astype(np.float64), minlength=len(present)) / counts

    return ClassAccuracies(present.astype(np.int64), share(clean), share(robust), counts)


def read_verdicts(evaluation: Evaluation) -> ClassAccuracies | None:
    """Per-class accuracies of an evaluation; None where it kept no verdicts (UserError: the file is damaged)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not evaluation.folder.exists(VERDICTS):
        return None
    try:
        columns = ["label", "clean_right", "robust"]
        table = pq.read_table(io.BytesIO(evaluation.folder.read(VERDICTS)), columns=columns)
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{evaluation.folder.path(VERDICTS)}: not the verdicts of an evaluation: {error}") from error
    labels, clean, robust = (table[name].to_numpy() for name in columns)
    return class_accuracies(labels, clean, robust)


def standard_error(share: float, num_samples: int) -> float:
    """Standard error of an accuracy that was counted on so many pictures."""
    return math.sqrt(share * (1 - share) / num_samples)


def data_name(record: RunRecord, evaluation: Evaluation | None = None) -> str:
    """The set that a run's own evaluation, or another one, was measured on: its path where nothing better is known."""
    val = record.recipe.data.val
    if evaluation is None or record.manifest is None:
        return val if evaluation is None else str(evaluation.result.get("data") or val)
    sha256 = evaluation.result.get("data_sha256")
    return val if sha256 in (None, record.manifest.sha256) else str(evaluation.result.get("data") or Path(val).name)
