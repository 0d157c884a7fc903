"""What is tried next, and which keys mattered: the only file that knows of Optuna.

A proposal is a function of the search's seed, the trial's number and the trials before it. So a resumed search proposes
what an uninterrupted one would, from the ledger alone: Optuna's storage is in memory and built from it each time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from arat_dist.search.config import AnyDistribution, Choice, Int, LogUniform, SearchConfig, Uniform
from arat_dist.search.ledger import FAILED, FINISHED, PRUNED, Trial

ENOUGH_FOR_IMPORTANCE = 8
"""Finished trials."""

logger = logging.getLogger(__name__)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def propose(config: SearchConfig, trials: Sequence[Trial], number: int) -> dict[str, Any] | None:
    """Values by key for a trial; None where the grid has no more.

    Args:
        config: the search.
        trials: those before it, of earlier searches too, at work or ended.
        number: the trial's, counted from 0.
    """
    if config.searcher == "grid":
        return next(itertools.islice(grid(config), number, None), None)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}, {number}".encode()).digest()[:4])
    study = _study(config, trials, _sampler(config, seed))
    asked = study.ask()
    drawn: dict[str, Any] = {}
    for key, distribution in config.space.items():
        if distribution.is_drawn(drawn):
            drawn[key] = _value(distribution, _suggest(asked, key, _for_optuna(distribution)))
    return drawn


def grid(config: SearchConfig) -> Iterator[dict[str, Any]]:
    """Every combination, the last key's values first; a key that isn't drawn multiplies nothing."""
    keys = list(config.space)

    def below(at: int, drawn: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if at == len(keys):
            yield drawn
            return
        distribution = config.space[keys[at]]
        if not distribution.is_drawn(drawn):
            yield from below(at + 1, drawn)
            return
        for value in distribution.grid() or ():
            yield from below(at + 1, {**drawn, keys[at]: value})

    return below(0, {})


def importance(config: SearchConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the score's variance that each key explains (fANOVA), of those that every finished trial drew.

    Empty where too few trials finished, or all have the same score.
    """
    finished = [trial for trial in trials if trial.status == FINISHED]
    if len(finished) < ENOUGH_FOR_IMPORTANCE:
        return {}
    scores = {config.score(trial.result.clean, trial.result.robust) for trial in finished if trial.result}
    if len(scores) < 2:
        return {}
    single = config.model_copy(update={"searcher": "tpe"})
    study = _study(single, finished, RandomSampler(config.seed))
    try:
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=config.seed))
    except (ValueError, RuntimeError) as error:  # of values that are all alike, for example
        logger.info("how much each key explains can't be said: %s", error)
        return {}
    return {key: float(share) for key, share in shares.items()}


def _sampler(config: SearchConfig, seed: int) -> BaseSampler:
    if config.searcher == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed)


def _study(config: SearchConfig, trials: Sequence[Trial], sampler: BaseSampler) -> optuna.Study:
    """A study that knows of these trials."""
    directions = [StudyDirection.MAXIMIZE] * (2 if config.searcher == "motpe" else 1)
    study = optuna.create_study(sampler=sampler, directions=directions)
    study.add_trials([_frozen(config, trial) for trial in trials])
    return study


def _frozen(config: SearchConfig, trial: Trial) -> optuna.trial.FrozenTrial:
    distributions = {key: _for_optuna(config.space[key]) for key in trial.params}
    params = {key: _label(config.space[key], value) for key, value in trial.params.items()}
    states = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}
    state, values, steps = states.get(trial.status, TrialState.RUNNING), None, {}
    if config.searcher == "motpe":
        # With two objectives Optuna knows no pruning: what a pruned trial had reached is what it is worth.
        if trial.status in (FINISHED, PRUNED):
            state = TrialState.COMPLETE if trial.last else TrialState.FAIL
            values = [trial.last.clean, trial.last.robust] if trial.last else None
    else:
        steps = {epoch: config.score(each.clean, each.robust) for epoch, each in trial.reports.items()}
        values = [config.score(trial.result.clean, trial.result.robust)] if trial.result else None
    return optuna.trial.create_trial(
        state=state, params=params, distributions=distributions, values=values, intermediate_values=steps
    )


def _for_optuna(distribution: AnyDistribution) -> BaseDistribution:
    match distribution:
        case Choice(values=values):
            return CategoricalDistribution([json.dumps(value) for value in values])
        case Int(low=low, high=high, step=step):
            return IntDistribution(low, high - (high - low) % step, step=step)
        case LogUniform(low=low, high=high):
            return FloatDistribution(low, high, log=True)
        case Uniform(low=low, high=high):
            # The number of a step: steps such as 1/255 don't add up to what Optuna takes for a multiple.
            values = distribution.grid()
            return IntDistribution(0, len(values) - 1) if values else FloatDistribution(low, high)


def _suggest(asked: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return asked.suggest_categorical(key, choices)
        case IntDistribution(low=low, high=high, step=step):
            return asked.suggest_int(key, low, high, step=step)
        case FloatDistribution(low=low, high=high, log=log):
            return asked.suggest_float(key, low, high, log=log)
    raise TypeError(distribution)


def _label(distribution: AnyDistribution, value: Any) -> Any:
    """A value as Optuna has it."""
    if isinstance(distribution, Choice):
        return json.dumps(value)
    if isinstance(distribution, Uniform) and distribution.step is not None:
        return round((value - distribution.low) / distribution.step)
    return value


def _value(distribution: AnyDistribution, label: Any) -> Any:
    """A value as a recipe has it."""
    if isinstance(distribution, Choice):
        return json.loads(label)
    if isinstance(distribution, Uniform) and (values := distribution.grid()):
        return values[label]
    return label
