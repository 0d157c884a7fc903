"""Runs a part in a process of its own, and in another one where that dies, until it is done or its time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .journal import RESTART, append_line, read_lines

_MOST_STARTS = 16
_LOOK_S = 0.1
_GRACE_S = 3.0
"""For a part that is about to end by itself at its limit."""
_CUT = "cut off: the part's time was over"


@dataclass
class PartResult:
    """What became of a part; `status` is ok, failed or timed out."""

    name: str
    status: str
    seconds: float
    limit_s: float
    cases: list[dict[str, Any]] = field(default_factory=list)

    def of_status(self, *statuses: str) -> list[dict[str, Any]]:
        """Lines of the cases that ended so."""
        return [case for case in self.cases if case["status"] in statuses]


def run_part(
    name: str,
    command: Callable[[float], Sequence[str]],
    journal: Path,
    log: Path,
    seconds: float,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> PartResult:
    """Run a part to its end or to its limit.

    Args:
        name: the part's.
        command: what runs it, given the seconds that it may take; it goes on where the journal ends.
        journal: the part's lines.
        log: gets what it prints.
        seconds: its limit.
        show: called with each finished case's line.
    """
    began = time.monotonic()
    watch = _Watch(journal, began + seconds, show)
    for _ in range(_MOST_STARTS):
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(watch.seconds_left()), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            ending = watch.wait(process)
        finally:
            _kill(process)
        if not watch.goes_on(ending, process.returncode, log):
            break
    else:
        append_line(journal, case="the rest", status="failed", message=f"its process died {_MOST_STARTS} times")
    watch.news()
    result = PartResult(name, "ok", round(time.monotonic() - began, 1), round(seconds, 1), finished(journal))
    if result.of_status("timed out", "no time"):
        result.status = "timed out"
    if result.of_status("failed"):
        result.status = "failed"
    return result


class _Watch:
    """Looks after the processes of one part."""

    def __init__(self, journal: Path, until: float, show: Callable[[dict[str, Any]], None]):
        self._journal, self._until, self._show = journal, until, show
        self._num_shown = 0

    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def news(self) -> None:
        """Show the cases that have ended since the last time."""
        lines = finished(self._journal)
        for line in lines[self._num_shown :]:
            self._show(line)
        self._num_shown = len(lines)

    def wait(self, process: subprocess.Popen[bytes]) -> str:
        """Until the process has "ended", the part is over its "limit", or the running case is over that of a "case"."""
        began, case = time.monotonic(), None
        while process.poll() is None:
            now, running = time.monotonic(), _running(self._journal)
            if running is None or running["case"] != case:
                began, case = now, running and running["case"]
            if now > self._until + (0 if running else _GRACE_S):
                return "limit"
            if running and now > began + running["limit_s"]:
                return "case"
            self.news()
            time.sleep(_LOOK_S)
        return "ended"

    def goes_on(self, ending: str, returncode: int, log: Path) -> bool:
        """Close the line of the case that was running, if any; whether another process is to do the rest."""
        running = _running(self._journal)
        died = f"its process died ({_how(returncode)}); see {log.name}"
        if running is not None:
            status, message = {
                "ended": ("failed", died),
                "case": ("timed out", f"took longer than {running['limit_s']:.0f} s"),
                "limit": ("timed out", _CUT),
            }[ending]
            append_line(self._journal, case=running["case"], status=status, message=message)
        elif ending == "ended" and returncode not in (0, RESTART):
            append_line(self._journal, case="start", status="failed", message=died)
            return False
        elif ending == "limit":
            append_line(self._journal, case="the rest", status="timed out", message=_CUT)
        is_done = ending == "ended" and returncode == 0
        return not is_done and ending != "limit" and self.seconds_left() > _GRACE_S


def finished(journal: Path) -> list[dict[str, Any]]:
    """Lines of the cases that have ended."""
    return [line for line in read_lines(journal) if line["status"] != "begin"]


def _running(journal: Path) -> dict[str, Any] | None:
    """The line of the case that has begun and not ended."""
    lines = read_lines(journal)
    return lines[-1] if lines and lines[-1]["status"] == "begin" else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit status {returncode}"
