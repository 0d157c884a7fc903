"""ARREST's clean start: what is trained before the run, once, and what is refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import tiny_overrides

from arat_dist.checkpoint import load_newest
from arat_dist.config import ARRESTConfig, LBGATConfig
from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError
from arat_dist.recipe import load_recipe, parse_recipe, recipe_names
from arat_dist.run import Run
from launcher.fit import clean_recipe, clean_start, fit, with_absolute_paths


def load(digits, storage, **keys):
    overrides = tiny_overrides(digits, storage) | {"objective.name": "arrest", "cluster.workers": "0"}
    overrides |= {key.replace("__", "."): value for key, value in keys.items()}
    for key in [key for key in overrides if key.startswith("objective.") and key.endswith(("gamma", "taps"))]:
        del overrides[key]
    return load_recipe("digits", list(overrides.items()))


def ignore(_: object) -> None:
    """Take a line and do nothing."""


def test_the_frozen_net_is_the_clean_one_that_was_trained_first(digits, tmp_path):
    recipe = load(digits, tmp_path, objective__clean_epochs="2", optim__warmup_epochs="0")
    summary = fit(recipe, "one", ignore)
    clean = json.loads((tmp_path / "one-clean/summary.json").read_text())
    assert (summary["objective"], clean["objective"], clean["epochs"]) == ("arrest", "standard", 2)
    exported = load_file(tmp_path / "one-clean/export/model.safetensors")
    checkpoint = load_newest(Run(str(tmp_path), "one").checkpoints)
    assert checkpoint is not None
    weights = checkpoint.weights["model"]
    assert all(torch.equal(weights[f"teacher.backbone.{name}"], value) for name, value in exported.items())
    assert not torch.equal(weights["classifier.backbone.fc.weight"], exported["fc.weight"])
    # Taken up again, it asks for no start; another run of that name is no start.
    assert clean_start(recipe, Run(str(tmp_path), "one")) is None
    other = load(digits, tmp_path, objective__clean_epochs="3", optim__warmup_epochs="0")
    Path(tmp_path / "two-clean").symlink_to(tmp_path / "one-clean")
    with pytest.raises(UserError, match="two-clean: the run of this name has another recipe"):
        fit(other, "two", ignore)
    assert not (tmp_path / "two").exists()


def test_a_first_save_that_broke_off_is_nothing_to_go_on_from(digits, tmp_path):
    """The run still needs its clean start: without it, it would begin with weights that nobody has trained."""
    recipe, run = load(digits, tmp_path), Run(str(tmp_path), "one")
    (run.checkpoints / "step_00000004").write("model.safetensors", b"half")
    start = clean_start(recipe, run)
    assert start is not None
    assert start[1].name == "one-clean"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("_arrest")])
def test_the_clean_start_of_a_shipped_recipe_keeps_its_schedule_in_proportion(name):
    recipe = load_recipe(name)
    assert isinstance(recipe.objective, ARRESTConfig)
    clean = clean_recipe(recipe, recipe.objective)
    assert (clean.objective.name, clean.train.epochs, clean.optim.milestones) == ("standard", 30, (22.5, 27))
    assert parse_recipe(clean.model_dump(mode="json")) == clean


def test_the_clean_start_sees_the_sizes_of_pictures_in_proportion(digits, tmp_path):
    keys = {"data__augment": "random_resized_crop", "data__image_sizes_from": "[[0, 16], [5, 24]]"}
    recipe = load(digits, tmp_path, train__epochs="10", objective__clean_epochs="4", **keys)
    assert isinstance(recipe.objective, ARRESTConfig)
    clean = clean_recipe(recipe, recipe.objective)
    assert clean.data.image_sizes_from == ((0, 16), (2, 24))


def test_storage_elsewhere_needs_a_start_by_hand(digits, tmp_path):
    recipe = load(digits, tmp_path, cluster__storage="memory://arrest", track__mlflow="false")
    with pytest.raises(UserError, match=r"^model\.checkpoint: missing: with cluster\.storage memory://arrest"):
        fit(recipe, "one", ignore)
    assert not Run("memory://arrest", "one").folder.exists("recipe.yaml")


def test_workers_find_a_teachers_weights(digits, tmp_path):
    keys = {"objective__name": "lbgat", "objective__teacher": "{name: resnet10t, checkpoint: t.safetensors}"}
    recipe = with_absolute_paths(load(digits, tmp_path, **keys))
    assert isinstance(recipe.objective, LBGATConfig)
    assert recipe.objective.teacher is not None
    assert recipe.objective.teacher.checkpoint == str(Path("t.safetensors").absolute())


def test_a_second_start_of_a_run_that_is_at_work_leaves_its_files_alone(digits, tmp_path):
    run = Run(str(tmp_path), "one")
    recipe = load(digits, tmp_path, objective__name="at", cluster__max_failures="7")
    other = load(digits, tmp_path, objective__name="at", cluster__max_failures="8")
    with run.locked():
        run.open(recipe, load_manifest(recipe.data.train).sha256)
        files = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
        with pytest.raises(UserError, match="another process trains this run"):
            fit(other, "one", ignore)
        assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == files


def test_the_summary_is_there_before_another_process_may_take_the_run(digits, tmp_path, monkeypatch):
    locked = Run.locked
    seen: list[bool] = []

    @contextmanager
    def watching(self: Run) -> Iterator[None]:
        with locked(self):
            yield
            seen.append(self.folder.exists("summary.json"))

    monkeypatch.setattr(Run, "locked", watching)
    fit(load(digits, tmp_path, objective__name="at", train__max_steps="1"), "one", ignore)
    assert seen == [True]
