"""Several workers under Ray: the same results as in one process, every recipe takes a step, and a dead worker is
replaced."""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from small import MARK, NoisePictures, tiny_overrides

from arat_dist.config import ClusterConfig, Recipe
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import Rank
from arat_dist.errors import ClusterError, StoppedError, UserError, WorkersError
from arat_dist.preflight import check_recipe
from arat_dist.recipe import load_recipe, recipe_names
from arat_dist.run import Run
from arat_dist.train import train
from launcher.cluster import connect, disconnect, run_workers
from launcher.evaluate import Wanted, evaluate_target
from launcher.fit import fit

RECIPES = [name for name in recipe_names() if "/" not in name or name.startswith("paper/cifar10_resnet18")]
TWO = ClusterConfig(workers=2)
PARTS = {
    "at": ["adv"],
    "trades": ["clean", "kl"],
    "mart": ["adv", "kl"],
    "lbgat": ["guide", "teacher"],
    "arrest": ["adv", "angle"],
    "arat": ["adv", "clean", "invariance"],
}
"""The named parts of each method's loss."""


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all tests of the file: its own, whatever the environment says of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:9")
        connect(TWO)
    yield
    disconnect()


def test_a_ray_of_our_own_is_not_reachable_from_other_machines():
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


def listen_where(folder: Path, mark: str, rank: Rank) -> None:
    """Write down all addresses at which processes of these tests listen while there are two workers."""
    import psutil

    rank.all_reduce(torch.ones(1))
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ARAT_TEST_SESSION") == mark:
                found |= {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    (folder / str(rank.index)).write_text("\n".join(found))
    rank.all_reduce(torch.ones(1))


def test_workers_of_this_machine_are_not_reachable_from_others(tmp_path):
    cluster = TWO.model_copy(update={"storage": str(tmp_path)})
    run_workers(partial(by_value(listen_where), tmp_path, os.environ[MARK]), cluster, "listening")
    found = {address for index in "01" for address in (tmp_path / index).read_text().split()}
    assert "127.0.0.1" in found
    assert {address.removeprefix("::ffff:") for address in found} <= {"127.0.0.1", "::1"}


# One result at two workers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """A run of two workers: its summary, its folder, the lines that were seen while it ran."""
    storage = tmp_path_factory.mktemp("trained")
    overrides = tiny_overrides(digits, storage) | {"cluster.workers": "2", "track.mlflow": "true"}
    overrides["data.stage_to"] = str(storage / "local")
    del overrides["eval.limit"]
    seen: list[dict[str, Any]] = []
    summary = fit(load_recipe("digits", list(overrides.items())), "two", seen.append)
    return summary, storage / "two", seen


def test_two_workers_train_and_count_every_picture_once(trained):
    summary, folder, seen = trained
    assert (summary["world_size"], summary["steps"], summary["samples_seen"]) == (2, 6, 6 * 32)
    assert summary["num_samples"] == 360
    assert summary["restarts"] == 0
    assert summary == json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert seen == lines


def test_two_workers_read_copies_of_the_sets(trained, digits):
    _, folder, _ = trained
    copies = {path.name: path.read_bytes() for path in (folder.parent / "local").glob("*.beton")}
    sets = [digits / f"{name}.beton" for name in ("train", "val")]
    assert copies == {f"{load_manifest(path).sha256}.beton": path.read_bytes() for path in sets}


def test_an_evaluation_copies_on_workers_alone(trained, tmp_path, monkeypatch):
    _, folder, _ = trained
    here = Rank(0, 1, torch.device("cpu"))  # what a worker would do, without the wait for one
    monkeypatch.setattr("launcher.evaluate.run_workers", lambda work, *_: work(here))
    write_beton(NoisePictures(10), tmp_path / "noise.beton")
    copy = folder.parent / "local" / f"{load_manifest(tmp_path / 'noise.beton').sha256}.beton"
    for workers in (0, 1):
        noise, out = str(tmp_path / "noise.beton"), str(tmp_path / f"out{workers}")
        result = evaluate_target(Wanted(str(folder), val=noise, changes={"attack": "none"}, out=out), workers)
        assert result["num_samples"] == 10
        assert copy.exists() == bool(workers)


def test_mlflow_mirrors_the_last_line(trained):
    summary, folder, _ = trained
    run = MlflowClient(summary["mlflow_tracking_uri"]).get_run(summary["mlflow_run_id"])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert run.data.metrics["loss"] == last["loss"]
    assert run.data.metrics["val_clean_accuracy"] == summary["clean_accuracy"]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch_size"] == "32"


def test_ray_keeps_no_checkpoints_of_its_own(trained):
    _, folder, _ = trained
    left = [path for path in (folder.parent / ".ray").rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix in (".pt", ".safetensors", ".pkl") or path.stat().st_size > 1e5] == []
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000006"]


def test_two_workers_count_what_one_process_counts(trained, tmp_path):
    """Clean verdicts are exactly those of one process; so are the attacked ones, whose starts hang on the picture."""
    summary, folder, _ = trained
    # An odd number and a small batch: unequal shares, and a last batch that isn't full.
    changes = {"attack": "pgd2", "limit": 151, "batch_size": 16}
    one, two = (
        evaluate_target(Wanted(str(folder), changes=changes, out=str(tmp_path / str(workers))), workers)
        for workers in (0, 2)
    )
    counts = [tuple(round(result[key] * 151) for key in ("clean_accuracy", "robust_accuracy")) for result in (one, two)]
    assert one["num_samples"] == two["num_samples"] == 151
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < 151, "a net that is always or never right counts nothing"
    whole = evaluate_target(Wanted(str(folder), out=str(tmp_path)), 0)
    assert whole["clean_accuracy"] == summary["clean_accuracy"]


# Every recipe -------------------------------------------------------------------------------------------------------


def shrink(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe in all that makes it this one, at a size for a small machine."""
    # Strides and the number of taps keep their meaning at these sizes, patches of 16 included.
    side = min(64, recipe.data.image_size)
    sizes: dict[str, Any] = {
        "data.image_size": side,
        "data.train": f"{folder}/{recipe.data.num_classes}x{side}.beton",
        "data.val": f"{folder}/{recipe.data.num_classes}x{side}.beton",
        "data.loader_threads": 1,
        "model.pretrained": False,
        "attack.steps": 1,
        "train.global_batch_size": 8,
        "train.swa_start_epoch": recipe.train.swa_start_epoch and 0,
        "train.max_steps": 1,
        "train.log_every": 1,
        "eval.attack": "none",
        "eval.limit": 4,
        "track.mlflow": False,
        "cluster.workers": 2,
        "cluster.cpus_per_worker": 1,
        "cluster.gpus_per_worker": 0,
        "cluster.storage": str(folder / "runs"),
    }
    tree = recipe.model_dump(mode="json")
    for key, value in sizes.items():
        section, name = key.split(".")
        tree[section][name] = value
    return Recipe.model_validate(tree)


def train_each(recipes: dict[str, Recipe], rank: Rank) -> dict[str, Any]:
    """Summary by recipe, or the error: one worker group for all, since starting one takes the most time."""
    results: dict[str, Any] = {}
    for name, recipe in recipes.items():
        try:
            results[name] = train(recipe, Run(recipe.cluster.storage, name.replace("/", "-")), rank)
        except Exception as error:
            logging.getLogger("arat_dist").exception("%s", name)
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory) -> dict[str, Recipe]:
    folder = tmp_path_factory.mktemp("recipes")
    recipes = {name: shrink(load_recipe(name), folder) for name in RECIPES}
    for recipe in recipes.values():
        if not Path(recipe.data.train).exists():
            write_beton(NoisePictures(recipe.data.num_classes, recipe.data.image_size), recipe.data.train)
    return recipes


@pytest.fixture(scope="module")
def stepped(shrunk, tmp_path_factory) -> dict[str, Any]:
    for recipe in shrunk.values():
        check_recipe(recipe)
    # By value: workers can't import this file.
    cluster = TWO.model_copy(update={"storage": str(tmp_path_factory.mktemp("stepped"))})
    return run_workers(partial(by_value(train_each), shrunk), cluster, "recipes")


def by_value(function: Any) -> Any:
    """Have Ray send this file's functions as code."""
    # Ray reads the settings that `connect` makes when it is imported.
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return function


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_a_step_on_two_workers(name, shrunk, stepped):
    summary = stepped[name]
    assert isinstance(summary, dict), summary
    assert (summary["steps"], summary["samples_seen"], summary["world_size"], summary["num_samples"]) == (1, 8, 2, 4)
    assert all(value >= 0 for value in summary["losses"].values())
    assert summary["losses"].keys() == {"loss", *PARTS[shrunk[name].objective.name]}


# Failures -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_without_restarts(digits, tmp_path):
    overrides = tiny_overrides(digits, tmp_path) | {
        "cluster.workers": "2",
        "cluster.max_failures": "2",
        "optim.lr": "1e30",
        "train.max_steps": "30",
    }
    with pytest.raises(FloatingPointError, match=r"^step \d+: the gradient has been no number in 10 steps in a row"):
        fit(load_recipe("digits", list(overrides.items())), "diverged", ignore)
    run = Run(str(tmp_path), "diverged")
    assert run.num_attempts() == 2, "back to the newest checkpoint, or the beginning, once"
    assert run.summary() == {}


def ignore(_: object) -> None:
    """Take a line and do nothing."""


def fail_on_the_second(rank: Rank) -> None:
    if rank.index == 1:
        raise LookupError("no such thing")


def test_a_workers_own_error_reaches_the_user(tmp_path):
    cluster = ClusterConfig(workers=2, max_failures=0, storage=str(tmp_path))
    with pytest.raises(WorkersError) as raised:
        run_workers(by_value(fail_on_the_second), cluster, "failing")
    assert str(raised.value) == "the work failed on worker 1: LookupError: no such thing"
    assert "fail_on_the_second" in raised.value.tracebacks


def find_a_full_disk(rank: Rank) -> None:
    """The second rank can't go on; the first one waits for it in a collective."""
    logging.getLogger("arat_dist").warning("attempt of %d", rank.index)
    if rank.index == 1:
        raise UserError("data.stage_to: /disk: full")
    rank.all_reduce(torch.ones(1))


def test_what_the_user_has_to_put_right_ends_the_run_though_one_worker_alone_meets_it(tmp_path, capfd):
    cluster = ClusterConfig(workers=2, max_failures=3, storage=str(tmp_path))
    with pytest.raises(UserError, match=r"^data\.stage_to: /disk: full$"):
        run_workers(by_value(find_a_full_disk), cluster, "full")
    said = "".join(capfd.readouterr())
    assert said.count("attempt of 1") == 1
    assert "Traceback" not in said


def work_until_stopped(started: Path, rank: Rank) -> None:
    """Count the rounds, of a twentieth of a second, until any rank is asked to stop."""
    started.touch()
    pause = threading.Event()
    for done in range(1, 10_000):
        pause.wait(0.05)
        if rank.all_reduce(torch.tensor([float(rank.stop_wanted())])).item():
            raise StoppedError(done)


def set_when_there(stop: threading.Event, file: Path) -> None:
    """Set the event once a file is there."""
    pause = threading.Event()
    while not file.exists():
        pause.wait(0.1)
    stop.set()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_work_stops_when_it_is_asked_to(workers, tmp_path):
    stop, started = threading.Event(), tmp_path / "started"
    threading.Thread(target=set_when_there, args=(stop, started), daemon=True).start()
    cluster = ClusterConfig(workers=workers, max_failures=0, storage=str(tmp_path))
    with pytest.raises(StoppedError) as stopped:
        run_workers(partial(by_value(work_until_stopped), started), cluster, "stopped", stop)
    assert stopped.value.step is not None
    assert stopped.value.step >= 1
    assert wishes() == []


def wishes() -> list[bytes]:
    """What drivers have left in Ray's store."""
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_list(b"stop/", namespace="arat")


def test_a_wish_to_stop_ends_the_wait_for_room(tmp_path):
    stop = threading.Event()
    stop.set()
    cluster = ClusterConfig(workers=2, placement="strict_spread", storage=str(tmp_path))
    with pytest.raises(StoppedError) as stopped:
        run_workers(by_value(place), cluster, "crowded", stop)
    assert stopped.value.step is None


@pytest.mark.parametrize("workers", [2, (2, 3)])
def test_workers_that_find_no_room_are_not_waited_for(workers, tmp_path):
    cluster = ClusterConfig(workers=workers, placement="strict_spread", start_timeout_s=3, storage=str(tmp_path))
    with pytest.raises(ClusterError) as raised:
        run_workers(by_value(place), cluster, "crowded")
    line = str(raised.value)
    assert line.startswith("cluster.workers: 2: of 1 CPU each (placement strict_spread): no room for them in 3 s")
    assert "\n" not in line


def place(rank: Rank) -> list[float]:
    """Index, machine and index on the machine of every rank, in turn."""
    all_ranks = torch.zeros(rank.world_size, 3)
    all_ranks[rank.index] = torch.tensor([rank.index, rank.node, rank.local_index])
    return rank.all_reduce(all_ranks).flatten().tolist()


def test_a_rank_knows_its_place_and_a_group_takes_the_room_there_is(tmp_path):
    cluster = ClusterConfig(workers=(1, 2), storage=str(tmp_path))
    assert run_workers(by_value(place), cluster, "elastic") == [0, 0, 0, 1, 0, 1]
