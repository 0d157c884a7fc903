"""A run's folder: whose recipe it is, and its metrics read while they are written."""

import json
from typing import Any

import pytest
from toys import Sets, toy_recipe

from arat_dist.errors import UserError
from arat_dist.run import METRICS, Run

SETS = Sets("train.beton", "val.beton")


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path) -> Run:
    return Run(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}", "one")


def test_a_run_comes_back_by_its_folder(run: Run):
    recipe = toy_recipe(SETS, attack={"eps": "4/255", "step_size": "1/255"})
    assert not run.folder.exists("recipe.yaml")
    run.open(recipe, "a" * 64)
    again = Run.at(run.folder.uri)
    assert again.name == "one"
    assert again.recipe() == recipe
    assert again.summary() == {}
    run.finish({"steps": 3})
    assert again.summary() == {"steps": 3}
    assert run.num_attempts() == 0
    run.begin_attempt(step=0)
    run.begin_attempt(step=5)
    assert again.num_attempts() == 2
    with pytest.raises(UserError, match="not a run"):
        Run.at(f"{run.storage.uri}/two")


def test_other_pictures_are_refused_wherever_they_lie(run: Run):
    run.open(toy_recipe(SETS), "a" * 64)
    run.open(toy_recipe(Sets("/moved/train.beton", "/moved/val.beton")), "a" * 64)
    with pytest.raises(UserError, match=r"^data\.train: .*not the pictures that the run one began with"):
        run.open(toy_recipe(SETS), "b" * 64)


def test_one_process_at_a_time_trains_a_run(tmp_path):
    first, second = Run(str(tmp_path), "one"), Run(str(tmp_path), "one")
    first.open(toy_recipe(SETS), "a" * 64)
    with (
        first.locked(),
        pytest.raises(UserError, match=r"^--name: one: another process trains this run"),
        second.locked(),
    ):
        pass
    with second.locked():
        pass


def test_a_storage_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(str(tmp_path / "file"), "one")
    assert run.summary() == {}
    with pytest.raises(UserError, match=r"^cluster\.storage: .*file: Not a directory$"):
        run.open(toy_recipe(SETS), "a" * 64)
    with pytest.raises(UserError, match=r"^cluster\.storage: .*file: Not a directory$"), run.locked():
        pass


def test_a_run_comes_back_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run("runs", "one").open(toy_recipe(SETS), "a" * 64)
    for known in ("one", "one/", "runs/one", "./runs/one"):
        assert Run.at(known).folder.uri == f"{tmp_path}/runs/one"
    for unknown in ("two", "/one", "runs", ""):
        with pytest.raises(UserError):
            Run.at(unknown)


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ({"optim": {"lr": 0.2}}, ["optim.lr"]),
        ({"attack": {"eps": 0.1}, "train": {"epochs": 9}}, ["attack.eps", "train.epochs"]),
        ({"objective": {"name": "at"}}, ["objective.name"]),
        ({"train": {"precision": "bf16"}}, ["train.precision"]),
        ({"train": {"seed": 5}}, ["train.seed"]),
        ({"train": {"ema_decay": 0.9}}, ["train.ema_decay"]),
        ({"model": {"args": {"channels": [16] * 4}}}, ["model.args"]),
        ({"data": {"flip": False}}, ["data.flip"]),
    ],
    ids=str,
)
def test_another_recipe_is_refused_by_its_keys(run: Run, changed: dict[str, Any], keys):
    run.open(toy_recipe(SETS), "a" * 64)
    before = run.folder.read("recipe.yaml")
    with pytest.raises(UserError) as caught:
        run.open(toy_recipe(SETS, **changed), "a" * 64)
    message = str(caught.value)
    assert f"differs in {', '.join(keys)})" in message
    assert "\n" not in message
    assert run.folder.read("recipe.yaml") == before


@pytest.mark.parametrize(
    "changed",
    [
        {"cluster": {"workers": 3, "max_failures": 9}},
        {"eval": {"attack": "pgd50"}},
        {"track": {"experiment": "other"}},
        {"data": {"stage_to": "/local/sets"}},
        {"train": {"log_every": 7, "checkpoint_every": 3, "keep_checkpoints": 5, "max_steps": 4}},
    ],
    ids=str,
)
def test_what_changes_no_weight_may_change(run: Run, changed):
    run.open(toy_recipe(SETS), "a" * 64)
    other = toy_recipe(SETS, **changed)
    run.open(other, "a" * 64)
    assert run.recipe() == other


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="plain folder name"):
        Run(str(tmp_path), name)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match=r"^cluster.storage: nosuch://x"):
        Run("nosuch://x", "one")


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, **more}


def test_lines_come_once_with_their_offsets_and_half_a_line_waits(run: Run):
    assert run.metrics() == []
    assert list(run.metrics_from(0)) == []
    for step in (2, 4):
        run.log(line(step))
    seen = list(run.metrics_from(0))
    assert [entry for entry, _ in seen] == run.metrics() == [line(2), line(4)]
    offset = seen[-1][1]
    assert list(run.metrics_from(offset)) == []
    assert [entry for entry, _ in run.metrics_from(seen[0][1])] == [line(4)]
    whole = json.dumps(line(6)).encode() + b"\n"
    run.folder.append(METRICS, whole[:9])
    assert list(run.metrics_from(offset)) == []
    assert run.metrics() == [line(2), line(4)]
    run.folder.append(METRICS, whole[9:])
    assert list(run.metrics_from(offset)) == [(line(6), offset + len(whole))]


def test_after_a_rewrite_reading_starts_again(run: Run):
    for step in (2, 4, 6):
        run.log(line(step))
    offset = list(run.metrics_from(0))[-1][1]
    assert run.forget_metrics_after(3) == [line(2)]
    assert [entry for entry, _ in run.metrics_from(offset)] == [line(2)]
    run.log(line(4, note="longer than it was before, so that the old offset lies within this line"))
    assert [entry["step"] for entry, _ in run.metrics_from(offset)] == [2, 4]


def test_forgetting_drops_what_will_be_computed_again_and_half_a_line(run: Run):
    for step in (2, 4, 6):
        run.log(line(step))
    assert run.forget_metrics_after(4) == [line(2), line(4)]
    assert run.metrics() == [line(2), line(4)]
    run.folder.append(METRICS, b'{"step": 6, "lo')
    assert run.forget_metrics_after(4) == [line(2), line(4)]
    run.log(line(6))
    assert run.metrics() == [line(2), line(4), line(6)]
    assert run.forget_metrics_after(0) == []
    assert run.metrics() == []
