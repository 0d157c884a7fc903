"""Clean against robust accuracy: which trials nothing beats in both, and which of them are taken home."""

from __future__ import annotations

from collections.abc import Sequence

from arat_dist.search.config import SearchConfig
from arat_dist.search.ledger import FINISHED, Accuracies, Trial


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one dominates, the most robust first; of equals the first.

    One dominates another if it is at least as good in both accuracies and better in one.
    """
    finished = [trial for trial in trials if trial.status == FINISHED]
    # At the head of each group of equal robust accuracy stands the best clean one: all behind need a better one.
    ordered = sorted(finished, key=lambda trial: (-_of(trial).robust, -_of(trial).clean, trial.number))
    front: list[Trial] = []
    for trial in ordered:
        if not front or _of(trial).clean > _of(front[-1]).clean:
            front.append(trial)
    return front


def best(config: SearchConfig, front: Sequence[Trial]) -> dict[str, Trial]:
    """Of a front: the best by robust accuracy, by clean accuracy, and by the search's score."""
    if not front:
        return {}
    return {
        "robust": front[0],
        "clean": front[-1],
        "score": max(front, key=lambda trial: config.score(_of(trial).clean, _of(trial).robust)),
    }


def _of(trial: Trial) -> Accuracies:
    assert trial.result is not None
    return trial.result
