"""`arat bench data`: pictures a second of both loaders, of FFCV's own and of plain torchvision.

All take the same pictures (a .beton of them, or the files), cut random boxes, mirror half of them, and yield uint8
batches in host memory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from arat_dist.data.beton import BetonLoader
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.fallback import FallbackLoader
from arat_dist.data.ffcv_import import (
    IntDecoder,
    Loader,
    OrderOption,
    RandomHorizontalFlip,
    RandomResizedCropRGBImageDecoder,
    ToTensor,
)
from arat_dist.data.order import SampleOrder
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError

OnProgress = Callable[[str], None]
LOADERS = {
    "ffcv": "FFCV's decoder, our order and crops",
    "ffcv_unseeded": "FFCV's own loader, unseeded",
    "fallback": "torchvision's decoder, our order and crops",
    "torchvision": "torchvision's ImageFolder",
}
"""What is compared."""
_STEP = 1.25
"""Length of the pretended step, in batches of FFCV's speed: a loader that keeps up never lets it wait."""
_FIRST_BATCH = """
import sys
import numpy as np
from arat_dist.data.beton import BetonLoader
path, side, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with BetonLoader(path, batch_size=count, image_size=side, augment="random_resized_crop", flip=True) as loader:
    next(iter(loader.iterate([np.arange(count)])))
"""


def bench_data(
    folder: Path, *, image_size: int, batch_size: int, cores: int, repeats: int, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure the loaders in turn, `repeats` times, each with as many threads or processes as `cores`.

    Args:
        folder: pictures in class folders.
        image_size: side of the pictures that come out, in pixels.
        batch_size: pictures of a batch.
        cores: processor cores that everything here may use.
        repeats: rounds, each an epoch of every loader; figures are medians of them.
        on_progress: told what comes next.

    Returns:
        The JSON object of `arat bench data`.

    Raises:
        UserError: fewer cores or fewer pictures than asked for or needed.
    """
    available = sorted(os.sched_getaffinity(0))
    if cores > len(available):
        raise UserError(f"--cores: {cores}: this process may use {len(available)}")
    source = open_source(f"folder:{folder}")
    needed = 6 * cores * batch_size
    if len(source) < needed:
        raise UserError(
            f"{folder}: {len(source):,} pictures; {needed:,} are needed for {cores} cores and batches of {batch_size}"
        )
    with ExitStack() as stack:
        stack.enter_context(_pinned(available[:cores]))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        beton = scratch / "bench.beton"
        on_progress(f"writing {len(source)} pictures")
        write_beton(source, beton, num_workers=cores)
        loaders = _Loaders(stack, folder, beton, image_size, batch_size, cores)
        for name, epoch in loaders.epochs.items():
            on_progress(f"warming up: {name}")
            _rate(epoch(), batch_size, cores)
        rates: dict[str, list[float]] = {name: [] for name in loaders.epochs}
        for i in range(repeats):
            on_progress(f"round {i + 1} of {repeats}")
            for name in list(rates)[:: -1 if i % 2 else 1]:
                rates[name].append(_rate(loaders.epochs[name](), batch_size, cores))
        step_s = _STEP * batch_size / statistics.median(rates["ffcv"])
        on_progress("waiting")
        waits = {name: _wait_fraction(epoch(), step_s) for name, epoch in loaders.epochs.items()}
        on_progress("first batch of a new process")
        first = [_first_batch_s(beton, image_size, batch_size, os.environ) for _ in range(3)]
        cold = _first_batch_s(beton, image_size, batch_size, {**os.environ, "NUMBA_CACHE_DIR": str(scratch / "numba")})

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    return {
        "pictures": len(source),
        "image_size": image_size,
        "batch_size": batch_size,
        "cores": cores,
        "repeats": repeats,
        "images_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "ratio_ffcv_torchvision": ratio("ffcv", "torchvision"),
        "ratio_fallback_torchvision": ratio("fallback", "torchvision"),
        "ratio_ffcv_ffcv_unseeded": ratio("ffcv", "ffcv_unseeded"),
        "step_ms": 1000 * step_s,
        "wait_fraction": waits,
        "first_batch_s": statistics.median(first),
        "first_batch_uncached_s": cold,
    }


class _Loaders:
    """What is compared: functions that begin an epoch of each."""

    def __init__(self, stack: ExitStack, folder: Path, beton: Path, side: int, batch_size: int, cores: int) -> None:
        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "image_size": side,
            "augment": "random_resized_crop",
            "flip": True,
            "threads": cores,
        }
        self._ffcv = stack.enter_context(BetonLoader(beton, **settings))
        self._fallback = stack.enter_context(FallbackLoader(beton, **settings))
        self._order = SampleOrder(self._ffcv.num_samples, batch_size, epochs=10_000, seed=0)
        self._epoch = 0
        plain = v2.Compose(
            [v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()],
        )
        torchvision = DataLoader(
            ImageFolder(str(folder), plain),
            batch_size,
            shuffle=True,
            num_workers=cores,
            drop_last=True,
        )
        own = Loader(
            str(beton),
            batch_size=batch_size,
            num_workers=cores,
            order=OrderOption.RANDOM,
            drop_last=True,
            pipelines={
                "image": [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor()],
                "label": [IntDecoder(), ToTensor()],
            },
        )
        self.epochs: dict[str, Callable[[], Iterable[Any]]] = {
            "ffcv": lambda: self._ffcv.iterate(self._next_shares()),
            "fallback": lambda: self._fallback.iterate(self._next_shares()),
            "torchvision": lambda: torchvision,
            "ffcv_unseeded": lambda: own,
        }

    def _next_shares(self) -> Any:
        """The full batches of another epoch."""
        num_batches = self._ffcv.num_samples // self._order.batch_size
        start = self._epoch * num_batches
        self._epoch += 1
        return self._order.shares(0, 1, start, start + num_batches)


@contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """Only these cores for this process and those that it starts."""
    before, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(num_threads)


def _rate(batches: Iterable[Any], batch_size: int, cores: int) -> float:
    """Pictures a second of full batches, once those are gone that were begun before the first was there."""
    times = [time.perf_counter() for _ in batches][2 * cores :]
    return batch_size * (len(times) - 1) / (times[-1] - times[0])


def _wait_fraction(batches: Iterable[Any], step_s: float) -> float:
    """Share of an epoch that a step of so many seconds, which needs no core of this machine, waits for its batches."""
    waited, begin = 0.0, None
    asked = time.perf_counter()
    for _ in batches:
        now = time.perf_counter()
        if begin is None:
            begin = now
        else:
            waited += now - asked
        time.sleep(step_s)
        asked = time.perf_counter()
    assert begin is not None
    return waited / (asked - begin)


def _first_batch_s(beton: Path, side: int, batch_size: int, env: Any) -> float:
    """Seconds from the start of a new process to its first batch."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", _FIRST_BATCH, str(beton), str(side), str(batch_size)]
    subprocess.run(command, check=True, env=env)  # noqa: S603 - this interpreter, and text of this file
    return time.perf_counter() - begin
