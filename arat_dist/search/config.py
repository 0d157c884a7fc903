"""What a search may say: SEARCH.yaml, typed, with its unit under each field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from arat_dist.config import Count, Integer, Number, Positive, Section, Share
from arat_dist.errors import UserError
from arat_dist.recipe import read_mapping, search_names, shipped_or_own

MOST_VALUES = 1000
"""Of a key with a step: more is a mistake."""


def _listed(value: object) -> object:
    """Take `objective.name: arat` for `objective.name: [arat]`."""
    if not isinstance(value, dict):
        return value
    return {key: each if isinstance(each, list) else [each] for key, each in value.items()}


Values = Annotated[list[Any], Field(min_length=1)]


class Distribution(Section):
    """What the values of a key are drawn from."""

    when: Annotated[dict[str, Values], BeforeValidator(_listed)] = Field(default_factory=dict)
    """Drawn only where each of these keys, which stand before it, has one of these values; else the recipe's stays."""

    def is_drawn(self, drawn: dict[str, Any]) -> bool:
        """Whether it has a value, given those of the keys before it."""
        return all(key in drawn and drawn[key] in values for key, values in self.when.items())


class Choice(Distribution):
    """One of several values."""

    type: Literal["choice"]
    """The distribution."""
    values: Values
    """What to choose from, as a recipe would have it."""

    def grid(self) -> list[Any]:
        """Every value."""
        return list(self.values)

    def extremes(self) -> list[Any]:
        """Values that a recipe has to take for it to take all."""
        return list(self.values)


class _Range(Distribution):
    low: Any
    high: Any

    @model_validator(mode="after")
    def _ascends(self) -> _Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g}, high {self.high:g}: the smaller one first would be right")
        return self

    def extremes(self) -> list[Any]:
        """The ends of the range."""
        return [self.low, self.high]


class Uniform(_Range):
    """A number from a range."""

    type: Literal["uniform"]
    """The distribution."""
    low: Number
    """Least value."""
    high: Number
    """Largest value."""
    step: Positive | None = None
    """Distance of the values, counted from `low`; default: any number of the range."""

    @model_validator(mode="after")
    def _has_few_steps(self) -> Uniform:
        if self.step is not None and (self.high - self.low) / self.step >= MOST_VALUES:
            raise ValueError(f"step {self.step:g}: more than {MOST_VALUES} values; a larger one would be right")
        return self

    def grid(self) -> list[Any] | None:
        """Every value; None where there is no step."""
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-6) + 1
        decimals = max(0, 12 - math.floor(math.log10(max(abs(self.low), abs(self.high)))))
        return [round(self.low + number * self.step, decimals) for number in range(count)]


class LogUniform(_Range):
    """A positive number whose logarithm is drawn evenly."""

    type: Literal["loguniform"]
    """The distribution."""
    low: Positive
    """Least value."""
    high: Positive
    """Largest value."""

    def grid(self) -> list[Any] | None:
        """None: they can't be counted."""
        return None


class Int(_Range):
    """A whole number from a range, both ends included."""

    type: Literal["int"]
    """The distribution."""
    low: Integer
    """Least value."""
    high: Integer
    """Largest value."""
    step: Count = 1
    """Distance of the values, counted from `low`."""

    def grid(self) -> list[Any] | None:
        """Every value; None where they are too many."""
        values = range(self.low, self.high + 1, self.step)
        return list(values) if len(values) <= MOST_VALUES else None


AnyDistribution = Annotated[Choice | Uniform | LogUniform | Int, Field(discriminator="type")]


class SearchConfig(Section):
    """One search: what varies, how values are proposed, when a trial is given up."""

    space: Annotated[dict[str, AnyDistribution], Field(min_length=1)]
    """Distributions by dotted recipe key, such as `objective.gamma: {type: loguniform, low: 1, high: 100}`."""
    trials: Count | None = None
    """Number of trials, failed ones included; grid: every combination, unless fewer are said."""
    concurrency: Count | None = None
    """Trials that train at a time; default: as many as the cluster has room for."""
    epochs: Count | None = None
    """Length of a trial, in epochs; default: the recipe's."""
    minutes: Positive | None = None
    """Longest time of the whole search, in minutes; trials that are at work then are pruned. Default: no limit."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """When a trial is pruned. asha: at grace_epochs and its multiples by powers of reduction_factor, unless it is among
    the best 1/reduction_factor there; median: when its best score is below the median of the others' means; none."""
    grace_epochs: Count = 1
    """Epochs that every trial may train."""
    reduction_factor: Annotated[Integer, Field(ge=2)] = 2
    """For asha."""
    searcher: Literal["random", "grid", "tpe", "motpe"] = "random"
    """random; grid; tpe: Optuna's TPE on the score; motpe: on clean and robust accuracy as two objectives."""
    robust_weight: Share = 0.5
    """The score of a trial is robust_weight * robust + (1 - robust_weight) * clean accuracy: what the scheduler prunes
    by, tpe climbs, and best.yaml is chosen by."""
    seed: Annotated[Integer, Field(ge=0, lt=2**31)] = 0
    """Fixes the proposals; the trials' own seed is the recipe's."""
    warm_start: tuple[str, ...] = ()
    """Folders or names of earlier searches of the same space, from which tpe and motpe learn."""

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        if faults := list(self._faults()):
            raise ValueError(faults[0])
        return self

    def _faults(self) -> Iterator[str]:
        before: dict[str, Choice | Uniform | LogUniform | Int] = {}
        for key, distribution in self.space.items():
            yield from (f"space.{key}.when: {fault}" for fault in _condition_faults(key, distribution, before))
            before[key] = distribution
            if self.searcher == "grid" and not distribution.grid():
                yield f"space.{key}: {distribution.type}: searcher grid goes with choice, int, and uniform with a step"
        if self.searcher != "grid" and self.trials is None:
            yield "trials: missing"
        if self.warm_start and self.searcher not in ("tpe", "motpe"):
            yield f"warm_start: goes with searcher tpe or motpe, here {self.searcher}"

    def score(self, clean: float, robust: float) -> float:
        """The score of two accuracies, shares of 1."""
        return self.robust_weight * robust + (1 - self.robust_weight) * clean


def _condition_faults(
    key: str, distribution: Distribution, before: dict[str, Choice | Uniform | LogUniform | Int]
) -> Iterator[str]:
    """What is wrong with the keys and values on which one depends, given those that stand before it."""
    for other, values in distribution.when.items():
        if other not in before:
            yield f"{other}: a key of the space that stands before {key} would be right"
            return
        known = before[other].grid()
        if known is None or any(value not in known for value in values):
            shown = "a choice or an int" if known is None else ", ".join(map(str, known))
            yield f"{other}: {', '.join(map(str, values))}: {'' if known is None else 'one of '}{shown} would be right"


def read_search(path: str | Path) -> SearchConfig:
    """Read a search file: a path, or the name of one that ships with the package, such as search/arat_gamma_eps.

    Raises:
        UserError: one line that names the file, the key and what would be right.
    """
    if (file := shipped_or_own(path)) is None:
        raise UserError(
            f"--search: {path}: no such file; a YAML file or one of {', '.join(search_names())} would be right"
        )
    return parse_search(read_mapping(file, "search"), source=str(file))


def parse_search(tree: dict[str, Any], *, source: str = "search") -> SearchConfig:
    """Check a search given as nested mappings (UserError: one line that begins with `source`)."""
    try:
        return SearchConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_error(error.errors())}") from error


def _first_error(errors: list[ErrorDetails]) -> str:
    first = errors[0]
    # The type of a distribution stands in the path behind its key.
    parts = [str(part) for at, part in enumerate(first["loc"]) if not (at == 2 and first["loc"][0] == "space")]
    key = ".".join(parts)
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    match first["type"]:
        case "missing":
            return f"{key}: missing"
        case "extra_forbidden":
            return f"{key}: unknown key; one of {', '.join(_known(first))} would be right"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}.type: one of choice, uniform, loguniform, int would be right"
        case "value_error":
            return f"{key}: {message}" if key else message
    return f"{key}: {first['input']!r}: {message}"


def _known(error: ErrorDetails) -> list[str]:
    """The keys beside an unknown one."""
    models: dict[Any, type[Section]] = {"choice": Choice, "uniform": Uniform, "loguniform": LogUniform, "int": Int}
    match error["loc"]:
        case ("space", _, kind, _):
            return list(models[kind].model_fields)
    return list(SearchConfig.model_fields)
