"""Small data sets, written once for all tests of this folder."""

from pathlib import Path

import numpy as np
import pytest
from beton_pictures import Pictures, smooth_picture


@pytest.fixture(scope="session")
def small() -> Pictures:
    """37 random pictures of 32x32: stored raw."""
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (37, 32, 32, 3), dtype=np.uint8))
    return Pictures(pictures, [i % 3 for i in range(37)])


@pytest.fixture(scope="session")
def small_beton(small: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from arat_dist.data.beton_writer import write_beton

    path = tmp_path_factory.mktemp("small") / "small.beton"
    write_beton(small, path)
    return path


@pytest.fixture(scope="session")
def large() -> Pictures:
    """13 smooth pictures of many shapes, some of them extreme: stored as JPEG."""
    rng = np.random.default_rng(1)
    shapes = [(200, 150), (150, 200), (300, 140), (160, 160), (131, 400), (400, 60), (256, 256)]
    pictures = [smooth_picture(rng, *shapes[i % len(shapes)]) for i in range(13)]
    return Pictures(pictures, [i % 3 for i in range(13)])


@pytest.fixture(scope="session")
def large_beton(large: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from arat_dist.data.beton_writer import write_beton

    path = tmp_path_factory.mktemp("large") / "large.beton"
    write_beton(large, path)
    return path
