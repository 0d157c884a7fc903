"""`arat track sync` of a search whose server was away: the search, its trials, and a trial that never had a run."""

import json

import pytest
from test_search_folder import a_story, search_at

from arat_dist.errors import UserError
from arat_dist.run import Run
from arat_dist.search.search import Search
from arat_dist.search.sync import sync_search


def trials_with_runs(search: Search, numbers: range) -> None:
    """What trials leave in their folders, MLflow never reached."""
    for number in numbers:
        trial = search.ledger.trials[number]
        run = Run(str(search.run.folder.uri) + "/trials", trial.name)
        run.open(search.recipe_of(trial), "a" * 64)
        run.log({"step": 10, "epoch": 1.0, "time_s": 1.0, "loss": 0.1 * number})
        if trial.result is not None:
            run.finish({"steps": 10, "clean_accuracy": trial.result.clean, "robust_accuracy": trial.result.robust})


def test_all_of_a_search_is_delivered_and_once_more_changes_nothing(tmp_path):
    from mlflow.tracking import MlflowClient

    begun = search_at(tmp_path)
    begun.open()
    a_story(begun)
    begun.log_ends()
    trials_with_runs(begun, range(5))  # the last one failed before it had one
    begun.run.finish(begun.take_home())
    search = Search.at(str(tmp_path / "s"))
    first = sync_search(search, [])
    again = sync_search(Search.at(str(tmp_path / "s")), [])
    assert first["metrics_sent"] > 0 == again["metrics_sent"]
    client = MlflowClient(first["mlflow_tracking_uri"])
    parent = client.get_run(first["mlflow_run_id"])
    assert (parent.info.status, parent.data.metrics["num_pruned"]) == ("FINISHED", 1)
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], below)
    found = {int(child.data.tags["arat.trial"]): child for child in children}
    assert len(children) == 6
    assert [found[n].info.status for n in range(6)] == ["FINISHED"] * 4 + ["KILLED", "FAILED"]
    assert [found[n].data.tags.get("arat.best", "") for n in range(6)] == ["clean", "score", "", "robust", "", ""]
    assert [found[n].data.metrics["val_robust_accuracy"] for n in range(4)] == [0.3, 0.5, 0.4, 0.6]
    values = {key: str(value) for key, value in search.ledger.trials[5].params.items()}
    assert found[5].data.params == values


def test_a_trial_that_another_server_has_or_that_was_deleted_stops_nothing(tmp_path):
    from mlflow.tracking import MlflowClient

    search = search_at(tmp_path)
    search.open()
    a_story(search)
    trials_with_runs(search, range(2))
    first = sync_search(search, [])
    elsewhere = tmp_path / "s/trials/0000/mlflow.json"
    notes = json.loads(elsewhere.read_text())
    MlflowClient(first["mlflow_tracking_uri"]).delete_run(notes["run_id"])
    replica = search.replica()
    assert replica is not None
    replica.close(search.take_home())
    elsewhere.write_text(json.dumps(notes | {"tracking_uri": "http://127.0.0.1:9", "run_id": "gone"}))
    replica.close(search.take_home())


def test_a_search_without_a_mirror_is_refused(tmp_path):
    search = search_at(tmp_path, **{"track.mlflow": "false"})
    search.open()
    with pytest.raises(UserError, match=r"track.mlflow: false: the run s has no mirror"):
        sync_search(search, [])
