"""The table of contents of a .beton, read without ffcv: where each picture's bytes lie, its size and its label.

The layout is FFCV's, version 2, as `arat data write` uses it: a header, the descriptions of two fields (picture and
label), a row of metadata a sample, pages of bytes, and at the end a table of what was allocated in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arat_dist.errors import UserError

_VERSION = 2
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("allocations", "<u8")]
)
_FIELD_BYTES = 1 + 16 + 1024
"""Of a description: type, name, arguments."""
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
_ROW = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])
_JPEG = 0


class Contents(NamedTuple):
    """What lies in a .beton."""

    table: NDArray[np.int64]
    """[N,5]: start and stop of the bytes in the file, height, width, whether they are JPEG."""
    labels: NDArray[np.int64]
    """[N]."""


def read_contents(path: Path) -> Contents:
    """Read the table of a file.

    Raises:
        UserError: the file is missing, or its table doesn't point inside it: whoever decodes reads wherever it points.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `arat data write SOURCE {path}` would write it")
    try:
        header = np.fromfile(path, _HEADER, 1)[0]
        num_samples, skipped = int(header["num_samples"]), _HEADER.itemsize + 2 * _FIELD_BYTES
        if header["version"] == _VERSION and header["num_fields"] == 2:
            rows = np.fromfile(path, _ROW, num_samples, offset=skipped)
            allocations = np.fromfile(path, _ALLOCATION, offset=int(header["allocations"]))
            contents = _join(rows, allocations)
            if len(rows) == num_samples and _is_inside(contents.table, path.stat().st_size):
                return contents
    except (IndexError, MemoryError, OSError, OverflowError, ValueError):
        pass
    raise UserError(f"{path}: not a complete .beton; write it again with `arat data write`")


def _join(rows: NDArray[np.void], allocations: NDArray[np.void]) -> Contents:
    """Rows know where their bytes start, allocations how many they are (ValueError: they don't agree)."""
    images = rows["image"]
    allocations = allocations[np.argsort(allocations["start"])]
    found = allocations[np.searchsorted(allocations["start"], images["start"])]
    if not np.array_equal(found["start"], images["start"]):
        raise ValueError("a picture lies where nothing was allocated")
    columns = found["start"], found["start"] + found["size"], images["height"], images["width"]
    table = np.stack([*columns, images["mode"] == _JPEG], axis=1).astype(np.int64)
    return Contents(table, np.ascontiguousarray(rows["label"]))


def _is_inside(table: NDArray[np.int64], num_bytes: int) -> bool:
    """Whether every picture of a table lies in a file of so many bytes, and each raw one has the bytes of its size."""
    start, stop, height, width, is_jpeg = table.T
    fits = (start > 0) & (start < stop) & (stop <= num_bytes) & (height > 0) & (width > 0)
    return len(table) > 0 and bool(np.all(fits & ((is_jpeg != 0) | (stop - start == 3 * height * width))))
