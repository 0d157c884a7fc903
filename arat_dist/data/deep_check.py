"""Decoding every picture of a .beton: finds what was broken before its SHA-256 was taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from arat_dist.data.beton import BetonLoader
from arat_dist.data.manifest import Manifest
from arat_dist.errors import UserError

_NUM_NAMED = 20
_BATCH_SIZE = 256


def check_samples(
    path: str | Path, manifest: Manifest, *, threads: int = 1, on_progress: Callable[[int], None] | None = None
) -> None:
    """Decode every picture, and compare the labels with the manifest's classes.

    Args:
        path: the .beton; `check_beton` has passed.
        manifest: its manifest.
        threads: threads that decode.
        on_progress: called now and then with the number of pictures done.

    Raises:
        UserError: pictures that can't be decoded or whose label is no class, by their indices: 20, then their number.
    """
    # They are decoded in full whatever comes out: the smaller, the less memory.
    with BetonLoader(path, batch_size=_BATCH_SIZE, image_size=8, threads=threads) as loader:
        is_broken = (loader.labels < 0) | (loader.labels >= manifest.num_classes)
        for num_done, unreadable in loader.unreadable():
            is_broken[unreadable] = True
            if on_progress is not None:
                on_progress(num_done)
    broken = np.flatnonzero(is_broken).tolist()
    if broken:
        more = f" and {len(broken) - _NUM_NAMED:,} more" if len(broken) > _NUM_NAMED else ""
        raise UserError(
            f"{path}: {len(broken):,} of {manifest.num_samples:,} pictures are broken: "
            f"{', '.join(map(str, broken[:_NUM_NAMED]))}{more}; write it again with `arat data write`"
        )
