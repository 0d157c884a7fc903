"""The manifest beside a .beton: what was written, and how to tell that it still is.

FFCV's files carry no checksums: a truncated one reads as black pictures, or worse. `X.beton` therefore has
`X.manifest.json` beside it, written last.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arat_dist.config import DataConfig
from arat_dist.data.beton_table import read_contents
from arat_dist.errors import UserError

FORMAT_VERSION = 1

# Below this size a check hashes the whole file: about a second. ImageNet (150 GB) would take minutes at every start.
HASH_BELOW_BYTES = 256 * 2**20


class Manifest(BaseModel):
    """What a .beton holds and how it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Version of this manifest's layout."""
    num_samples: int = Field(ge=1)
    """Pictures in the file."""
    class_names: tuple[str, ...]
    """Name of each class; a label is an index into them."""
    class_counts: tuple[int, ...]
    """Pictures of each class."""
    num_bytes: int
    """Size of the .beton."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the .beton, in hexadecimal."""
    source: str
    """Where the pictures came from, as given to `arat data write`."""
    max_side: int
    """Longer pictures were shrunk to this side, in pixels."""
    jpeg_quality: int
    """Quality of the pictures that were stored as JPEG, 1 to 100."""
    raw_below: int
    """Pictures of fewer pixels than this are stored as they are, not as JPEG."""
    raw_share: float
    """Fraction of the pictures that are stored raw."""
    min_size: tuple[int, int]
    """Smallest height and smallest width, in pixels."""
    max_size: tuple[int, int]
    """Largest height and largest width, in pixels."""
    skipped: tuple[str, ...] = ()
    """Pictures that couldn't be read and were left out, each as 'NAME: reason'."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def all_are(self, side: int) -> bool:
        """Whether every picture is a square of this side, in pixels."""
        return self.min_size == self.max_size == (side, side)


def manifest_path(beton: str | Path) -> Path:
    """Where the manifest of a .beton lies: X.beton has X.manifest.json."""
    return Path(beton).with_suffix(".manifest.json")


def load_manifest(beton: str | Path) -> Manifest:
    """Read the manifest beside a .beton (UserError: it is missing or not one)."""
    path = manifest_path(beton)
    if not path.is_file():
        raise UserError(f"{path}: missing; `arat data write` puts it beside {Path(beton).name}")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: not a manifest: {where + ': ' if where else ''}{first['msg']}") from None
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version: {manifest.format_version}: {FORMAT_VERSION} is what can be read here")
    if len(manifest.class_counts) != manifest.num_classes or sum(manifest.class_counts) != manifest.num_samples:
        raise UserError(f"{path}: class_counts: they don't add up to num_samples ({manifest.num_samples})")
    return manifest


def check_beton(path: str | Path, *, hash: bool | None = None) -> Manifest:  # noqa: A002 - the word for it
    """Check a .beton against its manifest.

    Args:
        path: the .beton.
        hash: read the whole file and compare its SHA-256; None: only below 256 MiB.

    Raises:
        UserError: the file or its manifest is missing, or size, hash or number of pictures disagree.
    """
    beton = Path(path)
    if not beton.is_file():
        raise UserError(f"{beton}: no such file; `arat data write SOURCE {beton}` would write it")
    manifest = load_manifest(beton)
    again = "write it again with `arat data write`"
    num_bytes = beton.stat().st_size
    if num_bytes != manifest.num_bytes:
        raise UserError(f"{beton}: {num_bytes:,} bytes, its manifest says {manifest.num_bytes:,}; {again}")
    num_samples = _num_samples(beton)
    if num_samples != manifest.num_samples:
        raise UserError(f"{beton}: {num_samples:,} pictures, its manifest says {manifest.num_samples:,}; {again}")
    if hash or (hash is None and num_bytes < HASH_BELOW_BYTES):
        sha256 = file_sha256(beton)
        if sha256 != manifest.sha256:
            raise UserError(f"{beton}: damaged: SHA-256 {sha256[:12]}..., not {manifest.sha256[:12]}...; {again}")
    return manifest


def check_figures(path: str | Path, manifest: Manifest) -> None:
    """Compare what the manifest says of classes and sizes with the table of the .beton (UserError: they disagree)."""
    table, labels = read_contents(Path(path))
    heights, widths, is_jpeg = table[:, 2], table[:, 3], table[:, 4]
    found = {
        "class_counts": tuple(np.bincount(labels.clip(0), minlength=manifest.num_classes).tolist()),
        "raw_share": float(np.mean(is_jpeg == 0)),
        "min_size": (int(heights.min()), int(widths.min())),
        "max_size": (int(heights.max()), int(widths.max())),
    }
    for key, value in found.items():
        if value != getattr(manifest, key):
            raise UserError(
                f"{manifest_path(path)}: {key}: not that of the .beton; write it again with `arat data write`"
            )


def check_data(data: DataConfig) -> tuple[Manifest, Manifest]:
    """Check the data section of a recipe before any worker starts: the manifests of data.train and data.val.

    Raises:
        UserError: a file is missing or damaged, or the two sets and the recipe don't fit together.
    """
    train, val = check_beton(data.train), check_beton(data.val)
    for key, path, manifest in (("train", data.train, train), ("val", data.val, val)):
        if manifest.num_classes != data.num_classes:
            raise UserError(
                f"data.num_classes: {data.num_classes}: data.{key} ({path}) has {manifest.num_classes} classes"
            )
    if train.class_names != val.class_names:
        at = next(i for i, (a, b) in enumerate(zip(train.class_names, val.class_names, strict=True)) if a != b)
        raise UserError(
            f"data.val: {data.val}: class {at} is {val.class_names[at]!r}, "
            f"in data.train ({data.train}) it is {train.class_names[at]!r}; both need the same classes"
        )
    check_augment(data, train)
    return train, val


def check_augment(data: DataConfig, train: Manifest) -> None:
    """Refuse a training crop that the pictures don't fit (UserError)."""
    if data.augment == "pad_crop" and not train.all_are(data.image_size):
        low, high = train.min_size, train.max_size
        raise UserError(
            f"data.augment: pad_crop: needs pictures of {data.image_size}x{data.image_size} (data.image_size); "
            f"those of {data.train} are {low[0]}x{low[1]} to {high[0]}x{high[1]}; random_resized_crop would be right"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _num_samples(beton: Path) -> int:
    """Number of samples in the header of a .beton: a little-endian uint64 behind version, fields and page size."""
    with beton.open("rb") as file:
        return int.from_bytes(file.read(16)[8:], "little")
