"""What a person sees of a search: a bar of its trials and a line for each event, and tables at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from arat_dist.search.ledger import Accuracies, Trial, shown_params
from arat_dist.search.search import Search
from launcher.progress import console


class SearchProgress:
    """Shows the trials of a search as they come; a context."""

    def __init__(self, search: Search):
        self._search = search
        self._began, self._num_before = time.monotonic(), len(search.ledger.ended())
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            search.run.name, total=search.num_trials, completed=self._num_before, state="starting"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, trial: Trial) -> None:
        """A trial's process is there."""
        goes_on = f"goes on after epoch {max(trial.reports)}" if trial.reports else "starts"
        self._say(trial, f"{goes_on}: {shown_params(trial.params)}")

    def reported(self, trial: Trial) -> None:
        """A trial has new accuracies."""
        epoch = max(trial.reports)
        self._say(trial, f"epoch {epoch}/{self._search.base.train.epochs}: {_shown(trial.reports[epoch])}")

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""
        what = f": {_shown(trial.result)}" if trial.result else f": {trial.reason}"
        self._bar.update(self._task, completed=len(self._search.ledger.ended()))
        self._say(trial, trial.status + what + self._left())

    def _left(self) -> str:
        """Time left, from the trials of this launch so far."""
        num_ended = len(self._search.ledger.ended())
        num_left = self._search.num_trials - num_ended
        if num_ended == self._num_before or not num_left:
            return ""
        left_s = (time.monotonic() - self._began) / (num_ended - self._num_before) * num_left
        return f"; {num_left} trials and about {left_s:.0f} s left"

    def _say(self, trial: Trial, text: str) -> None:
        self._bar.update(self._task, state=escape(f"trial {trial.number} {text}"))
        if not console.is_terminal or trial.status:
            line = f"{self._search.run.name}: trial {trial.number} {text}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def search_tables(summary: dict[str, Any]) -> list[Table]:
    """The Pareto front of a finished search, and what its keys explain."""
    best: dict[int, list[str]] = {}
    for which, number in summary["best"].items():
        best.setdefault(number, []).append(which)
    counts = ", ".join(f"{count} {status}" for status, count in summary["trials"].items())
    table = Table(title=f"{summary['name']}: trials that none beats in both accuracies ({counts})")
    for column in ("trial", "clean", "robust", "score", "best by", "values"):
        table.add_column(column, justify="left" if column in ("best by", "values") else "right")
    for each in summary["pareto"]:
        table.add_row(
            str(each["trial"]),
            *(f"{each[name]:.4f}" for name in ("clean_accuracy", "robust_accuracy", "score")),
            ", ".join(best.get(each["trial"], ())),
            escape(shown_params(each["overrides"])),
        )
    if not summary["importance"]:
        return [table]
    shares = Table(title="how much of the score's variance a key explains")
    shares.add_column("key")
    shares.add_column("share", justify="right")
    for key, share in summary["importance"].items():
        shares.add_row(key, f"{share:.0%}")
    return [table, shares]


def _shown(accuracies: Accuracies) -> str:
    return f"clean {accuracies.clean:.1%}, robust {accuracies.robust:.1%}"
