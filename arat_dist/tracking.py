"""MLflow as a mirror of metrics.jsonl: the only file that knows of it.

The file is the truth and is written by the run itself. The mirror reads it, in the driver, off the step's path: a slow
or absent MLflow server can neither slow the training down nor lose a line.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from arat_dist.config import Recipe
from arat_dist.errors import UserError
from arat_dist.run import Run

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

logger = logging.getLogger(__name__)

MLFLOW = "mlflow.json"
POLL_S = 0.5
_PARAM_LENGTH = 500


class Follower(threading.Thread):
    """Hands every line of a run's metrics.jsonl to a callback, in order, as the lines come.

    Args:
        run: the run; its file need not exist yet.
        on_line: called in this thread.
    """

    def __init__(self, run: Run, on_line: Callable[[dict[str, Any]], None]):
        super().__init__(daemon=True, name=f"follow {run.name}")
        self._run, self._on_line = run, on_line
        self._offset = 0
        self._done = threading.Event()

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
    in the log and stops nothing.
    """

    def __init__(self, run: Run, recipe: Recipe, uri: str):
        super().__init__(run, self._send)
        self._recipe, self.uri = recipe, uri
        self._client: Any = None
        self.run_id: str | None = None
        self._last_step = -1
        self._start_ms = 0

    def run(self) -> None:
        """Connect, then follow."""
        try:
            self._connect()
            super().run()
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, the run goes on
            logger.warning("MLflow at %s: %s; metrics.jsonl has every line", self.uri, " ".join(str(error).split()))

    def finish(self, summary: dict[str, Any], *, timeout_s: float = 60) -> None:
        """Send what is left and close the MLflow run; gives up after a time in seconds."""
        self.stop(timeout_s)
        if self.is_alive() or self._client is None:
            return
        try:
            for key in ("clean_accuracy", "robust_accuracy"):
                if summary.get(key) is not None:
                    self._client.log_metric(self.run_id, f"val_{key}", summary[key], step=summary["steps"])
            self._client.set_terminated(self.run_id, "FINISHED")
        except Exception as error:  # noqa: BLE001 - see run
            logger.warning("MLflow at %s: %s", self.uri, " ".join(str(error).split()))

    def _connect(self) -> None:
        from mlflow.tracking import MlflowClient  # seconds of import, in this thread

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the tables of a new database are no news
        self._client = MlflowClient(self.uri)
        notes = self._run.folder.read_json(MLFLOW)
        if notes.get("tracking_uri") == self.uri:
            self.run_id = notes["run_id"]
            self._start_ms = self._client.get_run(self.run_id).info.start_time
            history = self._client.get_metric_history(self.run_id, "loss")
            self._last_step = max((metric.step for metric in history), default=-1)
            return
        created = self._client.create_run(self._experiment(), run_name=self._run.name)
        self.run_id, self._start_ms = created.info.run_id, created.info.start_time
        self._run.folder.write_json(MLFLOW, {"tracking_uri": self.uri, "run_id": self.run_id})
        for key, value in flatten(self._recipe.model_dump(mode="json")).items():
            self._client.log_param(self.run_id, key, str(value)[:_PARAM_LENGTH])

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
        self._last_step = line["step"]
        timestamp_ms = self._start_ms + int(line["time_s"] * 1000)
        metrics = [
            Metric(key, float(value), timestamp_ms, line["step"]) for key, value in line.items() if key != "step"
        ]
        self._client.log_batch(self.run_id, metrics=metrics)


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
