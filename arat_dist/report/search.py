"""What a report says of a search: its trials by clean and robust accuracy, and which of them are shown as runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arat_dist.report.figures import Plot, draw
from arat_dist.report.names import attack_name, radius_name
from arat_dist.report.plots import TrialPoints, front_plot
from arat_dist.report.style import styled, to_png
from arat_dist.search.front import best, pareto_front
from arat_dist.search.ledger import FINISHED, PRUNED, STATUSES, Trial
from arat_dist.search.search import Search

PLOT = "pareto.png"


def split_targets(targets: Sequence[str]) -> tuple[list[Search], list[str], dict[str, str]]:
    """The searches among some targets, and the runs: the others, and of each search its best trials.

    Returns:
        The searches, the runs, and labels for those of the runs that are trials.
    """
    searches: list[Search] = []
    runs: list[str] = []
    labels: dict[str, str] = {}
    for target in targets:
        search = Search.find(target)
        if search is None:
            runs.append(target)
            continue
        searches.append(search)
        trials = best(search.config, pareto_front(search.ledger.trials)).values()
        of_trials = {search.run_of(trial).folder.uri: f"{search.run.name}/{trial.name}" for trial in trials}
        runs += of_trials
        labels |= of_trials
    return searches, runs, labels


def search_plots(searches: Sequence[Search]) -> list[Plot]:
    """A plot for each search."""
    plots = []
    for number, search in enumerate(searches, 1):
        points = trial_points(search)
        plots.append(
            draw(
                f"search-{number}",
                f"Trials, {_title(search)}",
                f"{len(points.front)} of {len(search.ledger.trials)} trials are beaten by no other in both accuracies.",
                lambda points=points: front_plot(points),
                caption="Joined: trials that no other beats in both. Hollow: beaten. Crosses: pruned ones that come "
                f"near, by their last report ({attack_name(search.base.eval.every_attack)} in the course of training).",
            )
        )
    return plots


def front_png(search: Search) -> bytes:
    """The plot of one search as a PNG."""
    with styled():
        return to_png(front_plot(trial_points(search)), f"{search.run.name}: {_title(search)}")


def trial_points(search: Search) -> TrialPoints:
    """The trials as points."""
    front = pareto_front(search.ledger.trials)
    beaten = [trial for trial in search.ledger.ended(FINISHED) if trial not in front]
    pruned = [trial for trial in search.ledger.ended(PRUNED) if trial.last]
    return TrialPoints(_array(front), [str(trial.number) for trial in front], _array(beaten), _array(pruned))


def search_tables(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """What the page says beside each plot: the front, and how the trials ended."""
    return [
        {
            "counts": ", ".join(f"{search.ledger.num(status)} {status}" for status in STATUSES),
            "weight": search.config.robust_weight,
            "keys": list(search.config.space),
            "trials": [_row(search, trial) for trial in pareto_front(search.ledger.trials)],
        }
        for search in searches
    ]


def _row(search: Search, trial: Trial) -> dict[str, Any]:
    assert trial.result is not None
    chosen = best(search.config, pareto_front(search.ledger.trials))
    values = [trial.params.get(key, "\N{EN DASH}") for key in search.config.space]
    return {
        "number": trial.number,
        "clean": trial.result.clean,
        "robust": trial.result.robust,
        "best_by": ", ".join(which for which, each in chosen.items() if each is trial),
        "values": [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values],
    }


def _title(search: Search) -> str:
    evaluation = search.base.eval
    assert evaluation.norm is not None
    assert evaluation.eps is not None
    return f"{attack_name(evaluation.attack)}, {radius_name(evaluation.norm, evaluation.eps)}"


def _array(trials: Sequence[Trial]) -> np.ndarray:
    """Clean and robust accuracy, float64 [N,2]."""
    last = [trial.last for trial in trials]
    return np.array([(each.clean, each.robust) for each in last if each], dtype=np.float64).reshape(-1, 2)
