"""MLflow as a mirror: every line once, across restarts and lost answers, and never in the way."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from toys import Sets, toy_recipe

from arat_dist.checkpoint import Checkpoint
from arat_dist.errors import TrackingError, UserError
from arat_dist.mirror import Follower, Mirror
from arat_dist.run import Run
from arat_dist.saving import Saver
from arat_dist.tracking import Replica, flatten, sync, tracking_uri, without_password

SETS = Sets("train.beton", "val.beton")


def line(step: int) -> dict[str, Any]:
    return {"step": step, "time_s": step / 2, "loss": 1 / step, "clean_accuracy": step / 100}


def open_run(folder: Path, **sections: Any) -> tuple[Run, Any]:
    recipe = toy_recipe(SETS, **{"track": {"mlflow": True, "experiment": "tests"}, **sections})
    run = Run(str(folder), "one")
    run.open(recipe, "a" * 64)
    return run, recipe


def opened(folder: Path, *steps: int) -> tuple[Run, Any, str]:
    """A run with these lines, its recipe, and the default MLflow database beside it."""
    run, recipe = open_run(folder)
    for step in steps:
        run.log(line(step))
    return run, recipe, f"sqlite:///{folder}/mlflow.db"


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def rows(folder: Path, sql: str = "SELECT key, step, value FROM metrics") -> list[tuple[Any, ...]]:
    """What MLflow's database holds, read without MLflow."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        return sorted(database.execute(sql).fetchall())


def expected(*steps: int) -> list[tuple[str, int, float]]:
    lines = [line(step) for step in steps]
    return sorted((key, each["step"], float(value)) for each in lines for key, value in each.items() if key != "step")


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
    replica = Replica(run, recipe, uri)
    replica.update()
    for step in (4, 6):
        run.log(line(step))
    replica.update()  # then the driver is gone; the run isn't finished
    first = replica.run_id
    assert first is not None
    client = MlflowClient(uri)
    assert history(client, first, "loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    info = client.get_run(first).info
    assert info.status == "RUNNING"
    times = [metric.timestamp - info.start_time for metric in client.get_metric_history(first, "loss")]
    assert times == [1000, 2000, 3000]

    # The run goes on from a checkpoint at step 4: its last line is computed again, at another time.
    run.forget_metrics_after(4)
    again = Mirror(Replica(run, recipe, uri))
    again.start()
    for step in (6, 8):
        run.log({**line(step), "time_s": step})
    wait_for(lambda: (8, 1 / 8) in history(client, first, "loss"), "the last line never came")
    assert client.get_run(first).info.status == "RUNNING"
    again.finish({"clean_accuracy": 0.5, "robust_accuracy": None, "steps": 8})
    assert again.run_id == first
    assert len(client.search_runs([client.get_run(first).info.experiment_id])) == 1
    steps = (2, 4, 6, 8)
    assert history(client, first, "loss") == [(step, 1 / step) for step in steps]
    assert history(client, first, "clean_accuracy") == [(step, step / 100) for step in steps]
    assert history(client, first, "time_s") == [(2, 1), (4, 2), (6, 3), (8, 8)]
    assert client.get_run(first).data.tags["arat.recomputed_steps"] == "6 to 6"
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


def test_a_server_that_is_not_there_stops_nothing(tmp_path, caplog):
    run, recipe = open_run(tmp_path)
    mirror = Mirror(Replica(run, recipe, "http://127.0.0.1:9"))
    mirror.start()
    run.log(line(2))
    mirror.finish({"clean_accuracy": 0.5, "steps": 2})
    assert not mirror.is_alive()
    assert mirror.run_id is None
    assert "MLflow at http://127.0.0.1:9" in caplog.text
    assert caplog.text.count("metrics.jsonl has every line") == 1
    assert caplog.text.count(f"`arat track sync {tmp_path}/one` delivers it") == 1
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert run.metrics() == [line(2)]


def test_a_call_that_fails_midway_is_made_again(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    run, recipe = open_run(tmp_path)
    uri = tracking_uri(recipe, run)
    assert uri is not None
    works, failures = MlflowClient.log_batch, [2, 1]

    def fails_at_first(self: Any, run_id: str, metrics: Any = (), **keys: Any) -> Any:
        if any(metric.step == 4 for metric in metrics) and failures:
            failures.pop()
            raise OSError("database is locked")
        return works(self, run_id, metrics=metrics, **keys)

    monkeypatch.setattr(MlflowClient, "log_batch", fails_at_first)
    mirror = Mirror(Replica(run, recipe, uri))
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
    mirror = Mirror(Replica(run, recipe, uri))
    mirror.start()
    run.log(line(2))
    mirror.finish(None)
    assert mirror.run_id is not None
    client = MlflowClient(uri)
    assert client.get_run(mirror.run_id).info.status == "FAILED"
    assert history(client, mirror.run_id, "loss") == [(2, 1 / 2)]

    # Taken up again, it runs; and if a line never gets across, it isn't closed.
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
    again = Mirror(Replica(run, recipe, uri))
    again.start()
    run.log(line(4))
    again.finish({"clean_accuracy": 0.5, "steps": 4})
    assert client.get_run(mirror.run_id).info.status != "FINISHED"
    assert history(client, mirror.run_id, "val_clean_accuracy") == []


def test_a_server_that_never_answers_holds_the_end_up_for_no_longer_than_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    run, recipe = open_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = Mirror(Replica(run, recipe, f"http://127.0.0.1:{silent.getsockname()[1]}"))
        mirror.start()
        mirror.finish({"clean_accuracy": 0.5, "steps": 2}, timeout_s=0.5)
        assert mirror.is_alive()  # nobody waits for it
        assert mirror.daemon
    mirror.join(30)
    assert f"`arat track sync {tmp_path}/one` delivers it" in caplog.text


# Answers that are lost, and what the server really has ---------------------------------------------------------------


@pytest.mark.parametrize("call", ["log_batch", "create_run", "create_experiment", "set_terminated", "set_tag"])
def test_a_call_that_was_applied_and_whose_answer_was_lost_duplicates_nothing(tmp_path, monkeypatch, call):
    from mlflow.tracking import MlflowClient

    run, recipe, uri = opened(tmp_path, 2, 4)
    works, lost = getattr(MlflowClient, call), []

    def answer_is_lost(self: Any, *args: Any, **keys: Any) -> Any:
        result = works(self, *args, **keys)
        if len(lost) < 3:
            lost.append(call)
            raise OSError("connection reset by peer")
        return result

    monkeypatch.setattr(MlflowClient, call, answer_is_lost)
    replica = Replica(run, recipe, uri)
    replica._recomputed.add(4)
    for _ in range(10):
        try:
            replica.close({"clean_accuracy": 0.5, "robust_accuracy": 0.25, "steps": 4})
        except OSError:
            continue
        break
    # What was found to be done isn't done again: status and MLflow's run are asked for first.
    assert len(lost) == (3 if call in ("log_batch", "set_tag") else 1)
    final = [("val_clean_accuracy", 4, 0.5), ("val_robust_accuracy", 4, 0.25)]
    assert rows(tmp_path) == sorted(expected(2, 4) + final)
    assert rows(tmp_path, "SELECT run_uuid, status FROM runs") == [(replica.run_id, "FINISHED")]


def test_what_the_server_lost_is_sent_again(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    run, recipe, uri = opened(tmp_path, 2, 4, 6)
    replica = Replica(run, recipe, uri)
    replica.update()
    # A line that was applied in part, one that was forgotten, and a parameter.
    rows(tmp_path, "DELETE FROM metrics WHERE step = 4 AND key = 'clean_accuracy'")
    rows(tmp_path, "DELETE FROM metrics WHERE step = 2")
    rows(tmp_path, "DELETE FROM params WHERE key = 'train.epochs'")
    run.log(line(8))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replica.update()
    replica.update()
    assert rows(tmp_path) == expected(2, 4, 6, 8)
    assert rows(tmp_path, "SELECT value FROM params WHERE key = 'train.epochs'") == [("3",)]


def test_a_batch_is_applied_whole_or_not_at_all(tmp_path, monkeypatch):
    """What `Replica` is told of MLflow: a batch in the midst of which the database fails leaves nothing."""
    from mlflow.entities import Metric

    run, recipe, uri = opened(tmp_path, 2)
    replica = Replica(run, recipe, uri)
    replica.update()
    rows(
        tmp_path, "CREATE TRIGGER full BEFORE INSERT ON metrics WHEN NEW.step = 7 BEGIN SELECT RAISE(FAIL, 'full'); END"
    )
    with pytest.raises(Exception, match="full"):
        replica._client.log_batch(replica.run_id, metrics=[Metric("loss", 0.0, 0, step) for step in (6, 7, 8)])
    assert rows(tmp_path) == expected(2)


def test_a_server_that_has_begun_anew_gets_everything(tmp_path):
    run, recipe, uri = opened(tmp_path, 2, 4)
    notes = {"tracking_uri": uri, "token": "t", "start_ms": 1_700_000_000_000, "run_id": "f" * 32}
    run.folder.write_json("mlflow.json", notes)
    replica = Replica(run, recipe, uri)
    replica.update()
    assert rows(tmp_path) == expected(2, 4)
    assert run.folder.read_json("mlflow.json") == notes | {"run_id": replica.run_id}
    assert rows(tmp_path, "SELECT start_time FROM runs") == [(1_700_000_000_000,)]


def test_a_run_that_is_left_with_its_checkpoints_finds_its_mlflow_run(tmp_path):
    run, recipe, uri = opened(tmp_path, 2, 4)
    Replica(run, recipe, uri).update()
    with Saver(run.checkpoints, keep=2, check=lambda: None, note=run.identity) as saver:
        saver.submit(Checkpoint(4, {"model": {}}))
    run.folder.delete("mlflow.json")
    other = Replica(run, recipe, uri)
    other.update()
    assert rows(tmp_path) == expected(2, 4)
    assert rows(tmp_path, "SELECT run_uuid FROM runs") == [(other.run_id,)]


def test_a_run_that_goes_on_with_another_setting_goes_on_in_mlflow(tmp_path):
    """A parameter can't be changed there: the first value stays."""
    run, recipe, uri = opened(tmp_path, 2)
    Replica(run, recipe, uri).update()
    run.log(line(4))
    changed = toy_recipe(SETS, track={"mlflow": True, "experiment": "tests"}, cluster={"max_failures": 9})
    assert changed.cluster.max_failures != recipe.cluster.max_failures
    Replica(run, changed, uri).update()
    assert rows(tmp_path) == expected(2, 4)
    kept = rows(tmp_path, "SELECT value FROM params WHERE key = 'cluster.max_failures'")
    assert kept == [(str(recipe.cluster.max_failures),)]


def test_at_the_end_the_whole_file_is_compared(tmp_path):
    """A file that was cut and has grown to the very byte again looks as if nothing had come."""
    run, recipe, uri = opened(tmp_path)
    for step in (2, 4):
        run.log({"step": step, "time_s": 1.0})
    replica = Replica(run, recipe, uri)
    replica.update()
    run.forget_metrics_after(2)
    run.log({"step": 3, "time_s": 1.5})
    replica.update()
    assert rows(tmp_path, "SELECT step FROM metrics") == [(2,), (4,)]
    replica.close({})
    assert rows(tmp_path, "SELECT step FROM metrics") == [(2,), (3,), (4,)]


def test_many_metrics_go_in_calls_of_a_thousand(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    run, recipe, uri = opened(tmp_path)
    works, sizes = MlflowClient.log_batch, []

    def counted(self: Any, run_id: str, **keys: Any) -> Any:
        sizes.append(len(keys.get("metrics", [])))
        return works(self, run_id, **keys)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    wide = {f"system/node{node}/cpu_percent": float(node) for node in range(1500)}
    run.log({"step": 1, "time_s": 0.0, **wide})
    for step in range(2, 200):
        run.log(line(step))
    Replica(run, recipe, uri).update()
    total = 1501 + 198 * 3
    assert len(rows(tmp_path)) == total
    assert [size for size in sizes if size] == [1000, 1000, total - 2000]


def test_only_finite_or_infinite_numbers_are_metrics(tmp_path):
    run, recipe, uri = opened(tmp_path)
    run.log({"step": 2, "time_s": 1.0, "loss": float("nan"), "norm": float("inf"), "event": "stall", "none": None})
    for _ in range(2):
        Replica(run, recipe, uri).update()
    found = rows(tmp_path, "SELECT key, is_nan, value > 1e300 FROM metrics")
    assert found == [("loss", 1, 0), ("norm", 0, 1), ("time_s", 0, 0)]


# Later ---------------------------------------------------------------------------------------------------------------


SUMMARY = {"clean_accuracy": 0.5, "robust_accuracy": None, "steps": 4}


@pytest.mark.parametrize("summary", [{}, SUMMARY])
def test_a_run_that_never_reached_its_server_is_delivered_later(tmp_path, summary):
    run, recipe, uri = opened(tmp_path, 2, 4)
    if summary:
        run.finish(summary)
    first = sync(run, recipe)
    final = [("val_clean_accuracy", 4, 0.5)] if summary else []
    status = "FINISHED" if summary else "FAILED"
    assert rows(tmp_path) == sorted(expected(2, 4) + final)
    before = rows(tmp_path, "SELECT run_uuid, name, status, end_time - start_time FROM runs")
    assert before == [(first["mlflow_run_id"], "one", status, 2000)]
    assert first == {
        "name": "one",
        "mlflow_tracking_uri": uri,
        "mlflow_run_id": run.folder.read_json("mlflow.json")["run_id"],
        "status": status,
        "metrics_sent": 6 + len(final),
    }
    assert sync(run, recipe) == first | {"metrics_sent": 0}
    assert rows(tmp_path) == sorted(expected(2, 4) + final)
    assert rows(tmp_path, "SELECT run_uuid, name, status, end_time - start_time FROM runs") == before

    # An unfinished one goes on in the same MLflow run.
    if not summary:
        run.log(line(6))
        mirror = Mirror(Replica(run, recipe, uri))
        mirror.start()
        wait_for(lambda: rows(tmp_path) == expected(2, 4, 6), "the next line never came")
        wait_for(lambda: rows(tmp_path, "SELECT status FROM runs") == [("RUNNING",)], "it isn't said to run")
        mirror.finish(SUMMARY)
        assert mirror.run_id == first["mlflow_run_id"]


def test_what_sync_refuses(tmp_path):
    run, recipe, _ = opened(tmp_path, 2)
    with pytest.raises(UserError, match=r"^track.mlflow: false: the run one has no mirror"):
        sync(run, toy_recipe(SETS))
    with run.locked(), pytest.raises(UserError, match="another process trains this run"):
        sync(run, recipe)
    away = toy_recipe(SETS, track={"mlflow": True, "uri": "http://127.0.0.1:9"})
    with pytest.raises(TrackingError, match=r"^track.uri: http://127.0.0.1:9: .*[Cc]onnection refused") as caught:
        sync(run, away)
    assert "\n" not in str(caught.value)


def test_sync_sees_a_training_that_ends_while_it_waits_for_the_run(tmp_path, monkeypatch):
    run, recipe, _ = opened(tmp_path, 2, 4)

    @contextmanager
    def ends_first(self: Run) -> Iterator[None]:
        self.finish(SUMMARY)
        yield

    monkeypatch.setattr(Run, "locked", ends_first)
    assert sync(run, recipe)["status"] == "FINISHED"
    assert rows(tmp_path, "SELECT status FROM runs") == [("FINISHED",)]


def test_a_password_reaches_the_server_and_nobody_else(tmp_path, caplog):
    assert without_password("at http://me:s3cret@h:1/x, sqlite:////a") == "at http://me:***@h:1/x, sqlite:////a"
    assert without_password("postgresql://me@h/db http://h:80/a@b") == "postgresql://me@h/db http://h:80/a@b"
    uri = "http://me:s3cret@127.0.0.1:9"
    run, recipe = open_run(tmp_path, track={"mlflow": True, "uri": uri})
    mirror = Mirror(Replica(run, recipe, uri))
    mirror.start()
    mirror.finish({})
    assert caplog.text.count("http://me:***@127.0.0.1:9") == 3, "ours twice, and what MLflow says"
    with pytest.raises(TrackingError, match=r"^track.uri: http://me:\*\*\*@127.0.0.1:9: ") as raised:
        sync(run, recipe)
    database = f"sqlite:///{tmp_path}/mlflow.db"
    Replica(run, recipe, database).update()
    assert rows(tmp_path, "SELECT value FROM params WHERE key = 'track.uri'") == [("http://me:***@127.0.0.1:9",)]
    assert "s3cret" not in caplog.text + str(raised.value)


def test_calls_are_short_and_nothing_phones_home_unless_the_user_says_otherwise():
    script = (
        "import arat_dist.tracking, json, mlflow.environment_variables as v; print(json.dumps({n: getattr(v, n).get() "
        "for n in dir(v) if 'HTTP_REQUEST' in n or 'TELEMETRY' in n or n == 'MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING'}))"
    )

    def values(**given: str) -> dict[str, Any]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
        out = subprocess.run([sys.executable, "-c", script], env=clean | given, capture_output=True, check=True).stdout
        return json.loads(out)

    ours = values()
    assert ours["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == 0
    assert ours["MLFLOW_HTTP_REQUEST_TIMEOUT"] == 10
    assert ours["MLFLOW_DISABLE_TELEMETRY"] is True
    assert ours["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] is False
    assert values(MLFLOW_HTTP_REQUEST_TIMEOUT="77")["MLFLOW_HTTP_REQUEST_TIMEOUT"] == 77


# Threads -------------------------------------------------------------------------------------------------------------


def test_a_follower_hands_over_each_line_as_it_comes(tmp_path):
    run, _ = open_run(tmp_path)
    seen: list[int] = []
    arrived = threading.Event()

    def on_line(entry: dict[str, Any]) -> None:
        seen.append(entry["step"])
        arrived.set()

    with Follower(run, on_line) as follower:
        run.log(line(2))
        assert arrived.wait(10)  # before it is stopped
        for step in (4, 6):
            run.log(line(step))
    assert seen == [2, 4, 6]
    assert not follower.is_alive()


def test_a_follower_outlives_a_storage_that_fails(tmp_path, monkeypatch):
    run, _ = open_run(tmp_path)
    works, failures = Run.metrics_from, [OSError("slow down")] * 2

    def fails_at_first(self: Run, offset: int) -> Any:
        if failures:
            raise failures.pop()
        return works(self, offset)

    monkeypatch.setattr(Run, "metrics_from", fails_at_first)
    seen: list[int] = []
    run.log(line(2))
    with Follower(run, lambda entry: seen.append(entry["step"])):
        wait_for(lambda: seen == [2], "the line never came")


def test_who_waits_for_a_server_asks_ever_more_rarely(tmp_path, monkeypatch):
    run, recipe = open_run(tmp_path)
    mirror = Mirror(Replica(run, recipe, "http://127.0.0.1:9"))
    waits: list[float] = []
    answers = iter([False] * 8 + [True] * 2)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > 10

    monkeypatch.setattr(mirror._done, "wait", wait)
    monkeypatch.setattr(mirror, "_tries", lambda _: next(answers, True))
    mirror.run()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 0.5, 0.5]


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
