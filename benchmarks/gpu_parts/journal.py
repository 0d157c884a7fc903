"""A part's cases, one after the other, each written to a file of JSON lines as soon as it is done."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESTART = 75
"""Exit status of a part whose device is of no use any more, as after a CUDA error: it wants another process."""
_LEAST_S = 2.0
"""Time left below which no case is begun."""


class Skipped(Exception):  # noqa: N818 - no error
    """A case that makes no sense here, with the reason."""


class WrongError(Exception):
    """A check found something wrong; `values` is what was measured nonetheless."""

    def __init__(self, message: str, **values: Any):
        super().__init__(message)
        self.values = values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append_line(path: Path, **values: Any) -> None:
    """Append one line and have it on its way to the disk."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Journal:
    """Runs cases that no earlier process of the part has begun, as long as there is time.

    Args:
        path: the part's file. A case has a line when it begins and one when it has ended.
        seconds: how long the part may take from now on.
        clean: called after each case: frees what it left.
        is_usable: asked after a case that failed: whether the device still answers.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        *,
        clean: Callable[[], None] = lambda: None,
        is_usable: Callable[[], bool] = lambda: True,
    ):
        self._path, self._until = path, time.monotonic() + seconds
        self._clean, self._is_usable = clean, is_usable
        self._known = {line["case"]: line for line in read_lines(path)}

    def seconds_left(self) -> float:
        """Until the part's limit."""
        return self._until - time.monotonic()

    def line(self, case: str) -> dict[str, Any]:
        """What became of a case; empty where it hasn't been done."""
        return self._known.get(case, {})

    def run(self, case: str, work: Callable[[], dict[str, Any] | None], *, limit_s: float = 60.0) -> dict[str, Any]:
        """Do one case and write what became of it.

        Args:
            case: its name, once in the part.
            work: returns what it measured; raises `WrongError`, `Skipped`, or whatever breaks it.
            limit_s: longest time that it may take before whoever watches ends this process.

        Returns:
            The line: `status` is ok, failed, skipped, or "no time".
        """
        if case in self._known:
            return self._known[case]
        if self.seconds_left() < _LEAST_S:
            return self._write(case, "no time", 0.0, {})
        append_line(self._path, case=case, status="begin", limit_s=limit_s)
        began, error = time.perf_counter(), None
        try:
            status, values = "ok", work() or {}
        except Skipped as reason:
            status, values = "skipped", {"message": str(reason)}
        except WrongError as wrong:
            status, values = "failed", {"message": str(wrong), **wrong.values}
        except Exception as caught:  # noqa: BLE001 - whatever it is, the next case goes on
            traceback.print_exc()
            error = one_line(caught)
            status, values = "failed", {"message": error}
        line = self._write(case, status, time.perf_counter() - began, values)
        if error is not None and not self._is_usable():
            sys.stderr.flush()
            os._exit(RESTART)
        self._clean()
        return line

    def _write(self, case: str, status: str, seconds: float, values: dict[str, Any]) -> dict[str, Any]:
        line = {"case": case, "status": status, "seconds": round(seconds, 2), **values}
        append_line(self._path, **line)
        self._known[case] = line
        return line


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
