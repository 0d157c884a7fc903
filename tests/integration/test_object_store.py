"""Runs in an object store, over S3's own protocol: nothing of a run is on a disk that workers share."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import object_store
from small import Recovery, marked_processes, tiny_overrides

from arat_dist.checkpoint import load_newest
from arat_dist.config import ClusterConfig
from arat_dist.errors import UserError
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from launcher.cluster import connect, disconnect
from launcher.evaluate import Wanted, evaluate_target
from launcher.fit import fit

STORAGE = "s3://runs-of-arat/runs"
STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def _store_and_ray(tmp_path_factory) -> Iterator[None]:
    """Ray starts within the store's environment: so do its workers."""
    with (
        pytest.MonkeyPatch.context() as patch,
        object_store(tmp_path_factory.mktemp("s3"), "runs-of-arat") as environment,
    ):
        for name, value in {**environment, "RAY_ADDRESS": "127.0.0.1:9"}.items():
            patch.setenv(name, value)
        connect(ClusterConfig(workers=2))
        yield
        disconnect()


def train(digits: Path, storage: str, name: str, on_line: Any) -> dict[str, Any]:
    keys = {"cluster.workers": "2", "train.max_steps": str(STEPS), "train.checkpoint_every": "4"}
    overrides = tiny_overrides(digits, Path(storage)) | keys | {"cluster.storage": storage}
    return fit(load_recipe("digits", list(overrides.items())), name, on_line)


@pytest.mark.failure("a worker is killed, all of the run in an object store (S3)")
def test_a_run_in_an_object_store_survives_a_worker_and_refuses_a_second_start(digits, tmp_path, record_property):
    train(digits, str(tmp_path), "calm", lambda _: None)
    calm, run = Run(str(tmp_path), "calm"), Run(STORAGE, "one")
    killed, refused, recovery = [], [], Recovery(lambda: run.num_attempts())

    def interfere(line: dict[str, Any]) -> None:
        if line["step"] >= 8 and not killed:
            killed.append(max(marked_processes("ray::RayTrainWorker")))
            recovery.begin()
            os.kill(killed[0], signal.SIGKILL)
            with pytest.raises(UserError, match="another process trains this run"):
                train(digits, STORAGE, "one", lambda _: None)
            refused.append(line["step"])

    summary = train(digits, STORAGE, "one", interfere)
    assert len(killed) == len(refused) == 1
    assert (summary["restarts"], summary["steps"]) == (1, STEPS)
    ours, theirs = load_newest(run.checkpoints), load_newest(calm.checkpoints)
    assert ours is not None
    assert theirs is not None
    assert summary["checkpoint"] == f"{STORAGE}/one/checkpoints/step_{STEPS:08d}"
    assert [k for k, v in theirs.weights["model"].items() if not torch.equal(v, ours.weights["model"][k])] == []
    assert [(line["step"], line["loss"]) for line in run.metrics()] == [
        (line["step"], line["loss"]) for line in calm.metrics()
    ]
    recovery.note(record_property)


def test_such_a_run_is_evaluated_where_it_is(digits):
    summary = json.loads(Run(STORAGE, "one").folder.read("summary.json"))
    scores = evaluate_target(Wanted(f"{STORAGE}/one"), 0)
    assert scores["clean_accuracy"] == summary["clean_accuracy"]
