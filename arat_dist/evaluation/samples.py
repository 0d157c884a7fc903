"""Which samples an evaluation is about: all, some evenly spaced, or a list from a file, such as RobustBench's 5,000."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from arat_dist.data.manifest import Manifest, load_manifest
from arat_dist.data.order import spread
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError
from arat_dist.evaluation.stages import Samples


def choose_samples(val: str, limit: int | None, file: str | None) -> Samples:
    """Indices, ascending.

    Args:
        val: the .beton.
        limit: take only so many, evenly spaced.
        file: a list of them; limit then counts its lines.

    Raises:
        UserError: the file has a line that is no sample of the set, or one twice.
    """
    manifest = load_manifest(val)
    chosen = np.arange(manifest.num_samples) if file is None else _listed(file, val, manifest)
    return chosen[spread(len(chosen), min(len(chosen), limit or len(chosen)))].astype(np.int64)


def _listed(file: str, val: str, manifest: Manifest) -> Samples:
    """The samples that a file lists: a line for each, its index or its picture's name; empty lines don't count."""
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--samples: {file}: can't be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise UserError(f"--samples: {file}: is empty; a line for each sample, its index or its name, would be right")
    by_name = {} if all(_is_index(line) for _, line in numbered) else _names(file, val, manifest)
    seen: dict[int, int] = {}
    for number, line in numbered:
        index = int(line) if _is_index(line) else by_name.get(_tail(line, 2), by_name.get(_tail(line, 1), -1))
        if not 0 <= index < manifest.num_samples:
            raise UserError(
                f"--samples: {file}: line {number}: {line}: no sample of {val}, which has {manifest.num_samples}"
            )
        if index in seen:
            raise UserError(f"--samples: {file}: line {number}: {line}: the sample of line {seen[index]} again")
        seen[index] = number
    return np.array(sorted(seen), np.int64)


def _names(file: str, val: str, manifest: Manifest) -> dict[str, int]:
    """Index by name, as the source has them that the set was written from: the set itself knows no names."""
    try:
        source = open_source(manifest.source)
    except UserError as error:
        raise UserError(
            f"--samples: {file}: lists names, and {val} was written from {manifest.source}, which can't be read now "
            f"({error}); indices would be right"
        ) from error
    skipped = {line.partition(": ")[0] for line in manifest.skipped}
    names = [name for name in map(source.name_of, range(len(source))) if name not in skipped]
    if len(names) != manifest.num_samples:
        raise UserError(
            f"--samples: {file}: lists names, and {manifest.source} has changed since {val} was written; indices would "
            "be right"
        )
    files = Counter(_tail(name, 1) for name in names)
    by_file = {_tail(name, 1): index for index, name in enumerate(names) if files[_tail(name, 1)] == 1}
    return by_file | {_tail(name, 2): index for index, name in enumerate(names)}


def _is_index(line: str) -> bool:
    return line.removeprefix("-").isdecimal()


def _tail(name: str, count: int) -> str:
    """The last parts of a path: lists agree on class folder and file name, or on the latter, wherever pictures lie."""
    return "/".join(name.split("/")[-count:])
