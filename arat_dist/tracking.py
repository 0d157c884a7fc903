"""MLflow as a mirror of metrics.jsonl: the only file that knows of it.

The file is the truth and is written by the run itself. The mirror reads it, in the driver, off the step's path: a slow
or absent MLflow server can neither slow the training down nor lose a line.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from arat_dist.config import Recipe
from arat_dist.errors import UserError
from arat_dist.run import Run

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

logger = logging.getLogger(__name__)

MLFLOW = "mlflow.json"
POLL_S = 0.5
SLOWEST_POLL_S = 60
LAST_TRIES = 3
_PARAM_LENGTH = 500


class Follower(threading.Thread):
    """Hands every line of a run's metrics.jsonl to a callback, in order, as the lines come; as a context, inside it.

    Args:
        run: the run; its file need not exist yet.
        on_line: called in this thread.
    """

    def __init__(self, run: Run, on_line: Callable[[dict[str, Any]], None]):
        super().__init__(daemon=True, name=f"follow {run.name}")
        self._run, self._on_line = run, on_line
        self._offset = 0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self) -> None:
        """Read until stopped, then once more."""
        while not self._done.wait(POLL_S):
            self.read()
        self.read()

    def read(self) -> None:
        """Hand over what came since."""
        for line, offset in self._run.metrics_from(self._offset):
            self._on_line(line)
            self._offset = offset

    def stop(self, timeout_s: float | None = None) -> None:
        """Read what is left and end, within a time in seconds."""
        self._done.set()
        self.join(timeout_s)


class Mirror(Follower):
    """Keeps one MLflow run equal to a run's metrics.jsonl; connects in its own thread.

    A run that goes on continues its MLflow run, from the first line that isn't there yet. What goes wrong is said once
    in the log, stops nothing, and is tried again, ever more rarely.
    """

    def __init__(self, run: Run, recipe: Recipe, uri: str):
        super().__init__(run, self._send)
        self._recipe, self.uri = recipe, uri
        self._client: Any = None
        self.run_id: str | None = None
        self._last_step = -1
        self._start_ms = 0
        self._is_complete = self._has_complained = False

    def run(self) -> None:
        """Connect and follow; once stopped, try a few times more to get everything across."""
        pause_s, tries_left = POLL_S, LAST_TRIES
        while tries_left:
            stopping = self._done.wait(pause_s)
            if self._catch_up():
                pause_s, tries_left = POLL_S, 0 if stopping else LAST_TRIES
            else:
                pause_s = min(2 * pause_s, SLOWEST_POLL_S)
                tries_left -= stopping
            if stopping and tries_left:
                time.sleep(POLL_S)

    def finish(self, summary: dict[str, Any] | None, *, timeout_s: float = 60) -> None:
        """Send what is left and close the MLflow run; gives up after a time in seconds.

        Args:
            summary: of the run; None where it failed.
            timeout_s: how long to wait for what is left.
        """
        self.stop(timeout_s)
        if self.is_alive() or not self._is_complete:
            return
        try:
            for key in ("clean_accuracy", "robust_accuracy"):
                if summary and summary.get(key) is not None:
                    self._client.log_metric(self.run_id, f"val_{key}", summary[key], step=summary["steps"])
            self._client.set_terminated(self.run_id, "FINISHED" if summary else "FAILED")
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, the run goes on
            self._complain(error)

    def _catch_up(self) -> bool:
        """Send all that isn't there yet; whether that worked."""
        self._is_complete = False
        try:
            if self.run_id is None:
                self._connect()
            self.read()
        except Exception as error:  # noqa: BLE001 - see finish
            self._complain(error)
            return False
        self._is_complete = True
        return True

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            text = " ".join(str(error).split())
            logger.warning("MLflow at %s: %s; metrics.jsonl has every line", self.uri, text)
        self._has_complained = True

    def _connect(self) -> None:
        from mlflow.tracking import MlflowClient  # seconds of import, in this thread

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the tables of a new database are no news
        self._client = MlflowClient(self.uri)
        notes = self._run.folder.read_json(MLFLOW)
        if notes.get("tracking_uri") == self.uri:
            self._start_ms = self._client.get_run(notes["run_id"]).info.start_time
            self._client.update_run(notes["run_id"], status="RUNNING")
            history = self._client.get_metric_history(notes["run_id"], "loss")
            self._last_step = max((metric.step for metric in history), default=-1)
            self.run_id = notes["run_id"]
            return
        created = self._client.create_run(self._experiment(), run_name=self._run.name)
        run_id, self._start_ms = created.info.run_id, created.info.start_time
        for key, value in flatten(self._recipe.model_dump(mode="json")).items():
            self._client.log_param(run_id, key, str(value)[:_PARAM_LENGTH])
        self._run.folder.write_json(MLFLOW, {"tracking_uri": self.uri, "run_id": run_id})
        self.run_id = run_id

    def _experiment(self) -> str:
        name = self._recipe.track.experiment
        if (known := self._client.get_experiment_by_name(name)) is not None:
            return known.experiment_id
        # Without it, MLflow would put artifacts into ./mlruns of whoever comes first.
        return self._client.create_experiment(name, artifact_location=f"{self._run.storage.uri}/mlartifacts")

    def _send(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if line["step"] <= self._last_step:
            return
        timestamp_ms = self._start_ms + int(line["time_s"] * 1000)
        metrics = [
            Metric(key, float(value), timestamp_ms, line["step"]) for key, value in line.items() if key != "step"
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        self._last_step = line["step"]


def tracking_uri(recipe: Recipe, run: Run) -> str | None:
    """Where the recipe's metrics are mirrored; None where they aren't (UserError: nowhere to put the default)."""
    if not recipe.track.mlflow:
        return None
    if recipe.track.uri is not None:
        return recipe.track.uri
    if not run.storage.is_local:
        raise UserError(
            f"track.uri: missing: with cluster.storage {recipe.cluster.storage} an MLflow server's URI, "
            "or track.mlflow: false, would be right"
        )
    return f"sqlite:///{run.storage.uri}/mlflow.db"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
