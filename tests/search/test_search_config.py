"""Search files: what they may say, and what is refused, in one line each."""

import textwrap
from collections import Counter
from pathlib import Path

import pytest
import yaml

from arat_dist.errors import UserError
from arat_dist.recipe import load_recipe, recipe_names, search_names
from arat_dist.search.config import parse_search, read_search
from arat_dist.search.proposals import grid, propose
from arat_dist.search.search import Search

SPACE = "objective.gamma: {type: loguniform, low: 1, high: 100}"


def parse(text: str):
    return parse_search(yaml.safe_load(textwrap.dedent(text)), source="s.yaml")


def search_of(text: str, storage: Path | str = "/nowhere", recipe: str = "digits", **changes: str) -> Search:
    overrides = [("cluster.storage", str(storage)), *changes.items()]
    return Search.of(parse(text), load_recipe(recipe, overrides), "s", source="s.yaml")


def with_space(line: str, **more: object) -> str:
    return yaml.safe_dump({"space": yaml.safe_load(line), "trials": 4, **more})


@pytest.mark.parametrize("name", search_names())
def test_every_shipped_search_fits_the_recipe_of_its_own_command(name):
    from arat_dist.recipe import shipped_recipes

    file = shipped_recipes() / f"{name}.yaml"
    (command,) = (line for line in file.read_text().splitlines() if "arat tune" in line)
    _, _, _, recipe, _, same, *options = command.split()
    assert same == name
    overrides = [(key.removeprefix("--"), value) for key, value in zip(options[::2], options[1::2], strict=True)]
    search = Search.of(read_search(name), load_recipe(recipe, overrides), "s", source=name)
    assert search.num_trials > 1
    assert name not in recipe_names()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "objective.gama: {type: int, low: 1, high: 2}",
            "objective.gama: unknown key of arat; did you mean objective.g",
        ),
        ("objectve.gamma: {type: int, low: 1, high: 2}", "objectve: unknown key"),
        ("objective.gamma: {type: uniform, low: -1, high: 2}", "objective.gamma: -1.0: input should be greater"),
        ("optim.momentum: {type: uniform, low: 0, high: 1}", "optim.momentum: 1.0: input should be less than 1"),
        ("objective.distance: {type: choice, values: [cosine, l2]}", "objective.distance: 'l2': input should be"),
        ("attack.steps: {type: uniform, low: 1, high: 3}", "attack.steps: "),
        (
            "attack.eps: {type: choice, values: [4/255, 8/255]}\n"
            "attack.step_size: {type: choice, values: [1/255, 12/255]}",
            "attack.step_size: 0.0470588: at most twice attack.eps (0.0313725) has a use",
        ),
        ("eval.eps: {type: uniform, low: 0.1, high: 0.2}", "space.eval.eps: all trials are of one length and"),
        ("gamma: {type: int, low: 1, high: 3}", "space.gamma: a recipe key has a section, as in optim.lr"),
        ("objective.gamma.x: {type: int, low: 1, high: 3}", "objective.gamma.x: gamma is not a section"),
        ("train.epochs: {type: int, low: 1, high: 3}", "space.train.epochs: all trials are of one length"),
        ("cluster.workers: {type: int, low: 1, high: 3}", "space.cluster.workers: all trials"),
    ],
)
def test_a_space_that_the_recipe_does_not_take_is_refused(line, message):
    with pytest.raises(UserError) as error:
        search_of(with_space(line))
    assert str(error.value).startswith("s.yaml: space")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trials: 3", "space: missing"),
        (f"space: {{{SPACE}}}", "trials: missing"),
        ("space: {}\ntrials: 3", "space: {}: dictionary should have at least 1 item after validation, not 0"),
        (f"space: {{{SPACE}}}\ntrials: 0", "trials: 0: input should be greater than or equal to 1"),
        (f"space: {{{SPACE}}}\ntrails: 3", "trails: unknown key; one of space, trials, concurrency"),
        (
            f"space: {{{SPACE}}}\ntrials: 3\nscheduler: pbt",
            "scheduler: 'pbt': input should be 'asha', 'median' or 'none'",
        ),
        ("space: {optim.lr: {low: 1, high: 2}}\ntrials: 3", "space.optim.lr.type: one of choice, uniform"),
        ("space: {optim.lr: {type: normal}}\ntrials: 3", "space.optim.lr.type: one of choice, uniform"),
        ("space: {optim.lr: {type: uniform, low: 1}}\ntrials: 3", "space.optim.lr.high: missing"),
        (
            "space: {optim.lr: {type: uniform, low: 2, high: 1}}\ntrials: 3",
            "space.optim.lr: low 2, high 1: the smaller",
        ),
        ("space: {optim.lr: {type: loguniform, low: 0, high: 1}}\ntrials: 3", "space.optim.lr.low: 0: input should be"),
        (
            "space: {optim.lr: {type: int, low: 1, high: 3, q: 2}}\ntrials: 3",
            "q: unknown key; one of when, low, high, type, step",
        ),
        ("space: {optim.lr: {type: choice, values: []}}\ntrials: 3", "space.optim.lr.values: []: "),
        (f"space: {{{SPACE}}}\nsearcher: grid", "space.objective.gamma: loguniform: searcher grid goes with"),
        (f"space: {{{SPACE}}}\ntrials: 3\nwarm_start: [a]", "warm_start: goes with searcher tpe or motpe, here random"),
        (
            "space: {optim.name: {type: choice, values: [sgd]}, "
            "optim.lr: {type: int, low: 1, high: 2, when: {optim.name: []}}}\ntrials: 3",
            "space.optim.lr.when.optim.name: []: ",
        ),
        (
            "space: {optim.weight_decay: {type: choice, values: [1e-5, 0.1]}, "
            "optim.lr: {type: int, low: 1, high: 2, when: {optim.weight_decay: 0.00001}}}\ntrials: 3",
            "space.optim.lr.when: optim.weight_decay: 1e-05: one of 1e-5, 0.1 would be right",
        ),
        (
            "space: {optim.lr: {type: uniform, low: 0, high: 1, step: 0.0005}}\ntrials: 3",
            "space.optim.lr: step 0.0005: more than 1000 values; a larger one would be right",
        ),
        (
            "space: {optim.lr: {type: int, low: 1, high: 1000000000}}\nsearcher: grid",
            "space.optim.lr: int: searcher grid goes with choice, int, and uniform with a step",
        ),
        (
            "space: {optim.lr: {type: int, low: 1, high: 2, when: {optim.name: sgd}}}\ntrials: 3",
            "space.optim.lr.when: optim.name: a key of the space that stands before optim.lr",
        ),
    ],
)
def test_a_search_that_is_none_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value).startswith("s.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_names_those_that_ship():
    with pytest.raises(UserError, match=r"--search: nowhere: no such file; .*search/arat_gamma_eps"):
        read_search("nowhere")


@pytest.mark.parametrize(("key", "attack"), [("eval.attack", "none"), ("eval.every_attack", "none")])
def test_a_search_without_an_attack_compares_nothing(key, attack):
    with pytest.raises(UserError, match=f"{key}: none: a search compares robust accuracies"):
        search_of(with_space(SPACE), **{key: attack})


def test_what_no_recipe_alone_can_tell_is_refused():
    with pytest.raises(UserError, match=r"s.yaml: grace_epochs: 9: at most train.epochs \(3\)"):
        search_of(with_space(SPACE, epochs=3, grace_epochs=9))
    space = "\n".join(f"{key}: {{type: int, low: 1, high: 900}}" for key in ("objective.gamma", "attack.steps"))
    with pytest.raises(UserError, match=r"s.yaml: space: more than 100,000 combinations; trials would limit them"):
        search_of(yaml.safe_dump({"space": yaml.safe_load(space), "searcher": "grid"}))


def test_trials_are_measured_in_one_ball_whatever_they_train_against():
    search = search_of(with_space("attack.eps: {type: choice, values: [8/255, 16/255]}", epochs=3))
    trial_recipes = [
        search.recipe_of(trial) for trial in (_trial({"attack.eps": "8/255"}), _trial({"attack.eps": "16/255"}))
    ]
    assert [recipe.attack.eps for recipe in trial_recipes] == [8 / 255, 16 / 255]
    for recipe in trial_recipes:
        assert (recipe.eval.norm, recipe.eval.eps, recipe.eval.every) == ("linf", pytest.approx(24 / 255), 1)
        assert recipe.train.epochs == 3
        assert recipe.cluster.storage == "/nowhere/s/trials"
        assert recipe.track.uri == "sqlite:////nowhere/mlflow.db"


def _trial(params):
    from arat_dist.search.ledger import Trial

    return Trial(0, params)


def test_another_method_takes_none_of_the_keys_of_the_recipes_own():
    text = """
    space:
      objective.name: {type: choice, values: [arat, trades]}
      objective.gamma: {type: loguniform, low: 1, high: 100, when: {objective.name: arat}}
      objective.beta: {type: uniform, low: 1, high: 8, when: {objective.name: [trades]}}
    trials: 8
    """
    search = search_of(text)
    drawn = [propose(search.config, (), number) for number in range(40)]
    for params in drawn:
        assert params is not None
        recipe = search.recipe_of(_trial(params))
        if params["objective.name"] == "arat":
            assert set(params) == {"objective.name", "objective.gamma"}
        else:
            assert set(params) == {"objective.name", "objective.beta"}
            assert recipe.objective.model_dump()["beta"] == params["objective.beta"]
    assert len(Counter(params["objective.name"] for params in drawn if params)) == 2


def test_a_grid_is_every_combination_and_no_key_multiplies_what_does_not_use_it():
    text = """
    space:
      objective.name: {type: choice, values: [arat, at]}
      objective.gamma: {type: int, low: 10, high: 30, step: 10, when: {objective.name: arat}}
      optim.lr: {type: uniform, low: 0.1, high: 0.2, step: 0.05}
    searcher: grid
    """
    search = search_of(text)
    expected = [
        *(
            {"objective.name": "arat", "objective.gamma": g, "optim.lr": lr}
            for g in (10, 20, 30)
            for lr in (0.1, 0.15, 0.2)
        ),
        *({"objective.name": "at", "optim.lr": lr} for lr in (0.1, 0.15, 0.2)),
    ]
    assert list(grid(search.config)) == expected
    assert search.num_trials == 12
    assert [propose(search.config, (), number) for number in (0, 11, 12)] == [expected[0], expected[11], None]
    fewer = search_of(text + "trials: 5\n    ".replace("    ", ""))
    assert fewer.num_trials == 5
