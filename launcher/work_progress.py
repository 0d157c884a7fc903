"""How far some work in this process is, where nothing but its own calls tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launcher.progress import console

LINE_EVERY_S = 5


class WorkProgress:
    """Shows how far pieces of work have come, and how much time is left; as a context it gives what takes that.

    Args:
        verb: what is done to each piece.
    """

    def __init__(self, verb: str):
        self._verb = verb
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began_s = self._shown_s = 0.0

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self.update

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, name: str, done: int, total: int) -> None:
        """Show that so much of a piece is done; elsewhere than on a terminal a line every few seconds."""
        now = time.monotonic()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(f"{name}: {self._verb}", total=total)
            self._began_s = self._shown_s = now
        self._bar.update(self._tasks[name], completed=done, total=total)
        if not console.is_terminal and (now - self._shown_s >= LINE_EVERY_S or done == total):
            left_s = (now - self._began_s) / done * (total - done)
            console.print(
                f"{name}: {self._verb}, {done}/{total}, {left_s:.0f} s left",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
            self._shown_s = now
