"""The ledger: what an unfinished evaluation has found out so far, a small file for each finished batch.

A file is there whole or not at all, names its samples and carries a checksum of what it says, so that an evaluation
that was killed goes on with what is sound and computes the rest, by any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arat_dist.storage import Storage

logger = logging.getLogger(__name__)

LEDGER = "ledger"
PROGRESS = "progress.json"

Columns = dict[str, NDArray[np.int64]]
"""Numbers by name, one for each sample of a batch, none below 0."""


class Ledger:
    """The ledger in an evaluation's folder; without a folder it keeps nothing.

    Args:
        folder: the evaluation's.
    """

    def __init__(self, folder: Storage | None):
        self._folder = None if folder is None else folder / LEDGER

    def load(self, stage: str, batches: Sequence[NDArray[np.int64]], names: Sequence[str]) -> dict[int, Columns]:
        """The sound batches of a stage by number.

        Args:
            stage: its name.
            batches: the samples of each batch, int64 [B].
            names: of the columns that each must have.
        """
        if self._folder is None:
            return {}
        found = {}
        for name in (folder := self._folder / stage).names():
            number = name.removesuffix(".json")
            if not number.isdecimal() or int(number) >= len(batches):
                continue
            columns = _read(folder, name, batches[int(number)], names)
            if columns is None:
                logger.warning("%s: damaged, or of other samples: this batch is computed anew", folder.path(name))
            else:
                found[int(number)] = columns
        return found

    def save(self, stage: str, number: int, samples: NDArray[np.int64], columns: Columns) -> None:
        """Keep a finished batch."""
        if self._folder is not None:
            content = {"samples": samples.tolist(), "columns": {name: col.tolist() for name, col in columns.items()}}
            line = json.dumps(content | {"sha256": _checksum(content)})
            (self._folder / stage).write(f"{number:06}.json", line.encode() + b"\n")

    def note(self, progress: dict[str, Any]) -> None:
        """Say which stage is at work, for who watches."""
        if self._folder is not None:
            self._folder.write_json(PROGRESS, progress)

    def progress(self) -> tuple[dict[str, Any], int]:
        """What was noted last, and how many batches of that stage are finished; empty and 0 before."""
        assert self._folder is not None
        try:
            noted = self._folder.read_json(PROGRESS)
        except ValueError:
            return {}, 0
        return noted, len((self._folder / noted["stage"]).names()) if noted else 0

    def delete(self) -> None:
        """Remove it, once the result is written."""
        if self._folder is not None:
            self._folder.delete("")


def _read(folder: Storage, name: str, samples: NDArray[np.int64], names: Sequence[str]) -> Columns | None:
    """A batch, None where it isn't sound."""
    try:
        content = json.loads(folder.read(name))
        checksum = content.pop("sha256")
        columns = {key: np.array(content["columns"][key], np.int64) for key in names}
        is_sound = checksum == _checksum(content) and content["samples"] == samples.tolist()
    except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError):
        return None
    return columns if is_sound and all(column.shape == samples.shape for column in columns.values()) else None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
