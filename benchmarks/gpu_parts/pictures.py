"""The pictures that the parts use, as .beton files: CIFAR-10 or handwritten digits, and made-up photographs."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data.manifest import manifest_path
from arat_dist.data.sources import open_source

from .beton_file import Stored, write_beton

_SPLITS = ("train", "val")
NUM_CLASSES = 10
"""Of CIFAR-10 and of the digits."""


class Sets(NamedTuple):
    """A training and a validation set of 32x32 pictures in 10 classes."""

    name: str
    train: Path
    val: Path


def find_cifar(given: Path | None) -> Path | None:
    """The archive that was named, or that of the sample data; None where there is none."""
    folder = os.environ.get("ARAT_SAMPLE_DATA")
    if given is not None or folder is None:
        return given
    archive = Path(folder) / "cifar10.tar.xz"
    return archive if archive.is_file() else None


def cifar_or_digits(archive: Path | None, scratch: Path) -> Sets:
    """The archive's pictures, or where there is none the digits; written on the first call."""
    if archive is None:
        return digits(scratch)
    sets = _sets("cifar10", scratch)
    if not all(manifest_path(path).exists() for path in sets[1:]):
        _write_archive(archive, sets)
    return sets


def digits(scratch: Path, num_train: int | None = None, num_val: int | None = None) -> Sets:
    """scikit-learn's handwritten digits, all of them or so many."""
    sets = _sets("digits" if num_train is None else f"digits{num_train}", scratch)
    for split, path, count in zip(_SPLITS, sets[1:], (num_train, num_val), strict=True):
        if not manifest_path(path).exists():
            source = open_source(f"digits:{split}")
            some = [source[index] for index in range(len(source) if count is None else count)]
            stored = [_raw(picture, label) for picture, label in some]
            write_beton(path, stored, source.class_names, f"digits:{split}")
    return sets


def photographs(scratch: Path, count: int, seed: int = 0) -> Path:
    """Made-up JPEGs with about the size, the sharpness and the bytes of ImageNet's at 500x375; 64 of them, repeated."""
    path = scratch / f"photographs{count}.beton"
    if not manifest_path(path).exists():
        random = np.random.default_rng(seed)
        some = [_photograph(random) for _ in range(min(64, count))]
        stored = [Stored(some[index % len(some)], 375, 500, True, index % 2) for index in range(count)]
        write_beton(path, stored, ("even", "odd"), "made up")
    return path


def _sets(name: str, scratch: Path) -> Sets:
    train, val = (scratch / f"{name}-{split}.beton" for split in _SPLITS)
    return Sets(name, train, val)


def _raw(picture: NDArray[np.uint8], label: int) -> Stored:
    return Stored(picture.tobytes(), picture.shape[0], picture.shape[1], False, label)


def _photograph(random: np.random.Generator) -> bytes:
    """A JPEG of structures of all sizes, from blotches to grain."""
    picture = np.zeros((375, 500, 3), np.float32)
    for side, strength in ((3, 60), (12, 40), (48, 25), (190, 14)):
        coarse = random.normal(0, strength, (side, side * 4 // 3, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[:, :, c]).resize((500, 375), Image.Resampling.BICUBIC) for c in range(3)]
        picture += np.stack([np.asarray(plane) for plane in planes], axis=2)
    file = io.BytesIO()
    Image.fromarray(np.clip(picture + 120, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_archive(archive: Path, sets: Sets) -> None:
    """cifar10/{train,val}/CLASS/*.jpg, classes in the order of their names."""
    found: dict[str, list[tuple[str, bytes]]] = {split: [] for split in _SPLITS}
    with tarfile.open(archive, "r|*") as files:
        for member in files:
            parts = member.name.split("/")
            if member.isfile() and len(parts) == 4 and parts[1] in found:
                content = files.extractfile(member)
                assert content is not None
                found[parts[1]].append((parts[2], content.read()))
    class_names = sorted({name for name, _ in found["train"]})
    # Before CUDA is up in this process: a fork would be of no use afterwards.
    with multiprocessing.get_context("fork").Pool(min(8, len(os.sched_getaffinity(0)))) as pool:
        for split, path in zip(_SPLITS, sets[1:], strict=True):
            pictures = pool.map(_decoded, [data for _, data in found[split]], chunksize=500)
            stored = [
                _raw(picture, class_names.index(name))
                for picture, (name, _) in zip(pictures, found[split], strict=True)
            ]
            write_beton(path, stored, class_names, f"{archive.name}:{split}")


def _decoded(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
