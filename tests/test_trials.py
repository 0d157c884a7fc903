"""What Tune is given, without a cluster: rules that go on as if never interrupted, and who is proposed."""

import json
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from toys import toy_recipe

from arat_dist.search.config import parse_search
from arat_dist.search.ledger import Accuracies
from arat_dist.search.search import Search
from launcher.trials import Proposer, Pruner, Scribe

EPOCHS = 8
SPACE = {"objective.gamma": {"type": "loguniform", "low": 1, "high": 100}}
"""Its logarithm, with some noise, is the score that a trial comes to."""


class Silent:
    """Takes the place of the progress bar."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Trial(SimpleNamespace):
    """Tune's, as far as it is looked at; hashable, as Tune's is."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


def search_in(storage, sets, **settings: Any) -> Search:
    tree = {"space": SPACE, "trials": 14, "epochs": EPOCHS} | settings
    recipe = toy_recipe(sets, cluster={"storage": str(storage)})
    return Search.of(parse_search(tree), recipe, "s")


def accuracies_of(params: dict[str, Any], epoch: int) -> Accuracies:
    noise = random.Random(f"{params} {epoch}").uniform(-0.1, 0.1)
    share = (params["objective.gamma"] / 100) ** 0.5 * (1 - 0.6**epoch)
    return Accuracies(0.5, min(1, max(0, share + noise)))


class Tune:
    """Does what Tune's controller does with the parts it is given, one trial at a time, until it is killed."""

    def __init__(self, search: Search):
        stop = threading.Event()
        self.search, self.scribe = search, Scribe(search, Silent(), stop)  # pyright: ignore[reportArgumentType]
        self.pruner = Pruner(search)
        self.proposer = Proposer(search, self.scribe, 1, {}, stop)

    def run(self, killed_after: int | None = None) -> None:
        """Until there are no more trials, or so many reports have come."""
        left = killed_after
        while (config := self.proposer.suggest(f"tune{len(self.search.ledger.trials)}")) != "FINISHED":
            params = self.search.ledger.trials[config["trial"]].params
            tuned = Trial(trial_id=f"new{config['trial']}", config=config)
            for epoch in range(1, EPOCHS + 1):
                if left == 0:
                    return
                result = {"epoch": epoch, **accuracies_of(params, epoch).named(), "done": epoch == EPOCHS}
                if epoch == EPOCHS:
                    result["status"] = "finished"
                elif self.pruner.on_trial_result(None, tuned, result) == "STOP":
                    result["done"] = True
                if left is not None and epoch not in self.search.ledger.trials[config["trial"]].reports:
                    left -= 1
                self.scribe.on_trial_result(0, [], tuned, result)
                if result["done"]:
                    self.pruner.on_trial_complete(None, tuned, result)
                    self.proposer.on_trial_complete(f"tune{config['trial']}", result)
                    self.proposer._at_work.clear()
                    break


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_killed_after_any_report_it_ends_as_if_it_had_not_been(tmp_path, sets, scheduler, searcher):
    settings = {"scheduler": scheduler, "searcher": searcher}
    calm = search_in(tmp_path / "calm", sets, **settings)
    Tune(calm).run()
    pruned = calm.ledger.num("pruned")
    assert calm.ledger.num("finished") + pruned == 14
    assert (pruned >= 14 / 3) == (scheduler != "none")
    num_reports = sum(len(trial.reports) for trial in calm.ledger.trials)
    for killed_after in range(0, num_reports, 5):
        storage = tmp_path / f"killed{killed_after}"
        Tune(search_in(storage, sets, **settings)).run(killed_after)
        again = search_in(storage, sets, **settings)
        Tune(again).run()
        assert again.ledger.trials == calm.ledger.trials


def test_a_trial_that_tells_again_what_it_told_before_counts_once(tmp_path, sets):
    """Its process died, and the next one reads its metrics from the beginning."""
    search = search_in(tmp_path, sets, scheduler="median")
    tune = Tune(search)
    config = tune.proposer.suggest("a")
    tuned = Trial(trial_id="a", config=config)
    for _ in range(2):
        for epoch in (1, 2):
            result = {"epoch": epoch, "clean_accuracy": 0.5, "robust_accuracy": 0.25, "done": False}
            assert tune.pruner.on_trial_result(None, tuned, result) == "CONTINUE"
            tune.scribe.on_trial_result(0, [], tuned, result)
    lines = [json.loads(line) for line in (tmp_path / "s/trials.jsonl").read_text().splitlines()]
    assert [line.get("epoch") for line in lines] == [None, 1, 2]
    (told,) = tune.pruner._rule._results.values()  # pyright: ignore[reportAttributeAccessIssue]
    assert [each["epoch"] for each in told] == [1, 2]


def test_the_median_rule_sees_trials_that_ran_side_by_side_in_the_order_of_their_reports(tmp_path, sets):
    """Seen one by one, those that came to an end would have had the last one pruned before its time."""
    search = search_in(tmp_path, sets, scheduler="median")
    for _ in range(4):
        search.next_trial()
    for epoch in (1, 2):
        for number in (3, 0, 1, 2):
            share = 0.01 if number == 3 else 0.5
            search.ledger.report(
                number, epoch, Accuracies(share, share), pruned="" if epoch == 1 or number < 3 else "x"
            )
    search.ledger.end(0, "finished", Accuracies(0.5, 0.5))
    search.ledger.end(1, "failed", None, "it did")
    pruner = Pruner(search_in(tmp_path, sets, scheduler="median"))
    told = {seen.trial_id: [each["epoch"] for each in results] for seen, results in pruner._rule._results.items()}  # pyright: ignore[reportAttributeAccessIssue]
    assert told == {"0003": [1, 2, 2], "0000": [1, 2, EPOCHS], "0001": [1, 2], "0002": [1, 2]}


def test_no_more_trials_than_may_be_at_work_are_proposed(tmp_path, sets):
    search = search_in(tmp_path, sets)
    stop = threading.Event()
    scribe = Scribe(search, Silent(), stop)  # pyright: ignore[reportArgumentType]
    proposer = Proposer(search, scribe, 2, {"group": "g"}, stop)
    first, second = proposer.suggest("a"), proposer.suggest("b")
    assert (first["trial"], second["trial"], proposer.suggest("c")) == (0, 1, None)
    proposer.on_trial_complete("a")
    assert proposer.suggest("c")["trial"] == 2
    stop.set()
    proposer.on_trial_complete("b")
    assert proposer.suggest("d") == "FINISHED"
    resumed = search_in(tmp_path, sets)
    proposer = Proposer(resumed, scribe, 9, {}, threading.Event())
    assert [proposer.suggest(name)["trial"] for name in "abcd"] == [0, 1, 2, 3], "those left first"


def test_a_trial_whose_values_do_not_go_together_fails_and_the_next_is_proposed(tmp_path, sets, monkeypatch):
    search = search_in(tmp_path, sets)
    from arat_dist.errors import UserError

    own = Search.recipe_of

    def recipe_of(self: Search, trial: Any) -> Any:
        if trial.number == 0:
            raise UserError("trial 0: no\ngood")
        return own(self, trial)

    monkeypatch.setattr(Search, "recipe_of", recipe_of)
    assert Tune(search).proposer.suggest("a")["trial"] == 1
    assert (search.ledger.trials[0].status, search.ledger.trials[0].reason) == ("failed", "trial 0: no good")
