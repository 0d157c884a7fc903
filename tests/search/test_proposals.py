"""What is proposed: in its range, the same after a resumption, better than chance where it learns."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arat_dist.search.config import SearchConfig, parse_search
from arat_dist.search.front import best, pareto_front
from arat_dist.search.ledger import FAILED, FINISHED, PRUNED, Accuracies, Trial
from arat_dist.search.proposals import importance, propose

SPACE = {
    "a.log": {"type": "loguniform", "low": 0.01, "high": 100},
    "a.number": {"type": "uniform", "low": -1, "high": 1},
    "a.stepped": {"type": "uniform", "low": 0.1, "high": 0.75, "step": 0.2},
    "a.whole": {"type": "int", "low": 1, "high": 8, "step": 3},
    "a.choice": {"type": "choice", "values": ["4/255", 8, [1, 2], None, True]},
}


def config_of(searcher: str = "random", **changes) -> SearchConfig:
    return parse_search({"space": SPACE, "trials": 100, "searcher": searcher, **changes})


@pytest.mark.parametrize("searcher", ["random", "tpe", "motpe"])
def test_every_value_is_in_its_range(searcher):
    config = config_of(searcher)
    trials: list[Trial] = []
    for number in range(40):
        params = propose(config, trials, number)
        assert params is not None
        assert 0.01 <= params["a.log"] <= 100
        assert -1 <= params["a.number"] <= 1
        assert round(params["a.stepped"], 9) in (0.1, 0.3, 0.5, 0.7)
        assert params["a.whole"] in (1, 4, 7)
        assert params["a.choice"] in ("4/255", 8, [1, 2], None, True)
        trials.append(Trial(number, params, status=FINISHED, result=Accuracies(0.5, abs(params["a.number"]))))


@pytest.mark.parametrize("searcher", ["random", "tpe", "motpe", "grid"])
@pytest.mark.parametrize(
    ("low", "high", "step"), [("4/255", "12/255", "4/255"), (0, "8/255", "2/255"), (0.1, 0.75, 0.2)]
)
def test_steps_that_are_no_decimal_number_reach_their_end(searcher, low, high, step, recwarn):
    space = {"a.b": {"type": "uniform", "low": low, "high": high, "step": step}}
    config = parse_search({"space": space, "trials": 60, "searcher": searcher})
    values = config.space["a.b"].grid()
    assert values is not None
    trials: list[Trial] = []
    while (params := propose(config, trials, len(trials))) and len(trials) < 60:
        trials.append(Trial(len(trials), params, status=FINISHED, result=Accuracies(0.5, params["a.b"])))
    assert {trial.params["a.b"] for trial in trials} == set(values)
    importance(config, trials * 3)
    assert not recwarn.list


def test_what_can_not_be_explained_ends_no_search():
    """All that is common to the trials is equal, their scores are not."""
    config = parse_search({"space": {"a.choice": {"type": "choice", "values": [1, 2]}}, "trials": 9})
    trials = [Trial(n, {"a.choice": 1}, status=FINISHED, result=Accuracies(0.5, n / 10)) for n in range(9)]
    assert importance(config, trials) == {}


def test_random_values_are_spread_evenly():
    drawn = [propose(config_of(), (), number) or {} for number in range(600)]
    logs = np.histogram([math.log10(params["a.log"]) for params in drawn], bins=4, range=(-2, 2))[0]
    assert (abs(logs - 150) < 5 * math.sqrt(150 * 0.75)).all()
    for key, count in (("a.whole", 3), ("a.choice", 5), ("a.stepped", 4)):
        counts = Counter(str(params[key]) for params in drawn)
        assert len(counts) == count
        assert all(abs(each - 600 / count) < 5 * math.sqrt(600 / count) for each in counts.values())


@pytest.mark.parametrize("searcher", ["random", "tpe", "motpe"])
def test_a_proposal_is_a_function_of_seed_number_and_trials(searcher):
    good, better = Accuracies(0.6, 0.2), Accuracies(0.3, 0.5)
    ends = [(FINISHED, good), (PRUNED, None), (FAILED, None), ("", None), (FINISHED, better)]
    trials = [
        Trial(n, propose(config_of(), (), n) or {}, {1: Accuracies(0.4, 0.01 * n)}, *end)
        for n, end in enumerate(ends * 4)
    ]
    config = config_of(searcher)
    assert propose(config, trials, 20) == propose(config, trials, 20)
    assert propose(config, trials, 20) != propose(config, trials, 21)
    assert propose(config, trials, 20) != propose(config_of(searcher, seed=1), trials, 20)


@pytest.mark.parametrize("searcher", ["tpe", "motpe"])
def test_who_learns_comes_closer_than_chance(searcher):
    """The score is best at a.number 0.5; medians of the last proposals of searches of 40 trials."""

    def distance(name: str, seed: int) -> float:
        config = config_of(name, seed=seed)
        trials: list[Trial] = []
        for number in range(40):
            params = propose(config, trials, number) or {}
            accuracy = 1 - abs(params["a.number"] - 0.5) / 2
            trials.append(Trial(number, params, status=FINISHED, result=Accuracies(accuracy, accuracy)))
        return float(np.median([abs(trial.params["a.number"] - 0.5) for trial in trials[-15:]]))

    learned, chance = (np.mean([distance(name, seed) for seed in range(2)]) for name in (searcher, "random"))
    assert learned < 0.6 * chance


def test_what_explains_the_score_is_said_to():
    config = config_of()
    trials = []
    for number in range(40):
        params = propose(config, (), number) or {}
        value = (params["a.number"] + 1) / 2
        trials.append(Trial(number, params, status=FINISHED, result=Accuracies(value, value)))
    shares = importance(config, trials)
    assert next(iter(shares)) == "a.number"
    assert shares["a.number"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(config, trials[:7]) == {}, "too few"
    for trial in trials:
        trial.result = Accuracies(0.5, 0.5)
    assert importance(config, trials) == {}, "all alike"


def test_the_front_of_a_search_for_both_accuracies_is_the_one_that_optuna_finds():
    """What a proposal comes to trades clean for robust accuracy, so that the front has several trials."""
    import optuna

    config = config_of("motpe")
    trials: list[Trial] = []
    study = optuna.create_study(directions=["maximize", "maximize"])
    for number in range(40):
        params = propose(config, trials, number) or {}
        share, waste = (params["a.number"] + 1) / 2, abs(math.log10(params["a.log"])) / 4
        result = Accuracies(round(share * (1 - waste), 2), round((1 - share) * (1 - waste), 2))
        trials.append(Trial(number, params, status=FINISHED, result=result))
        study.add_trial(optuna.trial.create_trial(values=[result.clean, result.robust]))
    front = pareto_front(trials)
    found = {(trial.result.clean, trial.result.robust) for trial in front if trial.result}
    assert found == {tuple(trial.values) for trial in study.best_trials}
    assert len(front) == len(found) > 3


accuracy = st.integers(0, 6).map(lambda n: n / 6)


@given(st.lists(st.tuples(accuracy, accuracy), max_size=20), st.floats(0, 1))
def test_the_front_is_what_nothing_dominates(pairs, weight):
    trials = [Trial(n, {}, status=FINISHED, result=Accuracies(*pair)) for n, pair in enumerate(pairs)]
    trials.append(Trial(len(trials), {}, {1: Accuracies(1, 1)}, status=PRUNED))
    front = pareto_front(trials)

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    expected = {pair for pair in pairs if not any(dominates(other, pair) for other in pairs)}
    on_it = [pairs[trial.number] for trial in front]
    assert set(on_it) == expected
    assert len(on_it) == len(expected), "of equal ones, one"
    config = config_of(robust_weight=weight)
    chosen = best(config, front)
    if pairs:
        assert pairs[chosen["robust"].number][1] == max(robust for _, robust in pairs)
        assert pairs[chosen["clean"].number][0] == max(clean for clean, _ in pairs)
        assert config.score(*pairs[chosen["score"].number]) == pytest.approx(max(config.score(*pair) for pair in pairs))
    else:
        assert chosen == {}
