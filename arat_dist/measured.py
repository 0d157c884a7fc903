"""What was measured of a run's weights: at its end, and by `arat eval` since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from arat_dist.run import Run

EVALUATIONS = "evaluations"
RESULT = "result.json"


@dataclass(frozen=True)
class Measurement:
    """One evaluation. Accuracies are fractions of 1, eps is in pixel units of [0,1].

    data: the set, as `data_name` calls it.
    attack: its name and what else sets it apart; "none" leaves robust_accuracy at None.
    parts: of an attack that is several in a row, each one's name and the robust accuracy after it and all before.
    corruptions: name, severity and accuracy of each.
    warnings: what spoke against the figures.
    """

    data: str
    num_samples: int
    clean_accuracy: float
    attack: str
    norm: str
    eps: float
    robust_accuracy: float | None
    parts: Sequence[tuple[str, float]] = ()
    corruptions: Sequence[tuple[str, int, float]] = ()
    warnings: Sequence[str] = ()


def measurements(run: Run, weights: str, step: int, val: str) -> list[Measurement]:
    """All that was measured of these weights: the summary's figures first, then evaluations by name.

    Args:
        run: the run.
        weights: raw, ema or swa; figures of the others are left out.
        step: that the weights are of; figures that are known to be of another one are left out.
        val: the run's own validation set.
    """
    found = []
    if summary := final_summary(run, weights, step):
        found.append(_measurement(summary, summary["robust_attack"], val))
    return found + [
        _measurement(result, _attack(result), result.get("data") or val)
        for result in _results(run)
        if result.get("weights") in (None, weights)
        and result.get("step") in (None, step)
        # The clean branch stays here.
        and result.get("branch") in (None, "adv")
    ]


def final_summary(run: Run, weights: str, step: int) -> Mapping[str, Any]:
    """The run's summary if its accuracies are those of these weights; else empty."""
    summary = run.summary()
    return summary if (summary.get("weights"), summary.get("steps")) == (weights, step) else {}


def data_name(path: str) -> str:
    """What a reader elsewhere may call a data set: the last folder and the file, without the way there."""
    return "/".join(PurePosixPath(path).with_suffix("").parts[-2:])


def _results(run: Run) -> Iterator[Mapping[str, Any]]:
    """Every evaluation of the run that came to its end."""
    folder = run.folder / EVALUATIONS
    for name in folder.names():
        if result := (folder / name).read_json(RESULT):
            yield result


def _attack(result: Mapping[str, Any]) -> str:
    """An evaluation's attack in words: figures of other restarts, precisions or pictures made elsewhere are others."""
    words = [result["attack"]]
    if restarts := result.get("restarts"):
        words.append(f"x{restarts}")
    if (precision := result.get("precision", "fp32")) != "fp32":
        words.append(f"in {precision}")
    if result.get("transfer_from"):
        words.append("transferred from another net")
    return " ".join(words)


def _measurement(result: Mapping[str, Any], attack: str, data: str) -> Measurement:
    parts = result.get("attacks") or ()
    return Measurement(
        data=data_name(data),
        num_samples=result["num_samples"],
        clean_accuracy=result["clean_accuracy"],
        attack=attack,
        norm=result["norm"],
        eps=result["eps"],
        robust_accuracy=result["robust_accuracy"],
        parts=[(part["name"], part["robust_accuracy"]) for part in parts] if len(parts) > 1 else (),
        corruptions=[(each["name"], each["severity"], each["accuracy"]) for each in result.get("corruptions") or ()],
        warnings=result.get("warnings") or (),
    )
