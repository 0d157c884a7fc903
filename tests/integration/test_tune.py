"""Searches under Ray Tune: trials are pruned, killed, gone on with; nothing is lost and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from small import ARAT, as_options, marked_processes, tiny_overrides, wait_until_gone

from arat_dist.run import Run
from arat_dist.search.front import pareto_front
from arat_dist.search.search import Search

EPOCHS = 3


def search_file(folder: Path, **changes: object) -> Path:
    """A search of trials whose scores depend on their learning rate, so that some are pruned."""
    settings = {
        "space": {
            "optim.lr": {"type": "choice", "values": [0.2, 0.1, 0.0001, 0.05]},
            "objective.gamma": {"type": "loguniform", "low": 1, "high": 100},
        },
        "trials": 3,
        "concurrency": 1,
        "epochs": EPOCHS,
        "searcher": "tpe",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(json.dumps(settings | changes))
    return folder / "small.yaml"


def options(digits: Path, storage: Path, **changes: str) -> list[str]:
    overrides = tiny_overrides(digits, storage) | {
        "cluster.workers": "1",
        "eval.every_limit": "50",
        "eval.every_attack": "pgd2",
    }
    del overrides["train.max_steps"], overrides["train.epochs"]
    return as_options(overrides | changes)


def tune(digits: Path, storage: Path, *arguments: str, file: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [
        ARAT,
        "tune",
        "digits",
        "--search",
        str(file),
        "--json",
        *options(digits, storage, **changes),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def events(search: Path, what: str = "") -> list[dict[str, Any]]:
    lines = (search / "trials.jsonl").read_text().splitlines() if (search / "trials.jsonl").exists() else []
    return [event for line in lines if what in (event := json.loads(line))["event"]]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    """A search that nothing happens to: its folder, summary, and what it said."""
    storage = tmp_path_factory.mktemp("whole")
    done = tune(digits, storage, file=search_file(storage), **{"track.mlflow": "true"})
    assert done.returncode == 0, done.stderr
    return storage / "small", json.loads(done.stdout), done.stderr


def test_a_search_ends_with_its_front_and_leaves_nothing_behind(whole):
    folder, summary, said = whole
    assert wait_until_gone(20) == {}
    assert summary["name"] == "small"
    assert sum(summary["trials"].values()) == 3
    assert summary["trials"]["failed"] == 0
    assert summary["trials"]["pruned"] >= 1
    search = Search.at(str(folder))
    front = pareto_front(search.ledger.trials)
    assert [each["trial"] for each in summary["pareto"]] == [trial.number for trial in front]
    for trial in search.ledger.trials:
        run = Run(str(folder / "trials"), trial.name)
        metrics = [line for line in run.metrics() if "val_robust_accuracy" in line]
        reports = {round(line["epoch"]): (line["val_clean_accuracy"], line["val_robust_accuracy"]) for line in metrics}
        told = {epoch: (each.clean, each.robust) for epoch, each in trial.reports.items()}
        assert told == {epoch: reports[epoch] for epoch in told}
        if trial.status == "finished":
            assert set(told) == set(range(1, EPOCHS))
            assert trial.result is not None
            own = run.summary()
            assert (trial.result.clean, trial.result.robust) == (own["clean_accuracy"], own["robust_accuracy"])
        else:
            assert re.fullmatch(r"after epoch \d, by asha", trial.reason)
            assert max(told) < EPOCHS
            assert not run.summary()
            assert run.checkpoints.names(), "it can be gone on with"
        assert f"trial {trial.number} starts: optim.lr {trial.params['optim.lr']:.4g}" in said
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert summary["best_recipe"] == str(folder / "best.yaml")


def test_mlflow_has_the_search_above_its_trials(whole):
    from mlflow.tracking import MlflowClient

    folder, summary, _ = whole
    client = MlflowClient(summary["mlflow_tracking_uri"])
    parent = client.get_run(summary["mlflow_run_id"])
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "small")
    assert parent.data.params["search.trials"] == "3"
    assert parent.data.metrics["num_pruned"] == summary["trials"]["pruned"]
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_number = {int(child.data.tags["arat.trial"]): child for child in children}
    search = Search.at(str(folder))
    assert sorted(by_number) == [trial.number for trial in search.ledger.trials]
    for trial in search.ledger.trials:
        child = by_number[trial.number]
        assert child.info.status == {"finished": "FINISHED", "pruned": "KILLED"}[trial.status]
        assert child.data.tags["arat.trial_status"] == trial.status
        assert child.data.params["optim.lr"] == str(trial.params["optim.lr"])
        history = client.get_metric_history(child.info.run_id, "val_robust_accuracy")
        assert len(history) >= len(trial.reports)
    best = [child.data.tags["arat.best"] for child in children if child.data.tags.get("arat.best")]
    assert sorted(", ".join(best).split(", ")) == ["clean", "robust", "score"]


def test_a_finished_search_says_so_and_a_recipe_of_its_own_gives_the_same_net(whole, digits, tmp_path):
    folder, summary, _ = whole
    storage = folder.parent
    again = tune(digits, storage, file=storage / "small.yaml", **{"track.mlflow": "true"})
    assert again.returncode == 0
    assert json.loads(again.stdout) == summary
    assert "small: finished already" in again.stderr
    overrides = as_options({"cluster.storage": str(tmp_path), "track.mlflow": "false"})
    done = subprocess.run(
        [ARAT, "train", summary["best_recipe"], "--json", *overrides], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (best,) = (each for each in summary["pareto"] if each["trial"] == summary["best"]["score"])
    assert (result["clean_accuracy"], result["robust_accuracy"]) == (best["clean_accuracy"], best["robust_accuracy"])


def kill(driver: subprocess.Popen[str], number: signal.Signals) -> None:
    os.kill(driver.pid, number)
    driver.wait(timeout=60)


@pytest.mark.failure("kill -9 of a search")
def test_a_killed_search_goes_on_and_ends_like_one_that_was_not(whole, digits, tmp_path, record_property):
    """Killed in the middle of the second trial, after its first epoch."""
    folder, *_ = whole
    file = search_file(tmp_path)
    command = [ARAT, "tune", "digits", "--search", str(file), *options(digits, tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        while not any(event["trial"] >= 1 for event in events(tmp_path / "small", "report")):
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            time.sleep(0.1)
        kill(driver, signal.SIGKILL)
    before = events(tmp_path / "small")
    done = tune(digits, tmp_path, file=file)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "small")[: len(before)] == before, "what was done is kept"
    search, calm = Search.at(str(tmp_path / "small")), Search.at(str(folder))
    assert [trial.params for trial in search.ledger.trials] == [trial.params for trial in calm.ledger.trials]
    assert [trial.status for trial in search.ledger.trials] == [trial.status for trial in calm.ledger.trials]
    assert [trial.result for trial in search.ledger.trials] == [trial.result for trial in calm.ledger.trials]
    told = [(event["trial"], event.get("epoch")) for event in events(tmp_path / "small", "report")]
    assert len(told) == len(set(told)), "no epoch is told twice"
    attempts = [json.loads(line) for line in (tmp_path / "small/trials/0001/attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2
    assert attempts[1]["step"] >= attempts[1]["num_steps"] // EPOCHS, "it lost its last epoch at most"
    record_property("final state", "equal")
    assert wait_until_gone(90) == {}


def test_sigterm_stops_a_search_with_checkpoints_and_it_goes_on(digits, tmp_path):
    file = search_file(tmp_path, trials=2, scheduler="none")
    command = [ARAT, "tune", "digits", "--search", str(file), *options(digits, tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        while not events(tmp_path / "small", "report"):
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert said.strip().splitlines()[-1] == "arat: stopped; the same command goes on"
    assert not events(tmp_path / "small", "ended")
    assert wait_until_gone(20) == {}
    done = tune(digits, tmp_path, file=file)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == {"finished": 2, "pruned": 0, "failed": 0}
    assert "trial 0 goes on after epoch" in done.stderr


@pytest.mark.failure("kill -9 of a trial's worker and of its process")
def test_a_trial_survives_its_worker_and_its_own_process(digits, tmp_path, record_property):
    file = search_file(tmp_path, trials=1, scheduler="none", epochs=6)
    command = [ARAT, "tune", "digits", "--search", str(file), "--json", *options(digits, tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        for title, epoch in (("ray::RayTrainWorker", 1), ("ray::TrialProcess", 3)):
            while not any(event["epoch"] >= epoch for event in events(tmp_path / "small", "report")):
                assert driver.poll() is None, driver.stderr and driver.stderr.read()
                time.sleep(0.1)
            victims = marked_processes(title)
            assert len(victims) == 1, marked_processes()
            os.kill(next(iter(victims)), signal.SIGKILL)
        out, said = driver.communicate(timeout=200)
    assert driver.returncode == 0, said
    assert json.loads(out)["trials"] == {"finished": 1, "pruned": 0, "failed": 0}
    told = [event["epoch"] for event in events(tmp_path / "small", "report")]
    assert told == [1, 2, 3, 4, 5]
    calm = subprocess.run(
        [ARAT, "train", str(tmp_path / "small/best.yaml"), "--json", f"--cluster.storage={tmp_path}/calm"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    result = json.loads(calm.stdout)
    (best,) = json.loads(out)["pareto"]
    assert (result["clean_accuracy"], result["robust_accuracy"]) == (best["clean_accuracy"], best["robust_accuracy"])
    record_property("final state", "equal")


def test_a_trial_that_fails_costs_no_other(digits, tmp_path):
    """The one whose net can't be built fails; the time of the search is over before all are through."""
    space = {"model.args": {"type": "choice", "values": [{"channels": [8, 8, 16, 16]}, {"chanels": [8]}]}}
    file = search_file(tmp_path, space=space, searcher="grid", trials=None, epochs=1)
    overrides = options(digits, tmp_path)
    overrides = [each for each in overrides if not each.startswith("--model.args")]
    command = [ARAT, "tune", "digits", "--search", str(file), "--json", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == {"finished": 1, "pruned": 0, "failed": 1}
    (failed,) = (event for event in events(tmp_path / "small", "ended") if event["status"] == "failed")
    assert "chanels" in failed["reason"]
    assert "\n" not in failed["reason"]


def test_trials_side_by_side_share_the_machine_and_mlflows_database(digits, tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two trials want a CPU each")
    file = search_file(tmp_path, concurrency=2, scheduler="median", trials=3, searcher="random")
    done = tune(digits, tmp_path, file=file, **{"track.mlflow": "true"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"]["failed"] == 0
    order = [(event["event"], event["trial"]) for event in events(tmp_path / "small")]
    assert order[:2] == [("proposed", 0), ("proposed", 1)], "the second began before anything came of the first"
    for trial in range(3):
        notes = json.loads((tmp_path / f"small/trials/{trial:04d}/mlflow.json").read_text())
        assert notes["tracking_uri"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_time_of_a_search_ends_it(digits, tmp_path):
    file = search_file(tmp_path, minutes=0.3, epochs=200, scheduler="none")
    done = tune(digits, tmp_path, file=file)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["trials"] == {"finished": 0, "pruned": 1, "failed": 0}
    assert (summary["pareto"], summary["best_recipe"]) == ([], None)
    assert events(tmp_path / "small", "ended")[0]["reason"] == "the time was over"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {},
            ["--cluster.cpus_per_worker", "999"],
            r"cluster.workers: 1: of 999 CPU each: this machine has \d+ CPU; at most 0 would be right",
        ),
        (
            {"concurrency": 99},
            ["--workers", "1"],
            "concurrency: 99: trials of 1 workers of 1 CPU each: this ",
        ),
        ({}, ["--workers", "0"], "cluster.workers: 0: a search runs under Ray; 1 or more would be right"),
        ({}, ["--data.train", "nowhere.beton"], "nowhere.beton"),
        ({}, ["--name", "a/b"], "--name: 'a/b': a plain folder name would be right"),
        ({"space": {"optim.rate": {"type": "int", "low": 1, "high": 2}}}, [], "optim.rate: unknown key"),
    ],
)
def test_bad_searches_are_refused_in_one_line_before_anything_starts(digits, tmp_path, changes, arguments, message):
    done = tune(digits, tmp_path, *arguments, file=search_file(tmp_path, **changes))
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "small/trials.jsonl").exists()


def test_a_name_in_use_is_refused(whole, digits):
    storage = whole[0].parent
    other = search_file(storage / "other", seed=1)
    done = tune(digits, storage, file=other, **{"track.mlflow": "true"})
    assert done.returncode == 2
    assert "--name: small: the search of this name is another one (it differs in seed)" in done.stderr
