"""What ranks say to each other is on the GPU: nccl knows no tensors of the host. The group is torch's pretended one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_gpu import GPU
from fake_training import FakeTraining, Sections, small_recipe
from test_fake_step import net
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import Watch

from arat_dist.averaging import MeasuredNorms
from arat_dist.data.manifest import Manifest
from arat_dist.engine import Rank, averaged_statistics
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.stages import Runner
from arat_dist.metrics import MetricsLog
from arat_dist.run import Run
from arat_dist.saving import Saver, capture
from arat_dist.train import check_agreement, diagnose

FIRST_OF_TWO = Rank(0, 2, GPU)
MANIFEST = Manifest.model_construct(sha256="a" * 64)
NETS: dict[str, Sections] = {
    "BatchNorms": {},
    "BatchNorms unsplit": {"objective": {"name": "trades"}},
    "no BatchNorm": net("vit_tiny_patch16_224", split_norm="layer"),
    "no BatchNorm unsplit": net("vit_tiny_patch16_224") | {"objective": {"name": "trades"}},
}


def log_line(training: FakeTraining, folder: Path) -> None:
    log = MetricsLog(Run(str(folder), "one"), FIRST_OF_TWO)
    log.add(result := training.step())
    log.state()
    log.write(1, 0.5, 0.1, result.gradient_norm)


def checkpoint(training: FakeTraining, folder: Path) -> None:
    assert capture(1, training.engine, training.averages, FIRST_OF_TWO, {}, {}) is not None


def end_of_saves(training: FakeTraining, folder: Path) -> None:
    Saver(Run(str(folder), "one").checkpoints, keep=1, check=lambda: None).finish(FIRST_OF_TWO)


def mean_statistics(training: FakeTraining, folder: Path) -> None:
    with averaged_statistics(training.objective, FIRST_OF_TWO):
        pass


def diagnostics(training: FakeTraining, folder: Path) -> None:
    out = training.engine(*training.begin_step()[0])
    diagnose(training.objective, out.terms, 1.0, FIRST_OF_TWO)


def measured_norms(training: FakeTraining, folder: Path) -> None:
    with MeasuredNorms(training.averages["ema"].classifier) as norms:
        norms.write(FIRST_OF_TWO)


def evaluation(training: FakeTraining, folder: Path) -> None:
    loader: Any = None
    Runner(loader, Ledger(None), FIRST_OF_TWO, batch_size=8)._shared(np.zeros((2, 3), np.int64))


TALKS: dict[str, Callable[[FakeTraining, Path], None]] = {
    "checkpoint": checkpoint,
    "mean statistics": mean_statistics,
    "end of an epoch": lambda training, folder: training.objective.end_epoch(FIRST_OF_TWO.all_reduce),
    "log line": log_line,
    "agreement at the start": lambda training, folder: check_agreement(3, MANIFEST, FIRST_OF_TWO),
    "end of the saves": end_of_saves,
    "diagnostics": diagnostics,
    "measured norms": measured_norms,
    "evaluation": evaluation,
}


@contextmanager
def group() -> Iterator[None]:
    """Two ranks, this one alone real, whose group takes what is on a GPU and nothing else."""
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


@cache
def training_of(name: str) -> FakeTraining:
    """One for all that its ranks have to say, after a step."""
    sections = NETS[name]
    training = FakeTraining(small_recipe({**sections, "train": {"ema_decay": 0.9}}))
    training.step()
    return training


def talk(net_name: str, name: str, folder: Path) -> None:
    with Watch(), group():
        TALKS[name](training_of(net_name), folder)


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("net_name", NETS)
def test_ranks_share_nothing_of_the_host(on_fake_gpu, net_name, name, tmp_path):
    on_fake_gpu(talk, net_name, name, tmp_path)


def synced_step() -> list[str]:
    with Watch() as watch, group():
        training = FakeTraining(small_recipe({"train": {"sync_norms": True}}))
        watch.found.waits.clear()
        training.step()
    return watch.found.waits


def test_norms_are_synchronised_without_a_wait(on_fake_gpu):
    assert on_fake_gpu(synced_step) == []


def say_on_host() -> None:
    with Watch(), group():
        dist.all_reduce(torch.zeros(3))


def test_the_group_refuses_what_is_on_the_host(on_fake_gpu):
    with pytest.raises(RuntimeError, match="cpu"):
        on_fake_gpu(say_on_host)
