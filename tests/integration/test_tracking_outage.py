"""Training while MLflow's server or its database is killed, hangs or fails: nothing is lost, nothing is there twice.

What arrived is counted in the database itself, not asked of MLflow.
"""

import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import MLflowServer, Postgres, bad_server, wait_for
from small import marked_processes, tiny_overrides

from arat_dist.metrics import TIMED
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from launcher.cli import main
from launcher.cluster import disconnect
from launcher.fit import fit

Query = Callable[[str], list[tuple]]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    cluster = Postgres()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def server(postgres, tmp_path_factory) -> Iterator[MLflowServer]:
    """`mlflow server` on PostgreSQL."""
    mlflow = MLflowServer(postgres.uri, tmp_path_factory.mktemp("server"))
    yield mlflow
    mlflow.kill()


def overrides(digits: Path, storage: Path, uri: str, **more: str) -> list[tuple[str, str]]:
    """40 steps with a line each; the only checkpoint is the last one."""
    keys = {"track.mlflow": "true", "track.uri": uri, "train.max_steps": "40", "train.log_every": "1"}
    given = {key.replace("__", "."): value for key, value in more.items()}
    return list((tiny_overrides(digits, storage) | keys | given).items())


def ignore(_: object) -> None:
    """Take a line and do nothing."""


def at_steps(monkeypatch: pytest.MonkeyPatch, events: dict[int, Callable[[], object]]) -> None:
    """Have things happen right after the lines of these steps; the training waits for them."""
    works = Run.log

    def log(self: Run, line: dict[str, Any]) -> None:
        works(self, line)
        events.get(line["step"], lambda: None)()

    monkeypatch.setattr(Run, "log", log)


def lines_of(storage: Path, name: str = "one") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (storage / name / "metrics.jsonl").read_text().splitlines()]


def newest_checkpoint(storage: Path) -> int:
    return max((int(path.parent.name[5:]) for path in storage.glob("one/checkpoints/step_*/manifest.json")), default=0)


def check_all_is_there(query: Query, storage: Path, summary: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """Every value of every line is a row of the database, once, with its step and time, and there are no others.

    Args:
        query: asks the database.
        storage: of the run, whose name is "one".
        summary: of the run.
        but: keys whose values may differ.
    """
    run_id = summary["mlflow_run_id"]
    assert query("SELECT run_uuid, name, status FROM runs WHERE name = 'one'") == [(run_id, "one", "FINISHED")]
    (start_ms,) = query(f"SELECT start_time FROM runs WHERE run_uuid = '{run_id}'")[0]
    lines = lines_of(storage)
    last = {"step": summary["steps"], "time_s": lines[-1]["time_s"]}
    final = last | {f"val_{key}": summary[key] for key in ("clean_accuracy", "robust_accuracy")}
    expected = [
        (key, line["step"], None if key in but else value, None if but else start_ms + round(1000 * line["time_s"]))
        for line, left_out in [*((line, ("step",)) for line in lines), (final, ("step", "time_s"))]
        for key, value in line.items()
        if key not in left_out
    ]
    rows = query(f"SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = '{run_id}'")
    found = [(key, step, None if key in but else value, None if but else at) for key, step, value, at in rows]
    assert sorted(found, key=lambda row: row[:2]) == sorted(expected, key=lambda row: row[:2])
    experiments = query(f"SELECT count(*) FROM params WHERE run_uuid = '{run_id}' AND key = 'train.max_steps'")
    assert experiments == [(1,)]


@pytest.fixture
def alone(postgres, server) -> None:
    """Names of runs are looked for in the database: those of the tests before get others."""
    postgres.query("UPDATE runs SET name = 'before' RETURNING name")


@pytest.mark.failure("MLflow's server on PostgreSQL is killed for a while")
@pytest.mark.usefixtures("alone")
def test_a_server_that_is_killed_and_comes_back_has_every_line_once(digits, tmp_path, monkeypatch, postgres, server):
    count = "SELECT count(*) FROM metrics m JOIN runs r USING (run_uuid) WHERE r.name = 'one' AND m.key = 'loss'"
    arrived: list[int] = []

    def kill() -> None:
        wait_for(lambda: postgres.query(count) == [(10,)], "the first ten lines never came")
        server.kill()

    def start() -> None:
        arrived.extend(postgres.query(count)[0])
        server.start()

    at_steps(monkeypatch, {10: kill, 30: start})
    summary = fit(load_recipe("digits", overrides(digits, tmp_path, server.uri)), "one", ignore)
    assert arrived == [10]
    assert (summary["steps"], summary["mlflow_tracking_uri"]) == (40, server.uri)
    check_all_is_there(postgres.query, tmp_path, summary)


@pytest.mark.failure("MLflow's PostgreSQL is killed, twice")
@pytest.mark.usefixtures("alone")
def test_a_database_that_is_killed_and_recovers_has_every_line_once(
    digits, tmp_path, monkeypatch, postgres, server, caplog
):
    recoveries = postgres.log().count("automatic recovery in progress")
    at_steps(monkeypatch, {10: postgres.kill, 25: postgres.start, 30: postgres.kill, 35: postgres.start})
    summary = fit(load_recipe("digits", overrides(digits, tmp_path, server.uri)), "one", ignore)
    assert postgres.log().count("automatic recovery in progress") == recoveries + 2
    check_all_is_there(postgres.query, tmp_path, summary)
    assert "delivers it" not in caplog.text


@pytest.fixture
def _ray() -> Iterator[None]:
    yield
    disconnect()


@pytest.mark.failure("a worker is killed when MLflow has lines beyond the checkpoint")
@pytest.mark.usefixtures("alone", "_ray")
def test_a_worker_that_is_killed_and_computes_lines_again_leaves_each_step_once(digits, tmp_path, postgres, server):
    killed: list[int] = []
    of_the_run = "JOIN runs r USING (run_uuid) WHERE r.name = 'one' AND"
    newest = f"SELECT coalesce(max(step), 0) FROM metrics m {of_the_run} m.key = 'loss'"

    def lines_arrived_that_will_be_dropped() -> bool:
        """After a checkpoint and well before the next."""
        return 3 <= postgres.query(newest)[0][0] - newest_checkpoint(tmp_path) <= 25

    def kill_one(line: dict[str, Any]) -> None:
        if newest_checkpoint(tmp_path) and not killed:
            wait_for(lines_arrived_that_will_be_dropped, "no line past a checkpoint arrived")
            killed.append(max(marked_processes("ray::RayTrainWorker")))
            os.kill(killed[0], signal.SIGKILL)

    keys = {"cluster__workers": "2", "train__checkpoint_every": "40", "train__max_steps": "200", "train__epochs": "9"}
    summary = fit(load_recipe("digits", overrides(digits, tmp_path, server.uri, **keys)), "one", kill_one)
    assert summary["restarts"] == 1
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 201))
    # Steps are computed again to the same values, in another time.
    timed = ("time_s", "images_per_second", "memory_mb", *(f"{part}_fraction" for part in TIMED))
    system = {key for line in lines_of(tmp_path) for key in line if key.startswith("system/")}
    check_all_is_there(postgres.query, tmp_path, summary, but=(*timed, *system))
    ((steps,),) = postgres.query(f"SELECT t.value FROM tags t {of_the_run} t.key = 'arat.recomputed_steps'")
    went_on = json.loads((tmp_path / "one/attempts.jsonl").read_text().splitlines()[1])["step"]
    assert int(steps.split()[0]) == went_on + 1


@pytest.mark.failure("MLflow's server on sqlite is killed for a while")
def test_a_server_on_sqlite_that_is_killed_has_every_line_once(digits, tmp_path, monkeypatch):
    server = MLflowServer(f"sqlite:///{tmp_path}/server.db", tmp_path)

    def query(sql: str) -> list[tuple]:
        with closing(sqlite3.connect(tmp_path / "server.db")) as database:
            return database.execute(sql).fetchall()

    try:
        at_steps(monkeypatch, {10: server.kill, 30: server.start})
        summary = fit(load_recipe("digits", overrides(digits, tmp_path, server.uri)), "one", ignore)
        check_all_is_there(query, tmp_path, summary)
    finally:
        server.kill()


FAILING = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\nsick"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(FAILING, id="fails", marks=pytest.mark.failure("MLflow's server fails all along")),
        pytest.param(None, id="hangs", marks=pytest.mark.failure("MLflow's server hangs all along")),
    ],
)
def test_a_server_that_is_no_good_stops_nothing_and_sync_delivers_to_another(
    digits, tmp_path, monkeypatch, capsys, caplog, postgres, server, answer
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with bad_server(answer) as uri:
        summary = fit(load_recipe("digits", overrides(digits, tmp_path, uri)), "one", ignore)
        assert (summary["steps"], summary["mlflow_tracking_uri"], summary["mlflow_run_id"]) == (40, uri, None)
        assert len(lines_of(tmp_path)) == 40
        said = [record.getMessage() for record in caplog.records if record.name == "arat_dist.mirror"]
        assert len(said) == 2
        assert said[0].startswith(f"MLflow at {uri}: ")
        assert said[0].endswith("metrics.jsonl has every line")
        assert said[1].endswith(f"`arat track sync {tmp_path}/one` delivers it")

        capsys.readouterr()
        assert main(["track", "sync", f"{tmp_path}/one"]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"arat: track.uri: {uri}: ")

    results = []
    for _ in range(2):
        assert main(["track", "sync", f"{tmp_path}/one", "--json", "--track.uri", server.uri]) == 0
        results.append(json.loads(capsys.readouterr().out))
        check_all_is_there(postgres.query, tmp_path, summary | results[0])
    first, second = results
    assert second == first | {"metrics_sent": 0}
    assert first["metrics_sent"] > 40
    assert json.loads((tmp_path / "one/mlflow.json").read_text())["run_id"] == first["mlflow_run_id"]


def test_what_sync_does_not_take(capsys, tmp_path, digits):
    assert main(["track", "sync", f"{tmp_path}/none"]) == 2
    assert capsys.readouterr().err == f"arat: {tmp_path}/none: not a run (no recipe.yaml in it)\n"
    keys = overrides(digits, tmp_path, "http://127.0.0.1:9", train__max_steps="1", track__mlflow="false")
    fit(load_recipe("digits", keys), "one", ignore)
    capsys.readouterr()
    assert main(["track", "sync", f"{tmp_path}/one"]) == 2
    assert "track.mlflow: false" in capsys.readouterr().err
    assert main(["track", "sync", f"{tmp_path}/one", "--train.epochs", "3"]) == 2
    assert "--train.epochs: a key of the section track" in capsys.readouterr().err
