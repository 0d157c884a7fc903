"""One process at a time in a run of an object store, where there are no locks: the holder renews a file.

Two that start within the same moment, or a holder that stood still for long, are told apart in the end by the number of
the start (`Run.check_attempt`): whoever was overtaken writes nothing more.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from types import TracebackType
from typing import Self

from arat_dist.errors import TakenError
from arat_dist.storage import Storage

LEASE = "lease.json"
RENEW_S = 5.0
"""Seconds between two renewals."""
PATIENCE_S = 20.0
"""A lease that isn't renewed for so long is nobody's any more."""
_SETTLE_S = 1.0
"""Of two that write at the same moment, the later one's file stays: both look again after so long."""

logger = logging.getLogger(__name__)


class Lease(threading.Thread):
    """Held inside the context.

    Args:
        folder: the run's.
        name: the run's, for messages.

    Raises:
        TakenError: another process renews it.
    """

    def __init__(self, folder: Storage, name: str):
        super().__init__(daemon=True, name=f"lease {name}")
        self._folder, self._name = folder, name
        self._token, self._count = uuid.uuid4().hex, 0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._wait_until_stale()
        self._renew()
        time.sleep(_SETTLE_S)
        if self._folder.read_json(LEASE).get("token") != self._token:
            raise taken(self._name)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self.join()
        if self._folder.read_json(LEASE).get("token") == self._token:
            self._folder.delete(LEASE)

    def run(self) -> None:
        """Renew it until the context ends or another has it; a store that is out of reach is asked again."""
        while not self._done.wait(RENEW_S):
            try:
                if self._folder.read_json(LEASE).get("token", self._token) != self._token:
                    logger.warning("%s: another process has taken the run over", self._name)
                    return
                self._renew()
            except OSError as error:
                logger.warning("%s: the lease can't be renewed: %s", self._name, error)

    def _renew(self) -> None:
        self._count += 1
        self._folder.write_json(LEASE, {"token": self._token, "count": self._count})

    def _wait_until_stale(self) -> None:
        """Return once nobody holds it; one that was killed hasn't given it back."""
        seen = self._folder.read_json(LEASE)
        if seen:
            logger.info("%s: was left without an end, or is at work elsewhere: %g s will tell", self._name, PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while seen and time.monotonic() < deadline:
            time.sleep(min(_SETTLE_S, PATIENCE_S / 10))
            now = self._folder.read_json(LEASE)
            if now and now != seen:
                raise taken(self._name)
            seen = now


def taken(name: str) -> TakenError:
    """What to raise where another process has the run of a name."""
    return TakenError(f"--name: {name}: another process trains this run; its end, or another name, would be right")
