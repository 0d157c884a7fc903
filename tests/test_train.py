"""The loop on tiny data in one process: a run that was cut off and went on equals one that wasn't, to the bit."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from toys import Sets, toy_batch, toy_classifier, toy_recipe, toy_setting

from arat_dist.averaging import restate
from arat_dist.checkpoint import Checkpoint, checkpoint_names, load_checkpoint, load_newest
from arat_dist.config import Recipe
from arat_dist.data.loader import loader_class
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import DDPEngine, Rank, build_engine, statistics_of
from arat_dist.errors import StoppedError, SupersededError, UserError
from arat_dist.evaluate import eval_config, evaluate
from arat_dist.guard import DivergedError
from arat_dist.metrics import TIMED, MetricsLog
from arat_dist.objectives import build_objective
from arat_dist.objectives.at import AT
from arat_dist.objectives.base import Objective, Output
from arat_dist.optim import lr_at
from arat_dist.run import Run
from arat_dist.saving import capture, take_up
from arat_dist.step import TrainStep
from arat_dist.train import check_agreement, num_steps, sample_order, train

RANK = Rank(0, 1, torch.device("cpu"))
VARIABLE = ("time_s", "images_per_second", "memory_mb", *(f"{part}_fraction" for part in TIMED))
NUM_STEPS = 17  # 3 epochs of 44 pictures in batches of 8: 16 whole ones and one of 4


def start(recipe: Recipe, folder: Any, name: str = "run") -> tuple[Run, dict[str, Any]]:
    run = Run(str(folder), name)
    run.open(recipe, "a" * 64)
    return run, train(recipe, run, RANK)


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in VARIABLE and not key.startswith("system/")}
        for line in lines
    ]


def newest(run: Run) -> Checkpoint:
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is not None
    return checkpoint


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert a.step == b.step
    assert set(a.weights) == set(b.weights)
    for part, state in a.weights.items():
        assert set(state) == set(b.weights[part])
        for name, value in state.items():
            assert torch.equal(value, b.weights[part][name]), f"{part}: {name}"
    assert a.optimizer["state"].keys() == b.optimizer["state"].keys()
    for key, state in a.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b.optimizer["state"][key][name]), f"optimizer: {key}.{name}"


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process 'die' within its step number `steps`, counted from 0."""
    step, count = DDPEngine.step, 0

    def crashing(self: DDPEngine) -> Tensor:
        nonlocal count
        if count == steps:
            raise KeyboardInterrupt
        count += 1
        return step(self)

    monkeypatch.setattr(DDPEngine, "step", crashing)


CASES: dict[str, dict[str, Any]] = {
    # Checkpoints amid epochs (5.5 steps long) and amid log intervals, with the balance's counts half way.
    "arat, ema": {
        "objective": {"name": "arat", "adv_weight": 0.123},
        "train": {"ema_decay": 0.8, "checkpoint_every": 4, "log_every": 3},
    },
    "at, dropout, bf16, adamw": {
        "objective": {"name": "at"},
        "model": {
            # Not resnet10t, whose last maps are 1x1 here: oneDNN's bf16 gradient of a 3x3 convolution of stride 2 on
            # them holds whatever lay in memory (torch 2.14.1, AVX-512).
            "name": "cifar_resnet18",
            "args": {"channels": [8, 8, 8, 8], "drop_rate": 0.3, "drop_path_rate": 0.2},
        },
        "optim": {"name": "adamw", "lr": 0.002, "clip_grad_norm": 1},
        "train": {"checkpoint_every": 4, "precision": "bf16"},
    },
    "arat, fp16, in parts, stages run twice": {
        "model": {"name": "cifar_resnet18", "args": {"channels": [8, 8, 8, 8], "drop_path_rate": 0.2}},
        "train": {"checkpoint_every": 4, "precision": "fp16", "micro_batches": 2, "grad_checkpointing": True},
    },
    "at, randaugment, jitter, mixup": {
        "objective": {"name": "at"},
        "data": {"rand_augment": [2, 9], "color_jitter": [0.4, 0.4, 0.4, 0.1], "mixup": 0.5},
        "train": {"checkpoint_every": 4, "swa_start_epoch": 1, "swa_every": 3},
    },
    # The checkpoint after step 8 lies within the second size, the crash after step 10 within the third.
    "arat, ema, sizes of pictures": {
        "data": {"augment": "random_resized_crop", "image_sizes_from": [[0, 12], [1, 20], [1.8, 24], [2.5, 12]]},
        "train": {"ema_decay": 0.8, "checkpoint_every": 4, "log_every": 3},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_crashed_and_went_on_equals_one_that_did_not(sets: Sets, tmp_path, monkeypatch, caplog, case):
    recipe = toy_recipe(sets, **CASES[case])
    whole, whole_summary = start(recipe, tmp_path, "whole")
    with monkeypatch.context() as patch:
        crash_after(10, patch)
        with pytest.raises(KeyboardInterrupt):
            start(recipe, tmp_path, "cut")
    cut = Run(str(tmp_path), "cut")
    assert newest(cut).step == 8
    assert cut.metrics()[-1]["step"] > 8  # a line that will be computed again
    torch.manual_seed(12345)
    with caplog.at_level(logging.INFO):
        cut, cut_summary = start(recipe, tmp_path, "cut")
    assert "going on after step 8" in caplog.text
    assert cut.num_attempts() == 2

    assert_equal(newest(cut), newest(whole))
    assert comparable(cut.metrics()) == comparable(whole.metrics())
    times = [line["time_s"] for line in cut.metrics()]
    assert times == sorted(times)
    for summary, folder in ((cut_summary, cut.checkpoints), (whole_summary, whole.checkpoints)):
        summary.pop("train_images_per_second")
        assert summary.pop("checkpoint") == f"{folder.uri}/step_00000017"
    assert cut_summary == whole_summary
    if "ema" in case:
        assert cut_summary["weights"] == "ema"
        assert newest(cut).weights["model"]["adv_weight"] != torch.tensor(0.123)


def test_dropout_is_on_and_differs_between_steps(sets: Sets, tmp_path):
    """Without it the test above would show nothing of dropout."""
    case = CASES["at, dropout, bf16, adamw"]
    args = case["model"]["args"]
    losses = []
    for name, rates in (("with", {}), ("without", {"drop_rate": 0.0, "drop_path_rate": 0.0})):
        model = {"name": "cifar_resnet18", "args": {**args, **rates}}
        run, _ = start(toy_recipe(sets, **{**case, "model": model, "train": {"max_steps": 1}}), tmp_path, name)
        losses.append(run.metrics()[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("keys", [{"rand_augment": [2, 9]}, {"color_jitter": [0.4, 0.4, 0.4, 0.1]}])
def test_augmentation_on_the_device_reaches_the_net(sets: Sets, tmp_path, keys):
    """And changes neither the loader's pictures nor the evaluation of the same weights."""
    losses, scores = [], []
    for name, data in (("with", keys), ("without", {})):
        recipe = toy_recipe(sets, objective={"name": "standard"}, data=data, train={"max_steps": 1, "log_every": 1})
        run, summary = start(recipe, tmp_path, name)
        losses.append(run.metrics()[0]["loss"])
        torch.manual_seed(0)
        scores.append(evaluate(build_objective(recipe).classifier, recipe.data, eval_config(recipe), RANK))
        assert summary["samples_seen"] == 8
    assert losses[0] != losses[1]
    assert scores[0] == scores[1]


def test_going_on_with_a_finished_run_only_evaluates(sets: Sets, tmp_path):
    recipe = toy_recipe(sets, train={"max_steps": 3})
    run, first = start(recipe, tmp_path)
    before = run.metrics()
    run, second = start(recipe, tmp_path)
    assert run.metrics() == before
    first.pop("train_images_per_second")
    assert second.pop("train_images_per_second") == round(before[-1]["images_per_second"], 1)
    assert second == first


class Second(Rank):
    """The second of two ranks; sums are what it gave plus what the first one would."""

    def __init__(self, first: list[int]):
        super().__init__(1, 2, torch.device("cpu"))
        object.__setattr__(self, "first", first)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor[0] += torch.tensor(self.first)  # pyright: ignore[reportAttributeAccessIssue]
        return tensor


def test_ranks_that_disagree_say_so(sets: Sets):
    manifest = load_manifest(sets.train)
    number = int(manifest.sha256[:15], 16)
    check_agreement(8, manifest, Second([8, number]))
    with pytest.raises(RuntimeError, match=r"checkpoints of different steps \(\[4, 8\]\)"):
        check_agreement(8, manifest, Second([4, number]))
    with pytest.raises(RuntimeError, match=r"different files under data\.train"):
        check_agreement(8, manifest, Second([8, number + 1]))


def test_a_later_rank_with_nothing_left_to_do_has_a_summary(tmp_path):
    log = MetricsLog(Run(str(tmp_path), "none"), Rank(1, 2, torch.device("cpu")))
    assert log.summary() == {"train_images_per_second": None, "losses": {}}


def test_the_summary_names_the_last_checkpoint_and_not_what_broke_off_beyond(sets: Sets, tmp_path):
    """As a launch with more steps leaves it that was killed while it wrote."""
    run = Run(str(tmp_path), "run")
    (run.checkpoints / "step_00000005").write("model.safetensors", b"half")
    _, summary = start(toy_recipe(sets, train={"max_steps": 3}), tmp_path)
    assert summary["checkpoint"] == run.checkpoints.path("step_00000003")


def test_fewer_steps_than_done_are_those_done(sets: Sets, tmp_path):
    start(toy_recipe(sets, train={"max_steps": 3}), tmp_path)
    _, summary = start(toy_recipe(sets, train={"max_steps": 2}), tmp_path)
    assert (summary["steps"], summary["samples_seen"]) == (3, 24)


def test_max_steps_stops_early_on_the_schedule_of_the_whole_run(sets: Sets, tmp_path):
    recipe = toy_recipe(sets, train={"max_steps": 7, "log_every": 1}, optim={"warmup_epochs": 1})
    assert num_steps(recipe) == 7
    assert num_steps(toy_recipe(sets)) == NUM_STEPS
    run, summary = start(recipe, tmp_path)
    assert [line["step"] for line in run.metrics()] == list(range(1, 8))
    assert newest(run).step == 7
    rates = [lr_at(n, recipe.optim, num_samples=44, batch_size=8, epochs=3) for n in range(7)]
    assert [line["lr"] for line in run.metrics()] == rates
    assert rates[0] < 0.2 * recipe.optim.lr < rates[5]
    assert rates[6] > 0.9 * recipe.optim.lr
    assert summary["steps"] == 7
    assert summary["samples_seen"] == 7 * 8


def test_steps_that_overflowed_are_counted_over_the_whole_run(sets: Sets, tmp_path, monkeypatch):
    """Every batch still makes one update, and a resumed run goes on counting."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    recipe = toy_recipe(
        sets,
        model={"name": "cifar_resnet18", "args": {"channels": [8, 8, 8, 8]}},
        train={"precision": "fp16", "checkpoint_every": 4, "log_every": 1},
    )
    with monkeypatch.context() as patch:
        crash_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            start(recipe, tmp_path)
    run, summary = start(recipe, tmp_path)
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert summary["samples_seen"] == 3 * 44
    assert lines[0]["overflows"] >= 1
    assert lines[-1]["overflows"] == 26 - math.log2(newest(run).optimizer["loss_scale"]["scale"])


def test_a_run_in_parts_sees_every_sample_once(sets: Sets, tmp_path):
    """On a net without batch statistics the parts make the same run as the whole."""
    args = {"channels": [8, 8, 8, 8], "stem_width": 8, "zero_init_last": False, "norm_layer": "groupnorm1"}
    sections: dict[str, Any] = {"model": {"args": args}, "objective": {"name": "at"}}
    whole, _ = start(toy_recipe(sets, **sections), tmp_path, "whole")
    parts, summary = start(toy_recipe(sets, **sections, train={"micro_batches": 4}), tmp_path, "parts")
    assert summary["samples_seen"] == 3 * 44
    first, other = whole.metrics()[0], parts.metrics()[0]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert other["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-2)


def test_sizes_of_pictures_follow_their_course_and_change_no_order(sets: Sets, tmp_path, monkeypatch):
    seen: list[tuple[int, list[int]]] = []
    forward = Objective.forward

    def watching(self: Objective, images: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> Output:
        seen.append((images.shape[2], keys.tolist()))
        assert images.shape == (len(keys), 3, images.shape[2], images.shape[2])
        return forward(self, images, labels, keys)

    monkeypatch.setattr(Objective, "forward", watching)
    crop = {"augment": "random_resized_crop"}
    start(toy_recipe(sets, data=crop), tmp_path, "plain")
    plain = seen.copy()
    seen.clear()
    start(toy_recipe(sets, data=crop | {"image_sizes_from": [[1, 12], [1.8, 24], [2.5, 12]]}), tmp_path, "course")
    assert [side for side, _ in plain] == [16] * NUM_STEPS
    # Epochs are 5.5 steps long: 1 is amid step 5, 1.8 amid 9, 2.5 amid 13.
    assert [side for side, _ in seen] == [16] * 6 + [12] * 4 + [24] * 4 + [12] * 3
    assert [keys for _, keys in seen] == [keys for _, keys in plain]


def test_each_size_of_pictures_is_compiled_once(monkeypatch):
    """More graphs than are kept for one size, and none anew at the return to an earlier one."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, backend="aot_eager", **kwargs))
    torch._dynamo.reset()
    counters.clear()
    objective = AT(toy_classifier(split=False).float(), toy_setting(AT, steps=1)).train()
    sides = list(range(8, 17))
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, which importing timm.optim lifts
        objective.compile_backbones({4}, num_sides=len(sides))
        for side in [*sides, *sides[:3]]:
            objective(*toy_batch(4, side=side)).loss.backward()
    assert counters["stats"]["unique_graphs"] == 2 * len(sides)  # the attack's pass and the training's
    torch._dynamo.reset()


def test_a_run_makes_room_for_the_graphs_of_all_its_sizes(sets: Sets, tmp_path, monkeypatch):
    asked: list[tuple[set[int], int]] = []
    monkeypatch.setattr(Objective, "compile_backbones", lambda self, sizes, num_sides: asked.append((sizes, num_sides)))
    data = {"augment": "random_resized_crop", "image_sizes_from": [[1, 12], [2, 20]]}
    start(toy_recipe(sets, data=data, train={"compile": True, "max_steps": 1}), tmp_path)
    assert asked == [({8}, 3)]


@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_that_compiles_for_a_new_size_has_the_time_of_a_first_one(sets: Sets, tmp_path, monkeypatch, compiles):
    """And the copying of the sets counts to the time of the first one."""
    events: list[Any] = []

    @contextmanager
    def watching(*_: object) -> Iterator[Callable[..., None]]:
        events.append("begin")
        yield lambda **keys: events.append(keys.get("compiles"))

    monkeypatch.setattr("arat_dist.train.watchdog", watching)
    monkeypatch.setattr("arat_dist.train.stage_data", lambda _: events.append("stage"))
    monkeypatch.setattr(Objective, "compile_backbones", lambda *_, **__: None)
    data = {"augment": "random_resized_crop", "image_sizes_from": [[1, 12], [2, 20]]}
    start(toy_recipe(sets, data=data, train={"compile": compiles}), tmp_path)
    assert events[:2] == ["begin", "stage"]
    steps = events[2 : 2 + NUM_STEPS]
    # Epochs are 5.5 steps long: the sides change after steps 6 and 11.
    assert [number for number, is_long in enumerate(steps, 1) if is_long] == ([6, 11] if compiles else [])


def test_a_compiled_run_begins_as_an_eager_one(sets: Sets, tmp_path, monkeypatch):
    """And the run's smaller last batches don't compile anything anew."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, backend="aot_eager", **kwargs))
    torch._dynamo.reset()
    counters.clear()
    eager, _ = start(toy_recipe(sets, train={"log_every": 1}), tmp_path, "eager")
    assert counters["stats"]["unique_graphs"] == 0
    compiled, _ = start(toy_recipe(sets, train={"log_every": 1, "compile": True}), tmp_path, "compiled")
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()
    for key in ("loss", "gradient_norm"):
        assert compiled.metrics()[0][key] == pytest.approx(eager.metrics()[0][key], rel=1e-3)
    assert len(compiled.metrics()) == NUM_STEPS


def test_summary_and_files_of_a_run(sets: Sets, tmp_path):
    run, summary = start(toy_recipe(sets, train={"log_every": 5, "keep_checkpoints": 2}), tmp_path)
    assert set(summary) == {
        "epochs",
        "steps",
        "samples_seen",
        "world_size",
        "device",
        "tf32",
        "clean_accuracy",
        "robust_accuracy",
        "robust_attack",
        "norm",
        "eps",
        "attack_steps",
        "num_samples",
        "weights",
        "checkpoint",
        "train_images_per_second",
        "losses",
    }
    assert (summary["epochs"], summary["steps"], summary["samples_seen"]) == (3, NUM_STEPS, 3 * 44)
    assert (summary["weights"], summary["num_samples"], summary["world_size"]) == ("raw", 23, 1)
    assert (summary["device"], summary["tf32"]) == ("cpu", False)
    assert 0 <= summary["robust_accuracy"] <= summary["clean_accuracy"] <= 1
    assert summary["train_images_per_second"] > 0
    last = run.metrics()[-1]
    assert summary["losses"] == {"loss": last["loss"]} | {
        part: last[f"loss_{part}"] for part in ("adv", "clean", "invariance")
    }
    # A line each 5 steps and one at the end, whenever there are checkpoints: at the ends of the epochs of 5.5 steps.
    assert [line["step"] for line in run.metrics()] == [5, 10, 15, 17]
    assert checkpoint_names(run.checkpoints) == ["step_00000011", "step_00000017"]
    assert last["system/node0/memory_gib"] > 0
    assert {key for key in last if not key.startswith("system/")} == {
        *("step", "epoch", "time_s", "loss", "loss_adv", "loss_clean", "loss_invariance", "clean_accuracy"),
        *("robust_accuracy", "adv_weight", "lr", "gradient_norm", *VARIABLE[1:]),
    }
    assert 0 < last["compute_fraction"] <= 1
    assert 0 <= last["loader_wait_fraction"] <= 1 - last["compute_fraction"] + 1e-3
    # The balance changes once an epoch.
    weights = [load_checkpoint(run.checkpoints / n).weights["model"]["adv_weight"] for n in ("step_00000011",)]
    assert run.metrics()[0]["adv_weight"] == 0.5
    assert run.metrics()[3]["adv_weight"] == pytest.approx(float(weights[0]))


def test_a_line_is_the_mean_over_the_samples_since_the_last_one(sets: Sets, tmp_path):
    fine, _ = start(toy_recipe(sets, train={"log_every": 1, "checkpoint_every": 99}), tmp_path, "fine")
    coarse, _ = start(toy_recipe(sets, train={"log_every": 6, "checkpoint_every": 99}), tmp_path, "coarse")
    order = sample_order(fine.recipe())
    assert order.batch_size_at(16) == 4
    for line, steps in zip(coarse.metrics(), (range(6), range(6, 12), range(12, 17)), strict=True):
        sizes = [order.batch_size_at(step) for step in steps]
        for key in ("loss", "loss_invariance", "clean_accuracy"):
            values = [fine.metrics()[step][key] for step in steps]
            mean = sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)
            assert line[key] == pytest.approx(mean, rel=1e-12)
        assert line["gradient_norm"] == fine.metrics()[steps[-1]]["gradient_norm"]


def test_a_checkpoint_holds_what_all_ranks_counted(sets: Sets):
    class OneOfThreeAlike(Rank):
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mul_(3)

    recipe = toy_recipe(sets)
    rank = OneOfThreeAlike(0, 1, torch.device("cpu"))
    engine = build_engine(build_objective(recipe), recipe.engine, recipe.optim, rank)
    engine(*toy_batch(8, side=16))
    checkpoint = capture(1, engine, {}, rank, {}, {})
    assert checkpoint is not None
    weights = checkpoint.weights["model"]
    assert weights["counts"][1] == 3 * 8
    assert weights["local_counts"].tolist() == [0, 0]


@pytest.mark.parametrize("clip", [None, 1e30])
def test_a_gradient_that_stays_no_number_ends_the_run_and_reaches_no_checkpoint(sets: Sets, tmp_path, caplog, clip):
    """It goes back to its newest checkpoint once; the weights there are numbers."""
    recipe = toy_recipe(
        sets,
        objective={"name": "standard"},
        optim={"lr": 1e25, "momentum": 0, "clip_grad_norm": clip},
        train={"checkpoint_every": 1, "log_every": 3, "max_skipped_steps": 4},
    )
    with pytest.raises(DivergedError, match=r"^step \d+: the gradient has been no number in 4 steps in a row; a lower"):
        start(recipe, tmp_path)
    run = Run(str(tmp_path), "run")
    assert run.num_attempts() == 2
    assert "going back to the newest checkpoint" in caplog.text
    checkpoint = load_newest(run.checkpoints)
    assert checkpoint is None or all(value.isfinite().all() for value in checkpoint.weights["model"].values())
    assert all(math.isfinite(value) for line in run.metrics() for value in line.values())


def spoil(steps: set[int], monkeypatch: pytest.MonkeyPatch, *, once: bool = False) -> None:
    """Make the loss infinite in these steps, counted from 0, and poison what the net keeps of its pictures."""
    begin_step, forward = Objective.begin_step, Objective.forward
    step, done = -1, set[int]()

    def counting(self: Objective, epoch: float) -> None:
        nonlocal step
        step = -1 if math.isinf(epoch) else round(epoch * 44 / 8)
        begin_step(self, epoch)

    def spoiled(self: Objective, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        out = forward(self, images, labels, keys)
        if step not in steps or (once and step in done):
            return out
        done.add(step)
        for name, buffer in self.named_buffers():
            if name.endswith("running_var"):
                buffer.data.fill_(math.nan)  # behind autograd's back, as a pass through the net does it
        return replace(out, loss=out.loss * math.inf)

    monkeypatch.setattr(Objective, "begin_step", counting)
    monkeypatch.setattr(Objective, "forward", spoiled)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_no_number_is_as_if_it_had_not_been(sets: Sets, tmp_path, monkeypatch, caplog, precision):
    """Weights, momentum and running statistics are those before it; its samples are named; the line leaves it out."""
    keys = {"checkpoint_every": 1, "log_every": 4, "epochs": 2, "precision": precision}
    model = {"name": "cifar_resnet18", "args": {"channels": [8, 8, 8, 8]}}
    recipe = toy_recipe(sets, objective={"name": "at"}, model=model, train=keys)
    with monkeypatch.context() as patch:
        spoil({2, 5, 6, 10}, patch)
        run, summary = start(recipe, tmp_path)
    # The last step is one of them; no other checkpoint is taken behind a step that was skipped.
    assert checkpoint_names(run.checkpoints) == [f"step_{step:08d}" for step in (1, 2, 4, 5, 8, 9, 10, 11)]
    a, b = (load_checkpoint(run.checkpoints / f"step_{step:08d}") for step in (10, 11))
    for name, value in a.weights["model"].items():
        assert torch.equal(value, b.weights["model"][name]), name
    for key, state in a.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], b.optimizer["state"][key]["momentum_buffer"])
    a, b = (load_checkpoint(run.checkpoints / f"step_{step:08d}") for step in (9, 10))
    assert not all(torch.equal(value, b.weights["model"][name]) for name, value in a.weights["model"].items())
    order = sample_order(recipe)
    skipped = [json.loads(line) for line in run.folder.read("skipped.jsonl").splitlines()]
    assert [(line["step"], line["samples"]) for line in skipped] == [
        (step + 1, (order.batch(step) % 44).tolist()) for step in (2, 5, 6, 10)
    ]
    assert "step 3: the gradient is no number, the step was skipped; its samples: " in caplog.text
    assert [line.get("skipped_steps") for line in run.metrics()] == [1, 3, 4]
    assert all(math.isfinite(value) for line in run.metrics() for value in line.values())
    assert summary["steps"] == 11
    # The line's means are over the other steps.
    fine, _ = start(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_every": 1})}), tmp_path, "f"
    )
    mean = sum(line["loss"] for line in fine.metrics()[:2])
    assert run.metrics()[0]["loss"] != pytest.approx(sum(line["loss"] for line in fine.metrics()[:4]) / 4)
    assert run.metrics()[0]["loss"] * 3 - mean > 0


def test_a_skipped_step_reaches_neither_averages_nor_counts_nor_diagnostics(sets: Sets, tmp_path, monkeypatch):
    """Though all of them look at the net, or were moved by its pass, in every step."""
    keys = {"checkpoint_every": 1, "log_every": 1, "max_steps": 9, "ema_decay": 0.8}
    # Epochs are 5.5 steps long: the first one ends amid step 5.
    recipe = toy_recipe(sets, train=keys, track={"diagnostics_every": 1, "mlflow": False})
    with monkeypatch.context() as patch:
        spoil({1, 5, 6}, patch)
        run, _ = start(recipe, tmp_path)
    order, lines = sample_order(recipe), run.metrics()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert ["gradient_cosine" in line and "branch_mean_distance" in line for line in lines] == [
        step not in {1, 5, 6} for step in range(9)
    ]
    # One would be refused whose averages hold what is no number; at the end their statistics are measured anew.
    assert checkpoint_names(run.checkpoints) == [f"step_{step:08d}" for step in (1, 3, 4, 5, 8, 9)]
    final = newest(run)
    # Since the end of the first epoch, after step 5.
    assert order.ends_epoch(5)
    assert final.weights["model"]["counts"][1] == sum(order.batch_size_at(step) for step in (7, 8))
    right = sum(round(lines[step]["clean_accuracy"] * 8) for step in (0, 2, 3, 4))
    assert lines[7]["adv_weight"] == pytest.approx(right / (4 * 8))


def test_a_fault_that_passes_costs_a_way_back_and_no_more(sets: Sets, tmp_path, monkeypatch, caplog):
    """After too many such steps the run goes on from its newest checkpoint, and ends as if nothing had been."""
    keys = {"checkpoint_every": 4, "log_every": 1, "max_skipped_steps": 3}
    recipe = toy_recipe(sets, objective={"name": "at"}, train=keys)
    whole, _ = start(recipe, tmp_path, "whole")
    with monkeypatch.context() as patch:
        spoil({5, 6, 7}, patch, once=True)
        run, _ = start(recipe, tmp_path, "faulty")
    assert "step 8: the gradient has been no number in 3 steps in a row" in caplog.text
    assert [json.loads(line)["step"] for line in run.folder.read("attempts.jsonl").splitlines()] == [0, 4]
    assert_equal(newest(run), newest(whole))
    assert comparable(run.metrics()) == comparable(whole.metrics())


def test_training_learns(sets: Sets, tmp_path):
    recipe = toy_recipe(
        sets, objective={"name": "at"}, attack={"eps": 0.01, "step_size": 0.01}, train={"epochs": 12, "log_every": 11}
    )
    run, _ = start(recipe, tmp_path)
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.9 * losses[0]


def test_the_attack_follows_its_schedule_step_by_step(sets: Sets, tmp_path):
    """At eps 0, in the first step of a warm-up, adversarial training is plain training; then it is not."""
    keys = {"max_steps": 3, "log_every": 1}
    plain, _ = start(toy_recipe(sets, objective={"name": "standard"}, train=keys), tmp_path, "plain")
    warm = toy_recipe(sets, objective={"name": "at"}, attack={"steps": 2, "eps_warmup_epochs": 2}, train=keys)
    rising, _ = start(warm, tmp_path, "rising")
    full, _ = start(toy_recipe(sets, objective={"name": "at"}, attack={"steps": 2}, train=keys), tmp_path, "full")
    losses = [[line["loss"] for line in run.metrics()] for run in (plain, rising, full)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][0] < losses[2][0] - 1e-3
    assert losses[0][2] != pytest.approx(losses[1][2], rel=1e-5)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_average_that_a_run_ends_with_has_its_own_statistics(sets: Sets, tmp_path, kind):
    recipe = toy_recipe(sets, train={"ema": {"ema_decay": 0.8}, "swa": {"swa_start_epoch": 1, "swa_every": 2}}[kind])
    run, summary = start(recipe, tmp_path)
    assert summary["weights"] == kind
    objective = build_objective(recipe).train()
    saved = newest(run).weights[kind]
    objective.classifier.load_state_dict(saved)
    restate(objective, objective.classifier, recipe, RANK)
    for name, value in objective.classifier.state_dict().items():
        torch.testing.assert_close(value, saved[name], msg=lambda m, n=name: f"{n}: {m}")
    assert any("clean.running_mean" in name and value.any() for name, value in saved.items())


def test_memory_that_runs_out_ends_the_run_in_one_line_and_breaks_nothing(sets: Sets, tmp_path, monkeypatch):
    recipe = toy_recipe(sets, train={"checkpoint_every": 2})
    whole, _ = start(recipe, tmp_path, "whole")
    take_step, calls = TrainStep.__call__, iter(range(99))

    def until_memory_runs_out(self: TrainStep, *args: Any) -> Any:
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return take_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "__call__", until_memory_runs_out)
        with pytest.raises(UserError) as error:
            start(recipe, tmp_path, "cut")
    assert "train.global_batch_size: 8: no room for 8 images at a time" in str(error.value)
    assert "train.micro_batches: 2" in str(error.value)
    assert "\n" not in str(error.value)
    assert newest(Run(str(tmp_path), "cut")).step == 4
    cut, _ = start(recipe, tmp_path, "cut")
    assert_equal(newest(cut), newest(whole))


def test_a_run_on_copies_reads_nothing_else_and_is_the_same(sets: Sets, tmp_path, monkeypatch):
    opened: list[Path] = []

    loader: Any = loader_class(toy_recipe(sets).data)

    class Recording(loader):
        def __init__(self, path: Any, **settings: Any):
            opened.append(Path(path))
            super().__init__(path, **settings)

    monkeypatch.setattr("arat_dist.data.loader.loader_class", lambda _: Recording)
    averages = {"swa_start_epoch": 1, "swa_every": 2}
    in_place, before = start(toy_recipe(sets, train=averages), tmp_path, "in place")
    assert [str(path) for path in opened] == [sets.train, sets.train, sets.val]  # steps, norm statistics, evaluation
    opened.clear()
    local = tmp_path / "local"
    staged, after = start(toy_recipe(sets, train=averages, data={"stage_to": str(local)}), tmp_path, "staged")
    hashes = [load_manifest(path).sha256 for path in (sets.train, sets.train, sets.val)]
    assert opened == [local / f"{sha256}.beton" for sha256 in hashes]
    assert_equal(newest(staged), newest(in_place))
    assert after["robust_accuracy"] == before["robust_accuracy"]


def test_ranks_compare_what_they_found_before_the_first_step(sets: Sets, tmp_path, monkeypatch):
    start(toy_recipe(sets, train={"max_steps": 3}), tmp_path)
    seen = []

    def disagree(*found: Any) -> None:
        seen.append(found)
        raise RuntimeError("checkpoints of different steps")

    monkeypatch.setattr("arat_dist.train.check_agreement", disagree)
    with pytest.raises(RuntimeError, match="different steps"):
        start(toy_recipe(sets), tmp_path)
    assert seen == [(3, load_manifest(sets.train), RANK)]
    assert Run(str(tmp_path), "run").metrics()[-1]["step"] == 3


def test_a_run_is_evaluated_on_timms_centre_crop(sets: Sets, tmp_path, monkeypatch):
    crops = []

    def noted(classifier: Any, data: Any, *rest: Any) -> Any:
        crops.append(data.val_crop)
        return evaluate(classifier, data, *rest)

    monkeypatch.setattr("arat_dist.train.evaluate", noted)
    recipe = toy_recipe(sets, train={"max_steps": 1})
    assert recipe.data.val_crop is None
    start(recipe, tmp_path, "timms")
    start(toy_recipe(sets, data={"val_crop": 0.5}, train={"max_steps": 1}), tmp_path, "own")
    known = timm.get_pretrained_cfg(recipe.model.name)
    assert known is not None
    assert crops == [known.crop_pct, 0.5]


def test_checkpoints_by_the_clock_change_nothing_else(sets: Sets, tmp_path):
    """With a limit that every step exceeds there is one after each; weights and lines are as without."""
    seldom, _ = start(toy_recipe(sets, train={"log_every": 3}), tmp_path, "seldom")
    often, _ = start(toy_recipe(sets, train={"log_every": 3, "checkpoint_minutes": 1e-9}), tmp_path, "often")
    assert len(checkpoint_names(often.checkpoints)) == NUM_STEPS
    assert len(checkpoint_names(seldom.checkpoints)) == 3
    assert_equal(newest(often), newest(seldom))
    assert comparable(often.metrics()) == comparable(seldom.metrics())


def test_evaluations_in_the_course_of_training_name_the_best_checkpoint(sets: Sets, tmp_path):
    recipe = toy_recipe(sets, eval={"every": 1, "every_attack": "pgd1", "every_limit": 20}, train={"log_every": 100})
    run, _ = start(recipe, tmp_path)
    plain, _ = start(toy_recipe(sets, train={"log_every": 100}), tmp_path, "plain")
    assert_equal(newest(run), newest(plain))
    lines = [line for line in run.metrics() if "val_robust_accuracy" in line]
    assert [line["step"] for line in lines] == [6, 11]
    for line in lines:
        checkpoint = load_checkpoint(run.checkpoints / f"step_{line['step']:08d}")
        assert checkpoint.robust_accuracy == line["val_robust_accuracy"]
        # Counted anew from the weights.
        objective = build_objective(recipe)
        objective.load_state_dict(checkpoint.weights["model"])
        config = eval_config(recipe).model_copy(update={"attack": "pgd1", "limit": 20})
        scores = evaluate(objective.classifier, recipe.data, config, RANK)
        assert (scores.num_samples, scores.robust_accuracy) == (20, line["val_robust_accuracy"])


@pytest.mark.parametrize("checkpoint_every", [1, 1000], ids=["at a checkpoint", "at a line"])
def test_a_start_that_others_have_followed_writes_nothing_more(sets: Sets, tmp_path, monkeypatch, checkpoint_every):
    """As a process does that was cut off and comes back: neither a line nor a checkpoint."""
    log, lines = Run.log, 0

    def overtaken(self: Run, *values: dict[str, Any]) -> None:
        nonlocal lines
        log(self, *values)
        lines += 1
        if lines == 2:
            self.begin_attempt(step=0)

    monkeypatch.setattr(Run, "log", overtaken)
    with pytest.raises(SupersededError, match="start 2 of this run is at work, this is start 1"):
        start(toy_recipe(sets, train={"log_every": 2, "checkpoint_every": checkpoint_every}), tmp_path)
    run = Run(str(tmp_path), "run")
    assert [line["step"] for line in run.metrics()] == [2, 4]
    assert max(checkpoint_names(run.checkpoints), default="") <= "step_00000004"


def test_each_rank_gets_its_own_running_statistics_back(sets: Sets):
    """At another number of ranks, all get the mean that the weights hold."""
    recipe = toy_recipe(sets)
    engine = build_engine(build_objective(recipe), recipe.engine, recipe.optim, RANK)
    checkpoint = capture(1, engine, {}, RANK, {}, {})
    assert checkpoint is not None
    own = checkpoint.progress["statistics.model"]
    mean = own[0].clone()
    for rows, expected in ((own + 3, mean + 3), (torch.cat([own + 3, own - 3]), mean)):
        take_up(replace(checkpoint, progress={"statistics.model": rows}), engine, {}, RANK)
        assert torch.equal(statistics_of(engine.objective), expected)


def test_a_wish_to_stop_writes_a_checkpoint_and_the_run_goes_on_as_if_nothing_had_been(sets: Sets, tmp_path):
    recipe = toy_recipe(sets, train={"log_every": 3, "checkpoint_every": 1000})
    whole, _ = start(recipe, tmp_path, "whole")
    run, asked = Run(str(tmp_path), "stopped"), iter([False] * 4 + [True] * 99)
    run.open(recipe, "a" * 64)
    with pytest.raises(StoppedError) as stopped:
        train(recipe, run, Rank(0, 1, torch.device("cpu"), stop_wanted=lambda: next(asked)))
    assert stopped.value.step == newest(run).step == 5
    train(recipe, run, RANK)
    assert_equal(newest(run), newest(whole))
    assert comparable(run.metrics()) == comparable(whole.metrics())
