"""A run is a folder: its recipe, its metrics, its checkpoints, its summary."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from arat_dist.checkpoint import newest_about
from arat_dist.config import ClusterConfig, Recipe
from arat_dist.errors import SupersededError, UserError
from arat_dist.lease import Lease, taken
from arat_dist.recipe import parse_recipe
from arat_dist.storage import Storage

METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
SEARCH = "search.yaml"
"""What the folder of a search has in the place of a recipe."""
SUMMARY = "summary.json"
ATTEMPTS = "attempts.jsonl"
SKIPPED = "skipped.jsonl"
DATA = "data.json"
MLFLOW = "mlflow.json"
LOCK = ".lock"

# What may differ between two launches of one run: nothing here changes a weight.
_FREE_SECTIONS = ("cluster", "track", "eval", "engine")
_FREE_KEYS = {
    "train": (
        *("log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "max_steps", "max_skipped_steps"),
        "grad_checkpointing",
    ),
    # Sets may move: what they hold is compared instead.
    "data": ("train", "val", "loader_threads", "stage_to"),
}


class Run:
    """One run's folder under the storage URI.

    Args:
        storage: folder or URI of all runs.
        name: the run's name, a plain folder name.

    Raises:
        UserError: the name can't be a folder's.
    """

    def __init__(self, storage: str, name: str):
        if not name or name.startswith(".") or "/" in name:
            raise UserError(f"--name: {name!r}: a plain folder name would be right")
        self.name = name
        self.storage = Storage(storage)
        self.folder = self.storage / name
        self.checkpoints = self.folder / "checkpoints"

    @classmethod
    def at(cls, uri: str) -> Run:
        """The run in a folder, or that of a name in the default storage; UserError where there is neither."""
        parent, slash, name = uri.rstrip("/").rpartition("/")
        for storage in [parent or "/"] if slash else [".", ClusterConfig().storage]:
            run = cls(storage, name)
            if run.folder.exists(RECIPE):
                return run
        raise UserError(f"{uri}: not a run (no {RECIPE} in it)")

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that isn't this run's, if the run has begun (UserError); finished or not."""
        if self.folder.exists(SEARCH):
            raise UserError(f"--name: {self.name}: a search has this name; another name would be right")
        if not self.folder.exists(RECIPE):
            return
        before = essence(self.recipe())
        differing = sorted(key for key, value in essence(recipe).items() if value != before.get(key))
        if differing:
            raise UserError(
                f"--name: {self.name}: the run of this name has another recipe (it differs in "
                f"{', '.join(differing)}); another name, or that recipe, would be right"
            )

    def open(self, recipe: Recipe, train_sha256: str) -> None:
        """Begin the run, or go on with it.

        Args:
            recipe: the resolved recipe.
            train_sha256: of the training set.

        Raises:
            UserError: the run has another recipe or another training set, or its folder can't be written.
        """
        self.check(recipe)
        try:
            before = self.folder.read_json(DATA).get("train_sha256", train_sha256)
            if before != train_sha256:
                raise UserError(
                    f"data.train: {recipe.data.train}: not the pictures that the run {self.name} began with; those, or "
                    "another --name, would be right"
                )
            self.folder.write_json(DATA, {"train_sha256": train_sha256})
            self.folder.write(RECIPE, recipe.to_yaml().encode())
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the run to this process inside the context: by a lock that ends with the process, or by a lease.

        Raises:
            TakenError: another process has it.
            UserError: the folder can't be written.
        """
        if not self.storage.is_local:
            with Lease(self.folder, self.name):
                yield
            return
        path = Path(self.folder.path(LOCK))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken(self.name) from None
            yield

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cluster.storage: {self.storage.uri}: {error.strerror or error}")

    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        return parse_recipe(yaml.safe_load(self.folder.read(RECIPE)), source=self.folder.path(RECIPE))

    def summary(self) -> dict[str, Any]:
        """The summary; empty while the run is unfinished."""
        return self.folder.read_json(SUMMARY)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary: from now on the run is finished."""
        self.folder.write_json(SUMMARY, summary)

    def mlflow(self) -> dict[str, Any]:
        """What finds the run in MLflow: tracking_uri, token, start_ms and, once it is known, run_id; else empty.

        Where its file is gone, as in a folder that was put together from its checkpoints, the newest of those has it.
        """
        return self.folder.read_json(MLFLOW) or newest_about(self.checkpoints).get("mlflow", {})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint notes of the run that it belongs to."""
        return {"mlflow": self.folder.read_json(MLFLOW)}

    def begin_attempt(self, **values: object) -> int:
        """Note that the work starts or goes on: one line of attempts.jsonl each time; returns its number."""
        self.folder.append(ATTEMPTS, json.dumps(values).encode() + b"\n")
        return self.num_attempts()

    def check_attempt(self, number: int) -> None:
        """Refuse to go on if the work has been started again since (SupersededError)."""
        if (newest := self.num_attempts()) != number:
            raise SupersededError(f"{self.name}: start {newest} of this run is at work, this is start {number}")

    def note_skipped(self, step: int, samples: Sequence[int]) -> None:
        """Append a line to skipped.jsonl: a step, counted from 1, and the indices of the samples of its batch."""
        self.folder.append(SKIPPED, json.dumps({"step": step, "samples": samples}).encode() + b"\n")

    def num_attempts(self) -> int:
        """How often the work was started, by a launch or by a restart of the workers."""
        return self.folder.read(ATTEMPTS).count(b"\n") if self.folder.exists(ATTEMPTS) else 0

    def log(self, *lines: dict[str, Any]) -> None:
        """Append lines to metrics.jsonl, all or none (OSError)."""
        self.folder.append(METRICS, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        return [line for line, _ in self.metrics_from(0)]

    def metrics_from(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole lines from a byte offset on, each with the offset behind it.

        If the file was cut and written anew since the offset was given, from its beginning.
        """
        content = self.folder.read_from(METRICS, max(0, offset - 1))
        if offset and not content.startswith(b"\n"):
            offset, content = 0, self.folder.read_from(METRICS, 0)
        for line in content[1 if offset else 0 :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset

    def forget_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines beyond a step, which will be computed again, and half a line; returns those kept."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in kept)
        if content != self.folder.read_from(METRICS, 0):
            self.folder.write(METRICS, content)
        return kept


def essence(recipe: Recipe, free_sections: Collection[str] = _FREE_SECTIONS) -> dict[str, Any]:
    """Dotted keys and values of all that decides the weights: of all sections but the free ones."""
    tree = recipe.model_dump(mode="json", exclude={*free_sections})
    return {
        f"{section}.{key}": value
        for section, keys in tree.items()
        for key, value in keys.items()
        if key not in _FREE_KEYS.get(section, ())
    }
