"""Threads of the driver that read metrics.jsonl while a run writes it: for the screen, and for MLflow.

They are off the step's path: a slow or absent MLflow server can neither slow the training down nor lose a line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from arat_dist.run import Run
from arat_dist.tracking import Replica, one_line, without_password

logger = logging.getLogger(__name__)

POLL_S = 0.5
SLOWEST_POLL_S = 30
LAST_TRIES = 3


class Follower(threading.Thread):
    """Hands every line of a run's metrics.jsonl to a callback, in order, as the lines come; as a context, inside it.

    Args:
        run: the run; its file need not exist yet.
        on_line: called in this thread.
    """

    def __init__(self, run: Run, on_line: Callable[[dict[str, Any]], None]):
        super().__init__(daemon=True, name=f"follow {run.name}")
        self._run, self._on_line = run, on_line
        self._offset = 0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self) -> None:
        """Read until stopped, then once more."""
        while not self._done.wait(POLL_S):
            self.read()
        self.read()

    def read(self) -> None:
        """Hand over what came since; what a storage fails to give now comes with the next look."""
        try:
            lines = list(self._run.metrics_from(self._offset))
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            logger.debug("%s: %s", self._run.folder.uri, one_line(error))
            return
        for line, offset in lines:
            self._on_line(line)
            self._offset = offset

    def stop(self, timeout_s: float | None = None) -> None:
        """Read what is left and end, within a time in seconds."""
        self._done.set()
        self.join(timeout_s)


class Mirror(threading.Thread):
    """Keeps one MLflow run equal to a run's metrics.jsonl, in its own thread.

    A run that goes on continues its MLflow run. What goes wrong is said once in the log, stops nothing, and is tried
    again, ever more rarely.
    """

    def __init__(self, replica: Replica):
        super().__init__(daemon=True, name=f"mirror {replica.run.name}")
        self._replica = replica
        self._done = threading.Event()
        self._summary: dict[str, Any] | None = None
        self._is_complete = self._has_complained = False

    @property
    def uri(self) -> str:
        """MLflow's."""
        return self._replica.uri

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None while the server wasn't reached."""
        return self._replica.run_id

    def run(self) -> None:
        """Follow until told to finish; then try a few times to get everything across."""
        pause_s = POLL_S
        while not self._done.wait(pause_s):
            pause_s = POLL_S if self._tries(self._follow) else min(2 * pause_s, SLOWEST_POLL_S)
        for pause_s in range(LAST_TRIES):
            time.sleep(pause_s)
            if self._tries(lambda: self._replica.close(self._summary or {})):
                self._is_complete = True
                return

    def finish(self, summary: dict[str, Any] | None, *, timeout_s: float = 60) -> None:
        """Send what is left and close the MLflow run; gives up after a time in seconds.

        Args:
            summary: of the run; None where it failed.
            timeout_s: how long to wait for what is left.
        """
        self._summary = summary
        self._done.set()
        self.join(timeout_s)
        if not self._is_complete:
            logger.warning(
                "MLflow at %s lacks the end of this run; `arat track sync %s` delivers it",
                without_password(self._replica.uri),
                self._replica.run.folder.uri,
            )

    def _follow(self) -> None:
        self._replica.update()
        self._replica.set_status("RUNNING")

    def _tries(self, work: Callable[[], None]) -> bool:
        """Whether it worked."""
        uri = without_password(self._replica.uri)
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, the run goes on
            if not self._has_complained:
                logger.warning("MLflow at %s: %s; metrics.jsonl has every line", uri, one_line(error))
            self._has_complained = True
            return False
        if self._has_complained:
            logger.info("MLflow at %s has every line again", uri)
        self._has_complained = False
        return True
