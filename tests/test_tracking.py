"""MLflow as a mirror: every line once, across restarts, and never in the way."""

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from toys import Sets, toy_recipe

from arat_dist.errors import UserError
from arat_dist.run import Run
from arat_dist.tracking import Follower, Mirror, flatten, tracking_uri

SETS = Sets("train.beton", "val.beton")


def line(step: int) -> dict[str, Any]:
    return {"step": step, "time_s": step / 2, "loss": 1 / step, "clean_accuracy": step / 100}


def open_run(folder: Path, **sections: Any) -> tuple[Run, Any]:
    recipe = toy_recipe(SETS, **{"track": {"mlflow": True, "experiment": "tests"}, **sections})
    run = Run(str(folder), "one")
    run.open(recipe, "a" * 64)
    return run, recipe


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_every_line_arrives_once_also_across_a_restart(tmp_path):
    from mlflow.tracking import MlflowClient

    run, recipe = open_run(tmp_path)
    uri = tracking_uri(recipe, run)
    assert uri is not None
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    run.log(line(2))
    mirror = Mirror(run, recipe, uri)
    mirror.start()
    wait_for(lambda: mirror._last_step == 2, "the first line never came")
    for step in (4, 6):
        run.log(line(step))
    mirror.stop(60)  # the driver is gone; the run isn't finished
    first = mirror.run_id
    assert first is not None
    client = MlflowClient(uri)
    assert history(client, first, "loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    info = client.get_run(first).info
    assert info.status == "RUNNING"
    times = [metric.timestamp - info.start_time for metric in client.get_metric_history(first, "loss")]
    assert times == [1000, 2000, 3000]

    # The run goes on from a checkpoint at step 4: its last line is computed again, at another time.
    run.forget_metrics_after(4)
    again = Mirror(run, recipe, uri)
    again.start()
    for step in (6, 8):
        run.log({**line(step), "time_s": step})
    again.finish({"clean_accuracy": 0.5, "robust_accuracy": None, "steps": 8})
    assert again.run_id == first
    assert len(client.search_runs([client.get_run(first).info.experiment_id])) == 1
    steps = (2, 4, 6, 8)
    assert history(client, first, "loss") == [(step, 1 / step) for step in steps]
    assert history(client, first, "clean_accuracy") == [(step, step / 100) for step in steps]
    assert history(client, first, "step") == []
    assert history(client, first, "val_clean_accuracy") == [(8, 0.5)]
    assert history(client, first, "val_robust_accuracy") == []
    done = client.get_run(first)
    assert done.info.status == "FINISHED"
    assert done.info.run_name == "one"
    assert done.data.params["objective.gamma"] == "2.0"
    assert done.data.params["train.global_batch_size"] == "8"
    experiment = client.get_experiment(done.info.experiment_id)
    assert experiment.name == "tests"
    assert not Path("mlruns").exists()
    assert experiment.artifact_location == f"{tmp_path}/mlartifacts"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_server_that_is_not_there_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    run, recipe = open_run(tmp_path)
    mirror = Mirror(run, recipe, "http://127.0.0.1:9")
    mirror.start()
    run.log(line(2))
    began = time.monotonic()
    mirror.finish({"clean_accuracy": 0.5, "steps": 2}, timeout_s=20)
    assert time.monotonic() - began < 15
    assert not mirror.is_alive()
    assert mirror.run_id is None
    assert "MLflow at http://127.0.0.1:9" in caplog.text
    assert "metrics.jsonl has every line" in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert run.metrics() == [line(2)]


def test_a_call_that_fails_midway_is_made_again(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    run, recipe = open_run(tmp_path)
    uri = tracking_uri(recipe, run)
    assert uri is not None
    works, failures = MlflowClient.log_batch, [2, 1]

    def fails_at_first(self: Any, run_id: str, metrics: Any = (), **keys: Any) -> Any:
        if metrics[0].step == 4 and failures:
            failures.pop()
            raise OSError("database is locked")
        return works(self, run_id, metrics=metrics, **keys)

    monkeypatch.setattr(MlflowClient, "log_batch", fails_at_first)
    mirror = Mirror(run, recipe, uri)
    mirror.start()
    for step in (2, 4, 6):
        run.log(line(step))
    mirror.finish({"clean_accuracy": 0.5, "steps": 6})
    assert not failures
    assert mirror.run_id is not None
    client = MlflowClient(uri)
    assert history(client, mirror.run_id, "loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    assert client.get_run(mirror.run_id).info.status == "FINISHED"
    assert caplog.text.count("database is locked") == 1


def test_a_failed_or_incomplete_run_is_not_called_finished(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    run, recipe = open_run(tmp_path)
    uri = tracking_uri(recipe, run)
    assert uri is not None
    mirror = Mirror(run, recipe, uri)
    mirror.start()
    run.log(line(2))
    mirror.finish(None)
    assert mirror.run_id is not None
    client = MlflowClient(uri)
    assert client.get_run(mirror.run_id).info.status == "FAILED"
    assert history(client, mirror.run_id, "loss") == [(2, 1 / 2)]

    # Taken up again, it runs; and if a line never gets across, it isn't closed.
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
    again = Mirror(run, recipe, uri)
    again.start()
    run.log(line(4))
    again.finish({"clean_accuracy": 0.5, "steps": 4})
    assert client.get_run(mirror.run_id).info.status == "RUNNING"
    assert history(client, mirror.run_id, "val_clean_accuracy") == []


def test_a_server_that_never_answers_holds_the_end_up_for_no_longer_than_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    run, recipe = open_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = Mirror(run, recipe, f"http://127.0.0.1:{silent.getsockname()[1]}")
        mirror.start()
        began = time.monotonic()
        mirror.finish({"clean_accuracy": 0.5, "steps": 2}, timeout_s=0.5)
        assert time.monotonic() - began < 2
        assert mirror.daemon
    mirror.join(10)


def test_a_follower_hands_over_each_line_as_it_comes(tmp_path):
    run, _ = open_run(tmp_path)
    seen: list[int] = []
    arrived = threading.Event()

    def on_line(entry: dict[str, Any]) -> None:
        seen.append(entry["step"])
        arrived.set()

    follower = Follower(run, on_line)
    follower.start()
    run.log(line(2))
    assert arrived.wait(10)  # before it is stopped
    for step in (4, 6):
        run.log(line(step))
    follower.stop(10)
    assert seen == [2, 4, 6]
    assert not follower.is_alive()


def test_where_the_mirror_is(tmp_path):
    local, recipe = open_run(tmp_path)
    far = Run("memory://runs-of-test-tracking", "one")
    assert tracking_uri(toy_recipe(SETS, track={"mlflow": False}), far) is None
    given = toy_recipe(SETS, track={"mlflow": True, "uri": "http://server:5000"})
    assert tracking_uri(given, local) == tracking_uri(given, far) == "http://server:5000"
    with pytest.raises(UserError, match=r"^track.uri: missing"):
        tracking_uri(recipe, far)


def test_flatten_gives_dotted_keys():
    tree = {"a": {"b": {"c": 1, "d": {}}, "e": None}, "f": [1, 2]}
    assert flatten(tree) == {"a.b.c": 1, "a.b.d": {}, "a.e": None, "f": [1, 2]}
