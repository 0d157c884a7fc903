"""Part feed: pictures a second of the loader, against what the steps of part step take."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from arat_dist.config import DataConfig
from arat_dist.data.loader import train_loader
from arat_dist.data.order import SampleOrder

from .journal import Journal, WrongError, read_lines
from .pictures import cifar_or_digits, photographs
from .settings import Settings

CORES = (4, 8, 16)


class Feed(NamedTuple):
    """Pictures of one kind, and the model of part step that eats such."""

    image_size: int
    augment: str
    eater: str


SMALL, LARGE = Feed(32, "pad_crop", "cifar_resnet18"), Feed(224, "random_resized_crop", "resnet50")


def run(settings: Settings, journal: Journal) -> None:
    """Small pictures first: part train is fed with them. Of the numbers of cores, all of the machine's first."""
    available = len(os.sched_getaffinity(0))
    cores = sorted({min(count, available) for count in CORES}, reverse=True)
    journal.run("make pictures", partial(_make, settings), limit_s=50)
    for feed in (SMALL, LARGE):
        for count in cores:
            for loader in loaders():
                name = f"{feed.image_size} px, {count} cores, {loader}"
                journal.run(name, partial(measure, feed, count, loader, settings), limit_s=30)


def loaders() -> list[str]:
    """The loaders that can be had here: torchvision's everywhere, FFCV's where it is installed."""
    with suppress(ImportError):
        if importlib.util.find_spec("ffcv") is not None:
            return ["ffcv", "torchvision"]
    return ["torchvision"]


def _make(settings: Settings) -> dict[str, Any]:
    sets = cifar_or_digits(settings.archive, settings.scratch)
    photographs(settings.scratch, _num_photographs(settings))
    return {"pictures": sets.name}


def _num_photographs(settings: Settings) -> int:
    return 32 if settings.small else 512


def measure(feed: Feed, cores: int, loader: str, settings: Settings) -> dict[str, Any]:
    """Pictures a second with a thread or a process for each core, on these cores alone."""
    if feed is SMALL:
        path = cifar_or_digits(settings.archive, settings.scratch).train
    else:
        path = photographs(settings.scratch, _num_photographs(settings))
    batch_size, seconds = (16, 0.5) if settings.small else (128, 3.0)
    with only_cores(cores):
        rate = pictures_per_second(_config(feed, path, loader, cores), batch_size, seconds, num_ahead=2 * cores)
    eaten = eaten_by(feed.eater, settings.out / "step.jsonl")
    return {
        "image_size": feed.image_size,
        "cores": cores,
        "loader": loader,
        "images_per_second": rate,
        "eater": feed.eater,
        "eaten_per_second": eaten,
        "keeps_up": eaten and rate / eaten,
    }


def _config(feed: Feed, path: Path, loader: str, threads: int) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": str(path),
            "val": str(path),
            "num_classes": 2,
            "image_size": feed.image_size,
            "augment": feed.augment,
            "loader": loader,
            "loader_threads": threads,
        }
    )


def pictures_per_second(data: DataConfig, batch_size: int, seconds: float, *, num_ahead: int) -> float:
    """The rate of full batches, once those are gone that were made while the first was waited for.

    Args:
        data: what is loaded, and by what.
        batch_size: pictures of a batch.
        seconds: about how long it may take.
        num_ahead: batches that may have been made ahead.
    """
    with train_loader(data, 0, batch_size) as loader:
        order = SampleOrder(loader.num_samples, batch_size, epochs=10_000, seed=0)
        times: list[float] = []
        for batch in loader.iterate(order.shares(0, 1, 0, order.num_steps - 2)):
            if len(batch.labels) != batch_size or batch.images.shape[-1] != data.image_size:
                raise WrongError(f"a batch of {tuple(batch.images.shape)}")
            times.append(time.perf_counter())
            counted = times[num_ahead:]
            if len(counted) > 2 and counted[-1] - counted[0] > seconds:
                return batch_size * (len(counted) - 1) / (counted[-1] - counted[0])
    raise WrongError("the loader came to an end")


def eaten_by(model: str, journal: Path) -> float | None:
    """Pictures a second of the model's fastest step in part step; None where none was measured."""
    lines = [line for line in read_lines(journal) if line["status"] == "ok" and line.get("name") == model]
    return max((line["images_per_second"] for line in lines if "images_per_second" in line), default=None)


@contextmanager
def only_cores(count: int) -> Iterator[None]:
    """So many cores for this process and those that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
