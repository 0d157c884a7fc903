"""The bench of the loaders, on a handful of pictures: it runs, its figures belong together, and it leaves nothing."""

import os
import threading
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arat_dist.bench.data import LOADERS, bench_data
from arat_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """48 pictures of two classes."""
    generator = np.random.default_rng(0)
    for i in range(48):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (180, 150, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


def test_all_loaders_are_measured(folder: Path):
    cores, threads = os.sched_getaffinity(0), threading.active_count()
    result = bench_data(folder, image_size=32, batch_size=8, cores=1, repeats=2, on_progress=lambda _: None)
    assert result["pictures"] == 48
    assert set(result["images_per_second"]) == set(result["wait_fraction"]) == set(LOADERS)
    assert min(result["images_per_second"].values()) > 0
    assert all(0 <= share <= 1 for share in result["wait_fraction"].values())
    assert result["step_ms"] == pytest.approx(1000 * 1.25 * 8 / result["images_per_second"]["ffcv"])

    assert min(value for key, value in result.items() if key.startswith("ratio_")) > 0
    assert min(result["first_batch_s"], result["first_batch_uncached_s"]) > 0
    assert os.sched_getaffinity(0) == cores
    assert threading.active_count() <= threads + 1  # FFCV's own waits for its memory in one that it never ends
    assert not active_children()


def test_what_it_can_not_do(folder: Path):
    with pytest.raises(UserError, match=r"^--cores: 999: this process may use \d+$"):
        bench_data(folder, image_size=32, batch_size=8, cores=999, repeats=1, on_progress=print)
    with pytest.raises(UserError, match=r"48 pictures; 54 are needed for 1 cores and batches of 9$"):
        bench_data(folder, image_size=32, batch_size=9, cores=1, repeats=1, on_progress=print)
