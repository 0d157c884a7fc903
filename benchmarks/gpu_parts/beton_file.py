"""A writer of small .beton files without ffcv: what a machine that lacks it needs to train on pictures.

The layout is FFCV's, version 2, as `arat_dist.data.beton_table` reads it; the manifest is the one that
`arat data write` puts beside its files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arat_dist.data.manifest import Manifest, file_sha256, manifest_path

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("allocations", "<u8")]
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
_ROW = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])
_FIELDS = ((2, b"image"), (1, b"label"))
"""FFCV's numbers of the types RGB image and integer, and what the product calls the fields."""
_JPEG, _RAW = 0, 1
_PAGE_BYTES = 2**23


class Stored(NamedTuple):
    """A picture as it lies in the file."""

    data: bytes
    """JPEG, or uint8 [height,width,3]."""
    height: int
    width: int
    is_jpeg: bool
    label: int


def write_beton(path: Path, pictures: Iterable[Stored], class_names: Sequence[str], source: str) -> Manifest:
    """Write pictures and the manifest beside them.

    Args:
        path: ends in .beton.
        pictures: each of fewer bytes than a page (8 MiB), which none crosses.
        class_names: a label is an index into them.
        source: where the pictures come from, in words.
    """
    pictures = list(pictures)
    rows, table = np.zeros(len(pictures), _ROW), np.zeros(len(pictures), _ALLOCATION)
    first = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize + rows.nbytes
    at = first = -(-first // _PAGE_BYTES) * _PAGE_BYTES
    with path.open("wb") as file:
        for index, picture in enumerate(pictures):
            size = len(picture.data)
            assert 0 < size <= _PAGE_BYTES, f"picture {index}: {size} bytes"
            if (at - first) % _PAGE_BYTES + size > _PAGE_BYTES:
                at = first + -(-(at - first) // _PAGE_BYTES) * _PAGE_BYTES
            file.seek(at)
            file.write(picture.data)
            mode = _JPEG if picture.is_jpeg else _RAW
            rows[index] = (mode, picture.width, picture.height, at), picture.label
            table[index] = index, at, size
            at += size
        end = first + -(-(at - first) // _PAGE_BYTES) * _PAGE_BYTES
        file.seek(end)
        file.write(table.tobytes())
        file.seek(0)
        file.write(_header(len(pictures), end) + rows.tobytes())
    manifest = _describe(path, rows, class_names, source)
    manifest_path(path).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _header(num_samples: int, allocations: int) -> bytes:
    header, fields = np.zeros(1, _HEADER), np.zeros(len(_FIELDS), _FIELD)
    header[0] = 2, len(_FIELDS), _PAGE_BYTES, num_samples, allocations
    for field, (type_id, name) in zip(fields, _FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return header.tobytes() + fields.tobytes()


def _describe(path: Path, rows: np.ndarray, class_names: Sequence[str], source: str) -> Manifest:
    heights, widths = rows["image"]["height"], rows["image"]["width"]
    return Manifest(
        num_samples=len(rows),
        class_names=tuple(class_names),
        class_counts=tuple(np.bincount(rows["label"], minlength=len(class_names)).tolist()),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        source=source,
        max_side=int(max(heights.max(), widths.max())),
        jpeg_quality=90,
        raw_below=128 * 128,
        raw_share=float(np.mean(rows["image"]["mode"] == _RAW)),
        min_size=(int(heights.min()), int(widths.min())),
        max_size=(int(heights.max()), int(widths.max())),
    )
