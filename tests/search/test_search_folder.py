"""A search's folder: the ledger survives a kill at any byte, names are taken once, the best are taken home."""

import json

import pytest
import yaml
from test_search_config import parse

from arat_dist.errors import TakenError, UserError
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from arat_dist.search.ledger import FINISHED, PRUNED, Accuracies, Ledger
from arat_dist.search.search import BEST, Search
from arat_dist.storage import Storage

TEXT = """
space:
  objective.gamma: {type: loguniform, low: 1, high: 100}
  attack.eps: {type: choice, values: [8/255, 16/255]}
trials: 6
epochs: 3
"""


def search_at(storage, text: str = TEXT, name: str = "s", **changes: str) -> Search:
    overrides = [("cluster.storage", str(storage)), *changes.items()]
    return Search.of(parse(text), load_recipe("digits", overrides), name, source="s.yaml")


def a_story(search: Search) -> None:
    """Six trials: four finish, one is pruned, one fails."""
    ledger = search.ledger
    ends = [(0.9, 0.3), (0.8, 0.5), (0.7, 0.4), (0.6, 0.6)]
    for clean, robust in ends:
        trial = search.next_trial()
        assert trial is not None
        ledger.report(trial.number, 1, Accuracies(clean - 0.1, robust - 0.1))
        ledger.end(trial.number, FINISHED, Accuracies(clean, robust))
    for status, reason in ((PRUNED, "after epoch 1, by asha"), ("failed", "a worker died")):
        trial = search.next_trial()
        assert trial is not None
        ledger.report(trial.number, 1, Accuracies(0.2, 0.1))
        ledger.end(trial.number, status, None, reason)


def test_a_pruned_trials_last_report_and_its_end_are_written_at_once(tmp_path, monkeypatch):
    search = search_at(tmp_path)
    trial = search.next_trial()
    assert trial is not None
    written = []
    monkeypatch.setattr(Storage, "append", lambda _, name, content: written.append(content))
    search.ledger.report(trial.number, 1, Accuracies(0.5, 0.25))
    search.ledger.report(trial.number, 2, Accuracies(0.5, 0.25), pruned="after epoch 2,\n by asha")
    assert [content.count(b"\n") for content in written] == [1, 2]
    assert (trial.status, trial.reason, sorted(trial.reports)) == (PRUNED, "after epoch 2, by asha", [1, 2])


def test_a_ledger_read_again_is_the_same_whatever_was_half_written(tmp_path):
    search = search_at(tmp_path)
    a_story(search)
    file = tmp_path / "s/trials.jsonl"
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in range(0, len(content) + 1, 7):
        file.write_bytes(content[:cut])
        again = Ledger(Storage(tmp_path / "s"))
        num_whole = content[:cut].count(b"\n")
        assert file.read_bytes() == content[:cut], "who reads changes nothing"
        again.mend()
        assert file.read_bytes() == b"".join(lines[:num_whole])
        assert len(again.trials) == sum(b'"proposed"' in line for line in lines[:num_whole])
        assert len(again.ended()) == sum(b'"ended"' in line for line in lines[:num_whole])
        again.propose({"objective.gamma": 2.0})
        assert Ledger(Storage(tmp_path / "s")).trials == again.trials
    file.write_bytes(content)
    assert Ledger(Storage(tmp_path / "s")).trials == search.ledger.trials


@pytest.mark.parametrize("searcher", ["random", "tpe", "motpe"])
@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_resumed_search_proposes_what_an_uninterrupted_one_does(tmp_path, searcher, killed_after):
    def go_on(search: Search, until: int) -> None:
        while len(search.ledger.trials) < until and (trial := search.next_trial()) is not None:
            gamma = trial.params["objective.gamma"]
            search.ledger.end(trial.number, FINISHED, Accuracies(1 - gamma / 100, gamma / 100))

    text = TEXT.replace("trials: 6", "trials: 14") + f"searcher: {searcher}"
    whole, begun = search_at(tmp_path / "whole", text), search_at(tmp_path / "cut", text)
    go_on(whole, 14)
    go_on(begun, killed_after)
    resumed = search_at(tmp_path / "cut", text)
    go_on(resumed, 14)
    assert [trial.params for trial in resumed.ledger.trials] == [trial.params for trial in whole.ledger.trials]
    assert resumed.next_trial() is None
    assert resumed.is_over()


def test_the_best_recipes_run_as_they_are_and_say_what_they_are(tmp_path):
    search = search_at(tmp_path)
    search.open()
    a_story(search)
    summary = search.take_home()
    assert summary["trials"] == {"finished": 4, "pruned": 1, "failed": 1}
    assert [(each["trial"], each["clean_accuracy"], each["robust_accuracy"]) for each in summary["pareto"]] == [
        (3, 0.6, 0.6),
        (1, 0.8, 0.5),
        (0, 0.9, 0.3),
    ]
    assert summary["best"] == {"robust": 3, "clean": 0, "score": 1}
    assert summary["best_recipe"] == str(tmp_path / "s/best.yaml")
    assert summary["pareto"][1]["overrides"] == search.ledger.trials[1].params
    for which, number in summary["best"].items():
        file = tmp_path / "s" / BEST[which]
        recipe, own = load_recipe(file), search.recipe_of(search.ledger.trials[number])
        assert file.read_text().startswith(f"# Trial {number} of the search s, its best by ")
        assert recipe.cluster == load_recipe("digits", [("cluster.storage", str(tmp_path))]).cluster
        assert recipe.eval == own.eval.model_copy(update={"every": None})
        for section in ("data", "model", "objective", "attack", "optim", "train", "engine"):
            assert getattr(recipe, section) == getattr(own, section)


def test_a_name_belongs_to_one_search(tmp_path):
    search = search_at(tmp_path)
    search.check()
    search.open()
    search_at(tmp_path, TEXT + "concurrency: 2\nminutes: 5\n").check()
    search_at(
        tmp_path, TEXT.replace("trials: 6", "trials: 9"), **{"cluster.workers": "1", "track.mlflow": "false"}
    ).check()
    for text, changes, message in (
        (TEXT + "seed: 1", {}, r"differs in seed\)"),
        (TEXT.replace("high: 100", "high: 50"), {}, r"differs in space\)"),
        (TEXT, {"train.seed": "1"}, r"differs in train.seed\)"),
        (TEXT, {"eval.attack": "pgd10"}, r"differs in eval.attack\)"),
        (TEXT, {"train.max_steps": "7"}, r"differs in train.max_steps\)"),
        (TEXT.replace("epochs: 3", "epochs: 4"), {}, r"differs in epochs, train.epochs\)"),
    ):
        with pytest.raises(UserError, match=f"--name: s: the search of this name is another one .it {message}"):
            search_at(tmp_path, text, **changes).check()
    with pytest.raises(UserError, match="--name: s: a search has this name; another name would be right"):
        Run(str(tmp_path), "s").check(load_recipe("digits"))
    run = Run(str(tmp_path), "r")
    run.open(load_recipe("digits"), "0")
    with pytest.raises(UserError, match="--name: r: a run has this name"):
        search_at(tmp_path, name="r").check()
    with (
        search.run.locked(),
        pytest.raises(TakenError, match="--name: s: another process"),
        search_at(tmp_path).run.locked(),
    ):
        pass


def test_an_earlier_search_is_learnt_from_if_it_is_comparable(tmp_path):
    earlier = search_at(tmp_path, name="earlier")
    earlier.open()
    a_story(earlier)
    warm = TEXT + f"searcher: tpe\nwarm_start: [{tmp_path}/earlier]\n"
    assert search_at(tmp_path, warm).earlier == earlier.ledger.trials
    for text, changes, message in (
        (warm.replace("high: 100", "high: 50"), {}, "searched another space"),
        (warm, {"train.seed": "1"}, r"another recipe \(it differs in train.seed\)"),
        (warm, {"eval.limit": "9"}, r"another recipe \(it differs in eval.limit\)"),
        (warm.replace("/earlier", "/none"), {}, "none: not a search"),
    ):
        with pytest.raises(UserError, match=message):
            _ = search_at(tmp_path, text, **changes).earlier


def test_more_trials_or_more_time_make_a_finished_search_go_on(tmp_path):
    search = search_at(tmp_path)
    search.open()
    a_story(search)
    assert search.is_over()
    assert not search_at(tmp_path, TEXT.replace("trials: 6", "trials: 7")).is_over()
    events = [json.loads(line) for line in (tmp_path / "s/trials.jsonl").read_text().splitlines()][:-3]
    late = "".join(json.dumps(event | {"time_s": 100.0}) + "\n" for event in events)
    (tmp_path / "s/trials.jsonl").write_text(late)
    assert not search_at(tmp_path).is_over()
    assert search_at(tmp_path, TEXT + "minutes: 1.5").is_over()
    assert not search_at(tmp_path, TEXT + "minutes: 2").is_over()


def test_the_line_of_a_trial_has_what_mlflow_shows(tmp_path):
    search = search_at(tmp_path)
    a_story(search)
    search.log_ends()
    search.log_ends()
    lines = search.run.metrics()
    assert [(line["step"], line["trial"]) for line in lines] == [(n + 1, n) for n in range(6)], "each once"
    told = {"clean_accuracy": 0.8, "robust_accuracy": 0.5, "score": 0.65, "best_score": 0.65, "num_pruned": 1}
    assert lines[1] == lines[1] | told
    assert lines[5]["clean_accuracy"] == 0.2, "its last report"
    children = search.mlflow_children()
    assert [child.status for child in children] == ["FINISHED"] * 4 + ["KILLED", "FAILED"]
    assert [child.tags["arat.best"] for child in children] == ["clean", "score", "", "robust", "", ""]
    assert children[3].run.folder.uri == str(tmp_path / "s/trials/0003")


def test_the_file_of_a_search_is_one_that_it_can_begin_with(tmp_path):
    search = search_at(tmp_path)
    search.open()
    found = Search.at(str(tmp_path / "s"))
    assert (found.config, found.base) == (search.config, search.base)
    assert parse(yaml.safe_dump(yaml.safe_load((tmp_path / "s/search.yaml").read_text()))) == search.config


def test_a_search_goes_on_with_the_pictures_that_it_began_with(tmp_path, sets):
    def over(train: str) -> Search:
        return search_at(tmp_path, **{"data.train": train, "data.val": sets.val})

    over(sets.train).open()
    over(sets.train).check()
    with pytest.raises(UserError, match=r"another one .it differs in data.train\)"):
        over(sets.val).check()
