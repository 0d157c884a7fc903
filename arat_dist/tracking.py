"""MLflow as a mirror of metrics.jsonl: the only file that knows of it.

The file is the truth and is written by the run itself. What MLflow lacks of it is sent while the run goes on
(`arat_dist.mirror`) or later (`sync`); sending twice changes nothing.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from arat_dist.config import Recipe
from arat_dist.errors import TrackingError, UserError
from arat_dist.run import MLFLOW, Run

# Read by MLflow at its import or at each call; what the user has set stays. By default one call to a server that is
# down blocks for minutes: here it fails at once, or after the time-out in seconds, and the mirror comes back to it.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # the tables of a new database are no news
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/]*@")
TAG = "arat.token"
"""Tag of an MLflow run by which the run that it belongs to finds it again."""
_PARENT = "mlflow.parentRunId"
_TRIAL = "arat.trial"
_PARAM_LENGTH = 500
_BATCH = 1000
"""Metrics that MLflow takes in one call; it applies all of a call or none."""


class Replica:
    """One MLflow run, made equal to what a run's folder holds.

    What is there already is asked of the server, when it is first reached and again after every call that failed: a
    call whose answer was lost may have been applied. A metric that is there for a step isn't sent again. Of a line that
    was lost with its worker and computed again, MLflow, which can't take a metric back, keeps the first values; the tag
    `arat.recomputed_steps` names such steps.

    Args:
        run: the run; need not be finished.
        recipe: its recipe.
        uri: MLflow tracking URI.
    """

    def __init__(self, run: Run, recipe: Recipe, uri: str):
        self.run, self._recipe, self.uri = run, recipe, uri
        self.run_id: str | None = None
        self.num_sent = 0
        self._client: Any = None
        self._status = ""
        self._start_ms = self._offset = 0
        self._recomputed: set[int] = set()
        # Timestamp in ms by key and step of what the server has; None: it has to be asked.
        self._there: dict[str, dict[int, int]] | None = None

    def update(self) -> None:
        """Send what came since, and all that is missing if the server has to be asked; raises what MLflow raises."""
        try:
            if self._there is None:
                self._there, self._offset = self._connect(), 0
            lines = list(self.run.metrics_from(self._offset))
            self._send(metric for line, _ in lines for metric in self._metrics(line))
            self._offset = lines[-1][1] if lines else self._offset
        except Exception:
            self._there = None
            raise

    def set_status(self, status: str, end_ms: int | None = None) -> None:
        """Change MLflow's status of the run: RUNNING, FINISHED or FAILED; nothing if it is that already.

        Args:
            status: the new one.
            end_ms: when a run ended, in ms since 1970; default: now.
        """
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status, end_ms)
        self._status = status

    def close(self, summary: dict[str, Any], *, at_the_last_line: bool = False) -> None:
        """Compare the whole file once more, add the final accuracies, and set the status.

        Args:
            summary: of the run; empty where it failed.
            at_the_last_line: whether the run ended with its last line, and not now.
        """
        self._offset = 0
        self.update()
        end = self.run.metrics()[-1:]  # a run that ends has told of its last step, a search of its last trial
        step, last = (end[0]["step"], end[0]["time_s"]) if end else (0, 0.0)
        keys = {f"val_{key}": summary.get(key) for key in ("clean_accuracy", "robust_accuracy")}
        try:
            if summary:
                self._send(self._metrics({"step": step, "time_s": last, **keys}, but=("time_s",)))
            if self._recomputed:
                steps = f"{min(self._recomputed)} to {max(self._recomputed)}"
                self._client.set_tag(self.run_id, "arat.recomputed_steps", steps)
            end_ms = self._start_ms + round(1000 * last) if at_the_last_line else None
            self.set_status("FINISHED" if summary else "FAILED", end_ms)
        except Exception:
            self._there = None
            raise

    def _metrics(self, line: dict[str, Any], but: tuple[str, ...] = ()) -> Iterator[Any]:
        """The metrics of a line that the server lacks."""
        from mlflow.entities import Metric

        assert self._there is not None
        step, at_ms = line["step"], self._start_ms + round(1000 * line["time_s"])
        for key, value in line.items():
            if key in ("step", *but) or not isinstance(value, int | float):
                continue
            first_ms = self._there.setdefault(key, {}).setdefault(step, -1)
            if first_ms < 0:
                self._there[key][step] = at_ms
                yield Metric(key, float(value), at_ms, step)
            elif first_ms != at_ms:
                self._recomputed.add(step)

    def _send(self, metrics: Iterable[Any]) -> None:
        rest = iter(metrics)
        while batch := list(islice(rest, _BATCH)):
            self._client.log_batch(self.run_id, metrics=batch)
            self.num_sent += len(batch)

    def _connect(self) -> dict[str, dict[int, int]]:
        """Find or create the MLflow run, complete its parameters; the timestamps by key and step that it has."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient  # seconds of import, in the mirror's thread

        self._client = self._client or MlflowClient(self.uri)
        found = self._find_or_create()
        run_id = found.info.run_id
        self._status, self._start_ms = found.info.status, found.info.start_time
        values = flatten(self._settings())
        params = [Param(key, without_password(str(value))[:_PARAM_LENGTH]) for key, value in values.items()]
        self._client.log_batch(run_id, params=[each for each in params if each.key not in found.data.params])
        there = {
            key: {metric.step: metric.timestamp for metric in self._client.get_metric_history(run_id, key)}
            for key in found.data.metrics
        }
        self.run_id = run_id
        return there

    def _settings(self) -> dict[str, Any]:
        """What becomes the run's parameters."""
        return self._recipe.model_dump(mode="json")

    def _find_or_create(self) -> Any:
        """The MLflow run. What finds it again is on the disk before it is created: an answer may be lost."""
        from mlflow.exceptions import MlflowException

        notes = self.run.mlflow()
        if notes.get("tracking_uri") != self.uri:
            last = max((line["time_s"] for line in self.run.metrics()), default=0.0)
            start_ms = round(1000 * (time.time() - last))
            notes = {"tracking_uri": self.uri, "token": uuid.uuid4().hex, "start_ms": start_ms}
        if notes != self.run.folder.read_json(MLFLOW):
            self.run.folder.write_json(MLFLOW, notes)
        if "run_id" in notes:
            try:
                return self._client.get_run(notes["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else the server has begun anew
                    raise
        experiment = self._experiment()
        same = self._client.search_runs([experiment], f"tags.`{TAG}` = '{notes['token']}'")
        found = (
            same[0]
            if same
            else self._client.create_run(
                experiment, start_time=notes["start_ms"], tags={TAG: notes["token"]}, run_name=self.run.name
            )
        )
        self.run.folder.write_json(MLFLOW, notes | {"run_id": found.info.run_id})
        return found

    def _experiment(self) -> str:
        name = self._recipe.track.experiment
        if (known := self._client.get_experiment_by_name(name)) is not None:
            return known.experiment_id
        # Without it, MLflow would put artifacts into ./mlruns of whoever comes first.
        return self._client.create_experiment(name, artifact_location=f"{self.run.storage.uri}/mlartifacts")


@dataclass(frozen=True)
class Child:
    """What MLflow's run of a trial gets from the search it belongs to.

    params: the trial's values.
    tags: what the search knows of it.
    status: MLflow's, once the trial has ended; the trial itself knows no pruning.
    """

    run: Run
    params: dict[str, str]
    tags: dict[str, str]
    status: str | None


class SearchReplica(Replica):
    """The MLflow run of a whole search, below which those of its trials are.

    Args:
        run: the search's folder; its metrics.jsonl has a line a trial.
        recipe: what its trials' recipes begin with.
        uri: MLflow tracking URI.
        settings: of the search.
        children: gives what its trials are to have, as of now.
    """

    def __init__(
        self, run: Run, recipe: Recipe, uri: str, settings: dict[str, Any], children: Callable[[], Sequence[Child]]
    ):
        super().__init__(run, recipe, uri)
        self._search_settings, self._children = settings, children
        self._settled: dict[str, Child] = {}
        self._is_last = False

    def update(self) -> None:
        """Send what came since, and mark the trials' runs."""
        super().update()
        for child in self._children():
            name = child.run.name
            if self._settled.get(name) != child and self._mark(child):
                self._settled[name] = child

    def close(self, summary: dict[str, Any], *, at_the_last_line: bool = False) -> None:
        """As for a run; all marks are compared once more."""
        self._settled.clear()
        self._is_last = True
        super().close(summary, at_the_last_line=at_the_last_line)

    def _mark(self, child: Child) -> bool:
        """Whether nothing more has to be marked, unless the child changes."""
        notes = child.run.folder.read_json(MLFLOW)
        if notes.get("tracking_uri", self.uri) != self.uri:
            return True  # it is another server's
        found = self._run_of(child, notes)
        if found is None:
            return False
        run_id, status = found.info.run_id, found.info.status
        for key, value in {_PARENT: self.run_id, **child.tags}.items():
            if found.data.tags.get(key, "") != value:
                self._client.set_tag(run_id, key, value)
        if child.status is None or child.status == status:
            return child.status == status or status == "RUNNING"
        # While it runs its own mirror is at work, which would have the last word.
        if status != "RUNNING" or self._is_last:
            self._client.set_terminated(run_id, child.status, found.info.end_time)
            return True
        return False

    def _run_of(self, child: Child, notes: dict[str, Any]) -> Any:
        """The run of a trial; of one that failed before it had any, a new one; None where there is none."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        if "run_id" in notes:
            try:
                return self._client.get_run(notes["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None  # somebody has deleted it
        if child.status != "FAILED":
            return None
        experiment = self._experiment()
        mine = f"tags.`{_PARENT}` = '{self.run_id}' AND tags.`{_TRIAL}` = '{child.tags[_TRIAL]}'"
        if same := self._client.search_runs([experiment], mine):
            return same[0]
        tags = {_PARENT: self.run_id, **child.tags}
        created = self._client.create_run(experiment, tags=tags, run_name=child.run.name)
        params = [Param(key, value[:_PARAM_LENGTH]) for key, value in child.params.items()]
        self._client.log_batch(created.info.run_id, params=params)
        return created

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"search": self._search_settings}


def sync(run: Run, recipe: Recipe, replicate: Callable[[Run, Recipe, str], Replica] = Replica) -> dict[str, Any]:
    """Deliver to MLflow what it lacks of a run that isn't training now; once more changes nothing.

    Args:
        run: finished or not, known to MLflow or not.
        recipe: its recipe; `track` says where to.
        replicate: makes the replica.

    Returns:
        `name`, `mlflow_tracking_uri`, `mlflow_run_id`, `status` there, and `metrics_sent`, the number that was missing.

    Raises:
        UserError: the recipe wants no mirror, or a process trains this run.
        TrackingError: MLflow can't be reached, or refuses.
    """
    uri = tracking_uri(recipe, run)
    if uri is None:
        raise UserError(f"track.mlflow: false: the run {run.name} has no mirror; --track.mlflow true would be right")
    replica = replicate(run, recipe, uri)
    with run.locked():
        summary = run.summary()  # inside: a training may have ended just now
        try:
            replica.close(summary, at_the_last_line=True)
        except Exception as error:
            raise TrackingError(f"track.uri: {without_password(uri)}: {one_line(error)}") from error
    return {
        "name": run.name,
        "mlflow_tracking_uri": without_password(uri),
        "mlflow_run_id": replica.run_id,
        "status": "FINISHED" if summary else "FAILED",
        "metrics_sent": replica.num_sent,
    }


def log_report(run: Run, files: Sequence[Path]) -> None:
    """Put files into MLflow's copy of a run, as artifacts under report/; nothing where MLflow has none.

    Raises:
        TrackingError: MLflow can't be reached, or refuses.
    """
    notes = run.folder.read_json(MLFLOW)
    if "run_id" not in notes:
        return
    uri = notes["tracking_uri"]
    try:
        _check_database(uri)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        for file in files:
            client.log_artifact(notes["run_id"], str(file), "report")
    except Exception as error:
        raise TrackingError(f"{uri}: {one_line(error)}") from error


def _check_database(uri: str) -> None:
    """Refuse an sqlite file that is gone: MLflow would make an empty one in its place (FileNotFoundError)."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise FileNotFoundError("no such file")


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


def one_line(error: Exception) -> str:
    """What an error says, in one line, without passwords."""
    return without_password(" ".join(str(error).split()))


def without_password(text: str) -> str:
    """A text with the password of every URI in it hidden: for what is read by others than the tracking server."""
    return _PASSWORD.sub(r"\1***@", text)
