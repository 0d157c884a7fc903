"""What a search has done so far: trials.jsonl, a line an event, which alone a resumed search goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
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


class Ledger:
    """The trials of one search, and their file.

    Args:
        folder: the search's.
    """

    def __init__(self, folder: Storage):
        self._folder = folder
        self.trials: list[Trial] = []
        spent_s = 0.0
        for event in self._read():
            spent_s = event["time_s"]
            self._apply(event)
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

    def report(self, number: int, epoch: int, accuracies: Accuracies) -> None:
        """Note accuracies in the course of a trial."""
        self._note({"event": "report", "trial": number, "epoch": epoch, **accuracies.named()})

    def end(self, number: int, status: str, result: Accuracies | None = None, reason: str = "") -> None:
        """Note a trial's end."""
        accuracies = result.named() if result else {}
        self._note({"event": "ended", "trial": number, "status": status, "reason": reason, **accuracies})

    def seconds(self) -> float:
        """Time of the search over all of its launches, in seconds; a killed one's ends with its last line."""
        return time.monotonic() - self._began

    def _note(self, event: dict[str, Any]) -> None:
        event["time_s"] = round(self.seconds(), 2)
        self._folder.append(TRIALS, json.dumps(event).encode() + b"\n")
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "proposed":
                self.trials.append(Trial(event["trial"], event["params"]))
            case "report":
                self.trials[event["trial"]].reports[event["epoch"]] = _accuracies(event)
            case "ended":
                trial = self.trials[event["trial"]]
                trial.status, trial.reason = event["status"], event["reason"]
                trial.result = _accuracies(event) if "robust_accuracy" in event else None

    def _read(self) -> Iterator[dict[str, Any]]:
        """The events; half a line, which a kill in mid-write leaves, goes, and the next one doesn't join it."""
        content = self._folder.read_from(TRIALS, 0)
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._folder.write(TRIALS, whole)
        for line in whole.splitlines():
            yield json.loads(line)


def _accuracies(event: dict[str, Any]) -> Accuracies:
    return Accuracies(event["clean_accuracy"], event["robust_accuracy"])
