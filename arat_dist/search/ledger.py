"""What a search has done so far: trials.jsonl, a line an event, which alone a resumed search goes on from."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from arat_dist.storage import Storage

TRIALS = "trials.jsonl"

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
STATUSES = (FINISHED, PRUNED, FAILED)


@dataclass(frozen=True)
class Accuracies:
    """Shares of 1, of the same pictures."""

    clean: float
    robust: float

    def named(self) -> dict[str, float]:
        """By the names that results have everywhere."""
        return {"clean_accuracy": self.clean, "robust_accuracy": self.robust}


@dataclass
class Trial:
    """One trial as the ledger has it.

    Attributes:
        number: counted from 0.
        params: values by dotted recipe key.
        reports: accuracies in the course of training, by epoch.
        status: finished, pruned, failed, or empty while it is at work.
        result: accuracies at its end, by the recipe's own evaluation; None unless it finished.
        reason: why it was pruned or failed.
    """

    number: int
    params: dict[str, Any]
    reports: dict[int, Accuracies] = field(default_factory=dict)
    status: str = ""
    result: Accuracies | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of its run's folder."""
        return f"{self.number:04d}"

    @property
    def last(self) -> Accuracies | None:
        """The newest accuracies: at its end, or those of its last report."""
        return self.result or (self.reports[max(self.reports)] if self.reports else None)


def shown_params(params: dict[str, Any]) -> str:
    """A trial's values in one line."""
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in params.values())
    return ", ".join(f"{key} {value}" for key, value in zip(params, shown, strict=True))


class Ledger:
    """The trials of one search, and their file.

    Args:
        folder: the search's.

    Attributes:
        trials: in the order of their numbers.
        events: as they stand in the file, in the order in which they happened.
    """

    def __init__(self, folder: Storage):
        self._folder = folder
        self.trials: list[Trial] = []
        self.events: list[dict[str, Any]] = []
        for line in self._whole_lines().splitlines():
            self._apply(json.loads(line))
        spent_s = self.events[-1]["time_s"] if self.events else 0.0
        self._began = time.monotonic() - spent_s

    def running(self) -> list[Trial]:
        """Those that have no end yet."""
        return [trial for trial in self.trials if not trial.status]

    def ended(self, *statuses: str) -> list[Trial]:
        """Those that have ended so; without an argument, all that have ended."""
        return [trial for trial in self.trials if trial.status in (statuses or STATUSES)]

    def num(self, status: str) -> int:
        """Number of trials that have ended so."""
        return len(self.ended(status))

    def propose(self, params: dict[str, Any]) -> Trial:
        """Note a new trial."""
        self._note({"event": "proposed", "trial": len(self.trials), "params": params})
        return self.trials[-1]

    def report(self, number: int, epoch: int, accuracies: Accuracies, *, pruned: str = "") -> None:
        """Note accuracies in the course of a trial and, with its reason, that they are its last.

        Both or none: a trial that goes on after a kill must not have passed where it was pruned.
        """
        report = {"event": "report", "trial": number, "epoch": epoch, **accuracies.named()}
        self._note(report, *([_end(number, PRUNED, None, pruned)] if pruned else []))

    def end(self, number: int, status: str, result: Accuracies | None = None, reason: str = "") -> None:
        """Note a trial's end."""
        self._note(_end(number, status, result, reason))

    def seconds(self) -> float:
        """Time of the search over all of its launches, in seconds; a killed one's ends with its last line."""
        return time.monotonic() - self._began

    def _note(self, *events: dict[str, Any]) -> None:
        timed = [event | {"time_s": round(self.seconds(), 2)} for event in events]
        self._folder.append(TRIALS, b"".join(json.dumps(event).encode() + b"\n" for event in timed))
        for event in timed:
            self._apply(event)

    def mend(self) -> None:
        """Drop half a line, which a kill in mid-write leaves, lest the next one joins it; for who holds the lock."""
        if (whole := self._whole_lines()) != self._folder.read_from(TRIALS, 0):
            self._folder.write(TRIALS, whole)

    def _apply(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        match event["event"]:
            case "proposed":
                self.trials.append(Trial(event["trial"], event["params"]))
            case "report":
                self.trials[event["trial"]].reports[event["epoch"]] = _accuracies(event)
            case "ended":
                trial = self.trials[event["trial"]]
                # In this order: another thread may look at those that have a status.
                trial.result = _accuracies(event) if "robust_accuracy" in event else None
                trial.reason, trial.status = event["reason"], event["status"]

    def _whole_lines(self) -> bytes:
        content = self._folder.read_from(TRIALS, 0)
        return content[: content.rfind(b"\n") + 1]


def _end(number: int, status: str, result: Accuracies | None, reason: str) -> dict[str, Any]:
    accuracies = result.named() if result else {}
    return {"event": "ended", "trial": number, "status": status, "reason": " ".join(reason.split()), **accuracies}


def _accuracies(event: dict[str, Any]) -> Accuracies:
    return Accuracies(event["clean_accuracy"], event["robust_accuracy"])
