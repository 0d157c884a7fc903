"""A search is a folder: what it varies, its trials, and what is taken home of them."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import yaml

from arat_dist.config import ClusterConfig, Recipe
from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError
from arat_dist.recipe import parse_recipe
from arat_dist.run import DATA, RECIPE, SEARCH, Run, essence
from arat_dist.search.config import SearchConfig, parse_search
from arat_dist.search.front import best, pareto_front
from arat_dist.search.ledger import FAILED, FINISHED, PRUNED, STATUSES, Accuracies, Ledger, Trial, shown_params
from arat_dist.search.proposals import grid, importance, propose
from arat_dist.storage import absolute_path
from arat_dist.tracking import Child, SearchReplica, tracking_uri

BASE = "base.yaml"
TRIALS = "trials"
"""Folder of the trials' runs."""
BEST = {"score": "best.yaml", "robust": "best_robust.yaml", "clean": "best_clean.yaml"}
"""Files of the recipes that are taken home."""

_FREE_KEYS = {"trials", "concurrency", "minutes"}
"""Of a search, what may differ between two launches."""
_FREE_SECTIONS = ("cluster", "track")
_MOST_COMBINATIONS = 100_000
_NUM_DRAWS = 100
"""Combinations that are checked before anything starts, beside the ends of every distribution."""
_ALIKE = ("eval.", "cluster.", "track.", "data.val", "train.epochs", "train.max_steps")


@dataclass(frozen=True)
class Search:
    """One search's folder under the storage URI.

    Attributes:
        config: what varies, and how.
        base: what every trial's recipe begins with: measured every epoch, and all in the same ball.
        home: the same as the user has it, for what is taken home.
        run: its folder, lock, metrics and summary, which are like a run's.
    """

    config: SearchConfig
    base: Recipe
    home: Recipe
    run: Run

    @classmethod
    def of(cls, config: SearchConfig, recipe: Recipe, name: str, *, source: str = "search") -> Search:
        """A search over a recipe.

        Args:
            config: the search.
            recipe: the resolved recipe.
            name: the search's.
            source: names the search file in messages.

        Raises:
            UserError: the recipe can't be searched over, or takes a value that may be drawn not.
        """
        home = _measurable(recipe, config, source)
        tree = home.model_dump(mode="json")
        tree["eval"]["every"] = 1
        search = cls(config, parse_recipe(tree), home, Run(recipe.cluster.storage, name))
        if config.grace_epochs > home.train.epochs:
            raise UserError(
                f"{source}: grace_epochs: {config.grace_epochs}: at most train.epochs ({home.train.epochs})"
            )
        if config.searcher == "grid" and search.num_trials > _MOST_COMBINATIONS:
            raise UserError(f"{source}: space: more than {_MOST_COMBINATIONS:,} combinations; trials would limit them")
        _check_space(search, source)
        return search

    @classmethod
    def find(cls, uri: str) -> Search | None:
        """The search in a folder, or that of a name in the default storage, if there is one (UserError: damaged)."""
        parent, slash, name = uri.rstrip("/").rpartition("/")
        for storage in [parent or "/"] if slash else [".", ClusterConfig().storage]:
            run = Run(storage, name)
            if run.folder.exists(SEARCH):
                config = parse_search(yaml.safe_load(run.folder.read(SEARCH)), source=run.folder.path(SEARCH))
                base = parse_recipe(yaml.safe_load(run.folder.read(BASE)), source=run.folder.path(BASE))
                return cls(config, base, base, run)
        return None

    @classmethod
    def at(cls, uri: str) -> Search:
        """As `find`, but there has to be one (UserError)."""
        if (search := cls.find(uri)) is None:
            raise UserError(f"{uri}: not a search (no {SEARCH} in it)")
        return search

    @cached_property
    def ledger(self) -> Ledger:
        """Its trials; read once, so by who changes them inside `run.locked`."""
        return Ledger(self.run.folder)

    @cached_property
    def earlier(self) -> list[Trial]:
        """Ended trials of the searches that it starts warm from.

        Raises:
            UserError: one of them isn't comparable.
        """
        trials: list[Trial] = []
        for uri in self.config.warm_start:
            other = Search.at(uri)
            if other.config.space != self.config.space:
                raise UserError(f"warm_start: {uri}: searched another space; one of the same space would be right")
            differing = _differing(other.base, self.base) + self._differing_data(other)
            if differing:
                raise UserError(
                    f"warm_start: {uri}: its trials were of another recipe (it differs in {', '.join(differing)}); "
                    "one of the same recipe would be right"
                )
            trials += other.ledger.ended()
        return trials

    @cached_property
    def num_trials(self) -> int:
        """How many there are to be."""
        if self.config.searcher != "grid":
            return self.config.trials or 0
        return sum(1 for _ in islice(grid(self.config), self.config.trials or _MOST_COMBINATIONS + 1))

    @cached_property
    def data(self) -> dict[str, str]:
        """SHA-256 of both sets, as far as they are at hand."""
        found = {}
        for key, path in (("train_sha256", self.base.data.train), ("val_sha256", self.base.data.val)):
            with suppress(UserError):
                found[key] = load_manifest(path).sha256
        return found

    def check(self) -> None:
        """Refuse a name that is another search's or a run's (UserError)."""
        folder, name = self.run.folder, self.run.name
        if folder.exists(RECIPE):
            raise UserError(f"--name: {name}: a run has this name; another name would be right")
        if not folder.exists(SEARCH):
            return
        before = Search.at(folder.uri)
        old, new = (each.config.model_dump(mode="json", exclude=_FREE_KEYS) for each in (before, self))
        differing = sorted(key for key in new if old[key] != new[key])
        if differing := differing + _differing(before.base, self.base) + self._differing_data(before):
            raise UserError(
                f"--name: {name}: the search of this name is another one (it differs in {', '.join(differing)}); "
                "another name, or those settings, would be right"
            )

    def open(self) -> None:
        """Begin it, or go on with it (UserError: its folder can't be written)."""
        folder = self.run.folder
        try:
            self.ledger.mend()
            self.run.forget_metrics_after(sys.maxsize)
            folder.write_json(DATA, self.data)
            folder.write(SEARCH, yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False).encode())
            folder.write(BASE, self.base.to_yaml().encode())
        except OSError as error:
            raise UserError(f"cluster.storage: {self.run.storage.uri}: {error.strerror or error}") from error

    def _differing_data(self, other: Search) -> list[str]:
        """Which sets aren't those that another search of before was over."""
        before = other.run.folder.read_json(DATA)
        both = {"train_sha256": "data.train", "val_sha256": "data.val"}
        return [name for key, name in both.items() if before.get(key, self.data.get(key)) != self.data.get(key)]

    def is_over(self) -> bool:
        """Whether no trial is at work, and none is to come: by their number, the grid, or the time."""
        if self.ledger.running():
            return False
        return self.time_is_over() or self._next_params() is None

    def time_is_over(self) -> bool:
        """Whether the search has used the time that it has."""
        return self.config.minutes is not None and self.ledger.seconds() >= 60 * self.config.minutes

    def next_trial(self) -> Trial | None:
        """Propose a trial and note it in the ledger; None where there are no more."""
        params = self._next_params()
        return None if params is None else self.ledger.propose(params)

    def recipe_of(self, trial: Trial) -> Recipe:
        """A trial's recipe; UserError where its values don't go together, which none of those drawn before showed."""
        storage = absolute_path((self.run.folder / TRIALS).uri)
        recipe = _with_params(self.base, trial.params, f"trial {trial.number}")
        # All of a search are in one place of MLflow, whose default is beside the runs.
        track = recipe.track.model_copy(update={"uri": tracking_uri(self.base, self.run)})
        cluster = recipe.cluster.model_copy(update={"storage": storage})
        return recipe.model_copy(update={"cluster": cluster, "track": track})

    def run_of(self, trial: Trial) -> Run:
        """A trial's run."""
        return Run((self.run.folder / TRIALS).uri, trial.name)

    def replica(self) -> SearchReplica | None:
        """What keeps MLflow's run of the search; None where none is wanted (UserError: nowhere to put the default)."""
        uri = tracking_uri(self.base, self.run)
        if uri is None:
            return None
        settings = self.config.model_dump(mode="json")
        return SearchReplica(self.run, self.base, uri, settings, self.mlflow_children)

    def mlflow_children(self) -> list[Child]:
        """What MLflow is told of the trials' own runs."""
        best_by: dict[int, list[str]] = {}
        for which, trial in best(self.config, pareto_front(self.ledger.trials)).items():
            best_by.setdefault(trial.number, []).append(which)
        children = []
        for trial in list(self.ledger.trials):
            tags = {"arat.trial": str(trial.number), "arat.trial_status": trial.status or "running"}
            tags["arat.best"] = ", ".join(best_by.get(trial.number, ()))
            status = {FINISHED: "FINISHED", PRUNED: "KILLED", FAILED: "FAILED"}.get(trial.status)
            params = {key: str(value) for key, value in trial.params.items()}
            children.append(Child(self.run_of(trial), params, tags, status))
        return children

    def log_ends(self) -> None:
        """Add a line to metrics.jsonl about each trial that has ended since: what MLflow shows of the whole search."""
        told = {line["trial"] for line in self.run.metrics()}
        for trial in self.ledger.ended():
            if trial.number not in told:
                told.add(trial.number)
                self.run.log(self._line(trial, len(told)))

    def _line(self, trial: Trial, step: int) -> dict[str, Any]:
        line: dict[str, Any] = {"step": step, "time_s": round(self.ledger.seconds(), 2), "trial": trial.number}
        line |= {f"num_{status}": self.ledger.num(status) for status in STATUSES}
        if trial.last is not None:
            line |= _figures(trial.last, self.config)
        finished = [each.result for each in self.ledger.ended() if each.result]
        if finished:
            line["best_score"] = max(self.config.score(each.clean, each.robust) for each in finished)
        return line

    def take_home(self) -> dict[str, Any]:
        """Write the best trials' recipes; returns the summary, without the time and what MLflow has.

        Its accuracies are those of the best trial by score.
        """
        trials = self.ledger.trials
        front = pareto_front(trials)
        chosen = best(self.config, front)
        for which, trial in chosen.items():
            self.run.folder.write(BEST[which], self._home_recipe(which, trial).encode())
        folder = self.run.folder
        return {
            "name": self.run.name,
            "trials": {status: self.ledger.num(status) for status in STATUSES},
            "pareto": [
                {
                    "trial": trial.number,
                    **_figures(trial.result, self.config),
                    "overrides": trial.params,
                    "run": self.run_of(trial).folder.uri,
                }
                for trial in front
                if trial.result
            ],
            **(_figures(chosen["score"].result, self.config) if chosen and chosen["score"].result else {}),
            "best": {which: trial.number for which, trial in chosen.items()},
            "best_recipe": folder.path(BEST["score"]) if chosen else None,
            "robust_weight": self.config.robust_weight,
            "importance": importance(self.config, trials),
        }

    def _home_recipe(self, which: str, trial: Trial) -> str:
        """A trial's recipe as a file for `arat train`."""
        assert trial.result is not None
        measure = {
            "score": f"{self.config.robust_weight:g} x robust + {1 - self.config.robust_weight:g} x clean accuracy"
        }
        attack = self.base.eval.attack
        return (
            f"# Trial {trial.number} of the search {self.run.name}, its best by "
            f"{measure.get(which, f'{which} accuracy')}: clean {trial.result.clean:.4f}, "
            f"{attack} {trial.result.robust:.4f}.\n" + _with_params(self.home, trial.params, "best").to_yaml()
        )

    def _next_params(self) -> dict[str, Any] | None:
        number = len(self.ledger.trials)
        if number >= self.num_trials:
            return None
        return propose(self.config, [*self.earlier, *self.ledger.trials], number)


def _figures(accuracies: Accuracies, config: SearchConfig) -> dict[str, float]:
    """Two accuracies and their score, by name."""
    return accuracies.named() | {"score": config.score(accuracies.clean, accuracies.robust)}


def _measurable(recipe: Recipe, config: SearchConfig, source: str) -> Recipe:
    """The recipe in the trials' length, with the ball of its evaluations said outright: attack.eps may vary."""
    tree = recipe.model_dump(mode="json")
    evaluation = tree["eval"]
    for key in ("attack", "every_attack"):
        if evaluation[key] == "none":
            raise UserError(f"eval.{key}: none: a search compares robust accuracies; pgd10 would be right")
    evaluation["norm"] = evaluation["norm"] or tree["attack"]["norm"]
    evaluation["eps"] = evaluation["eps"] or tree["attack"]["eps"]
    if config.epochs is not None:
        tree["train"]["epochs"] = config.epochs
    return parse_recipe(tree, source=f"{source}: epochs" if config.epochs else "recipe")


def _with_params(base: Recipe, params: dict[str, Any], source: str) -> Recipe:
    try:
        return parse_recipe(base.model_dump(mode="json"), list(params.items()), source=source, quiet=True)
    except UserError as error:  # about the key as it would stand on the command line
        raise UserError(
            f"{source}: {str(error).removeprefix('--')}" if str(error).startswith("--") else error
        ) from error


def _check_space(search: Search, source: str) -> None:
    """Refuse a space that the recipe's schema doesn't take (UserError)."""
    space = search.config.space
    for key, distribution in space.items():
        if "." not in key:
            raise UserError(f"{source}: space.{key}: a recipe key has a section, as in optim.lr")
        if key.startswith(_ALIKE):
            raise UserError(
                f"{source}: space.{key}: all trials are of one length and measured alike; a key of data, model, "
                "objective, attack, optim or train would be right"
            )
        for value in distribution.extremes():
            _with_params(search.base, {**_needed_for(key, search.config), key: value}, f"{source}: space")
    random = (
        search.config.model_copy(update={"searcher": "random"}) if search.config.searcher != "grid" else search.config
    )
    for number in range(_NUM_DRAWS):
        params = propose(random, (), number)
        if params is None:
            return
        _with_params(search.base, params, f"{source}: space: {shown_params(params)}")


def _needed_for(key: str, config: SearchConfig) -> dict[str, Any]:
    """Values of other keys with which a key is drawn."""
    needed: dict[str, Any] = {}
    for other, values in config.space[key].when.items():
        needed |= {**_needed_for(other, config), other: values[0]}
    return needed


def _differing(one: Recipe, other: Recipe) -> list[str]:
    """Dotted keys in which the trials of two searches differ."""
    first, second = (
        {**essence(recipe, free_sections=_FREE_SECTIONS), "train.max_steps": recipe.train.max_steps}
        for recipe in (one, other)
    )
    return sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
