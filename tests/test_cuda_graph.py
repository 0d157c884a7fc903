"""Steps that are replayed are the steps that they stand for: on a CPU, by a tape in the place of CUDA graphs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from toys import toy_batch, toy_classifier, toy_recipe, toy_setting

from arat_dist import cuda_graph
from arat_dist.config import (
    ARATConfig,
    ARRESTConfig,
    AttackConfig,
    EngineConfig,
    LBGATConfig,
    MARTConfig,
    OptimConfig,
    TRADESConfig,
)
from arat_dist.cuda_graph import NUM_WARMUPS, CudaRecorder, GraphedStep, build_step
from arat_dist.data.loader import Batch
from arat_dist.engine import Rank, build_engine
from arat_dist.errors import UserError
from arat_dist.objectives import ARAT, ARREST, AT, LBGAT, MART, TRADES, Standard
from arat_dist.objectives.base import Objective, Setting
from arat_dist.preflight import check_recipe
from arat_dist.step import StepResult, TrainStep
from arat_dist.train import seed_step

ALONE = Rank(0, 1, torch.device("cpu"))
BATCH = 12
METHODS = ["standard", "at", "trades", "mart", "lbgat", "arrest", "arat"]


def build(method: str, **attack: Any) -> Objective:
    """A method on the toy net in float64, with dropout before its last layer."""
    net = toy_classifier(split=method == "arat")
    net.backbone.register_module("fc", torch.nn.Sequential(torch.nn.Dropout(0.3), net.backbone.fc))  # pyright: ignore

    def setting(of: type[Objective]) -> Setting:
        return toy_setting(of, **attack)

    match method:
        case "standard":
            return Standard(net, setting(Standard))
        case "at":
            return AT(net, setting(AT))
        case "trades":
            return TRADES(net, setting(TRADES), TRADESConfig(name="trades"))
        case "mart":
            return MART(net, setting(MART), MARTConfig(name="mart"))
        case "lbgat":
            config = LBGATConfig(name="lbgat", beta=6.0)
            return LBGAT(net, setting(LBGAT), config, toy_classifier(split=False, seed=1))
        case "arrest":
            return ARREST(net, setting(ARREST), ARRESTConfig(name="arrest"))
        case _:
            return ARAT(net, setting(ARAT), ARATConfig(name="arat", gamma=3))


def batch_of(step: int, size: int = BATCH) -> list[Batch]:
    return [Batch(*toy_batch(size, seed=step + 1))]


class Run:
    """A training of some steps, replayed or not; `broken` steps have a loss that is no number."""

    def __init__(self, method: str, optim: OptimConfig, recorder: TapeRecorder | None, **attack: Any):
        torch.manual_seed(0)
        self.objective = build(method, **attack).double().train()
        self.engine = build_engine(self.objective, EngineConfig(), optim, ALONE, capturable=True)
        step = TrainStep(self.engine, on_device=True)
        self.step = GraphedStep(step, recorder) if recorder else step
        self.results: list[StepResult] = []

    def take(self, step: int, *, size: int = BATCH, epoch: float = 0.0, weight: float = 1 / BATCH, inspect=None):
        self.engine.set_lr(0.05 / (step + 1))
        self.objective.begin_step(epoch)
        result = self.step(batch_of(step, size), weight, partial(seed_step, 0, step, ALONE), inspect)
        self.results.append(result)

    def state(self) -> dict[str, torch.Tensor]:
        optimizer = self.engine.state_dict()["state"]
        moments = {f"{name} {key}": value for name, entry in optimizer.items() for key, value in entry.items()}
        return self.engine.model_state() | moments


def assert_equal(one: Run, other: Run):
    state = other.state()
    for name, tensor in one.state().items():
        assert torch.equal(tensor, state[name]), name
    for a, b in zip(one.results, other.results, strict=True):
        assert torch.equal(a.gradient_norm, b.gradient_norm)
        assert torch.equal(a.finite, b.finite)
        for (values, count), (others, other_count) in zip(a.metrics, b.metrics, strict=True):
            assert count == other_count
            assert {name: float(value) for name, value in values.items()} == {
                name: float(value) for name, value in others.items()
            }


SGD = OptimConfig(lr=0.05, clip_grad_norm=1.0)
ADAMW = OptimConfig(name="adamw", lr=0.05, weight_decay=0.1)


@pytest.mark.parametrize(("method", "optim"), [*((method, SGD) for method in METHODS), ("arat", ADAMW)])
def test_replayed_steps_equal_steps_as_they_are(method, optim):
    """New samples, learning rate and dropout at every step; a batch of another size, a look and a weight in between."""
    recorder = TapeRecorder()
    plain, replayed = Run(method, optim, None), Run(method, optim, recorder)
    for run in (plain, replayed):
        for step in range(NUM_WARMUPS + 3):
            run.take(step)
        run.take(7, size=6, weight=1 / 6)
        run.take(8, inspect=lambda out, factor: None)
        run.objective.end_epoch(lambda tensor: tensor)
        run.take(9)
        run.take(10)
    assert_equal(replayed, plain)
    assert recorder.num_replays == 5
    assert replayed.step.num_recordings == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert len({float(result.gradient_norm) for result in replayed.results}) == len(replayed.results)


def test_each_eps_and_number_of_steps_has_a_recording_of_its_own():
    """Two lengths of PGD, then an eps that differs at every step, which is never recorded."""
    recorder = TapeRecorder()
    courses = {"steps_from": ((2, 1), (4, 2))}
    plain, replayed = Run("arat", SGD, None, **courses), Run("arat", SGD, recorder, **courses)
    epochs = [e for epoch in (0.0, 2.0, 0.0, 4.0) for e in [epoch] * (NUM_WARMUPS + 1)]
    for run in (plain, replayed):
        for step, epoch in enumerate(epochs):
            run.take(step, epoch=epoch)
    assert_equal(replayed, plain)
    assert replayed.step.num_recordings == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert recorder.num_replays == 1 + 1 + (NUM_WARMUPS + 1) + 1

    recorder = TapeRecorder()
    warmup = {"eps_warmup_epochs": 10}
    plain, replayed = Run("at", SGD, None, **warmup), Run("at", SGD, recorder, **warmup)
    for run in (plain, replayed):
        for step in range(6):
            run.take(step, epoch=(step + 1) / 10)
    assert_equal(replayed, plain)
    assert recorder.num_replays == 0


def test_a_replayed_step_without_a_finite_gradient_changes_nothing():
    recorder = TapeRecorder()
    run = Run("arat", ADAMW, recorder)
    for step in range(NUM_WARMUPS + 1):
        run.take(step)
    weight = next(run.objective.classifier.parameters())
    with torch.no_grad():
        kept = weight[0, 0, 0, 0].item()
        weight[0, 0, 0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    run.take(5)
    assert recorder.num_replays == 2
    assert not run.results[-1].finite
    for name, tensor in run.state().items():
        assert torch.equal(tensor.nan_to_num(0), before[name].nan_to_num(0)), name
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    run.take(6)
    assert run.results[-1].finite
    assert not torch.equal(run.state()["classifier.backbone.conv1.weight"], before["classifier.backbone.conv1.weight"])


def test_results_outlive_the_next_replay():
    run = Run("at", SGD, TapeRecorder())
    for step in range(NUM_WARMUPS + 2):
        run.take(step)
    last = run.results[-1]
    norm, loss = float(last.gradient_norm), float(last.metrics[0][0]["loss"])
    run.take(9)
    assert (float(last.gradient_norm), float(last.metrics[0][0]["loss"])) == (norm, loss)
    assert float(run.results[-1].gradient_norm) != norm


class LooksAtItsLoss(AT):
    """A method that no graph can hold."""

    def losses(self, pixels, targets, keys):
        out = super().losses(pixels, targets, keys)
        assert out.loss.item() > 0
        return out


def test_a_step_that_cannot_be_captured_is_taken_as_it_is_and_said_once(monkeypatch, caplog):
    plain = Run("at", SGD, None)
    monkeypatch.setattr("test_cuda_graph.AT", LooksAtItsLoss)
    recorder = TapeRecorder()
    looking = Run("at", SGD, recorder)
    with caplog.at_level(logging.WARNING):
        for run in (plain, looking):
            for step in range(NUM_WARMUPS + 3):
                run.take(step)
    assert_equal(looking, plain)
    assert recorder.num_replays == 0
    assert len(caplog.records) == 1
    assert "train.cuda_graph: the step can't be captured" in caplog.text
    assert "and more lines" not in caplog.text


@pytest.fixture
def recorder(monkeypatch) -> Callable[[bool], CudaRecorder]:
    """Recorders over stand-ins for torch's graphs, whose end fails, as after a wait for the device, or doesn't."""

    def build(end_fails: bool) -> CudaRecorder:
        @contextmanager
        def capture(*_: Any, **__: Any) -> Iterator[None]:
            yield
            if end_fails:
                raise RuntimeError("operation failed due to a previous error during capture")

        for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", capture)
        return CudaRecorder(torch.device("cuda"))

    return build


def fails() -> StepResult:
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def test_a_capture_that_is_broken_off_ends_the_run_and_names_the_culprit(recorder):
    """torch's allocator and generators can't be trusted afterwards, and its own error hides the first one."""
    line = r"train.cuda_graph: true: the step can't be captured \(operation not permitted .* capturing\); false"
    with pytest.raises(UserError, match=line):
        recorder(True).record(fails)
    with pytest.raises(UserError, match="due to a previous error"):
        recorder(True).record(lambda: Run("at", SGD, None).take(0))


def test_an_error_that_lets_a_capture_end_well_is_the_works_own(recorder):
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(False).record(fails)
    result = StepResult([], 0, torch.ones(()), torch.ones(()))
    assert recorder(False).record(lambda: result)[1] is result


def test_several_ranks_train_without_a_graph_and_say_so(sets, caplog):
    recipe = toy_recipe(sets, train={"cuda_graph": True})
    engine = Run("at", SGD, None).engine
    with caplog.at_level(logging.WARNING):
        steps = [build_step(engine, recipe, Rank(index, 2, torch.device("cpu"))) for index in range(2)]
    assert [type(step) for step in steps] == [TrainStep, TrainStep]
    assert [record.message for record in caplog.records] == [
        "train.cuda_graph: goes with one worker so far; 2 train without"
    ]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"cuda_graph": True}}, ["train.cuda_graph: true:", "needs a GPU", "no NVIDIA driver"]),
        ({"train": {"cuda_graph": True}, "cluster": {"workers": 1}}, ["needs a GPU", "cluster.gpus_per_worker: 1"]),
        ({"train": {"cuda_graph": True, "precision": "fp16"}}, ["goes without train.precision fp16"]),
        ({"train": {"cuda_graph": True, "grad_checkpointing": True}}, ["goes without train.grad_checkpointing"]),
        ({"train": {"cuda_graph": True}, "engine": {"kind": "deepspeed"}}, ["goes without engine.kind deepspeed"]),
    ],
)
def test_a_graph_that_cannot_be_is_refused_in_one_line(sets, sections, words):
    with pytest.raises(UserError) as error:
        check_recipe(toy_recipe(sets, **sections))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_attack_section_has_a_kind_for_each_step():
    """What the host decides must be comparable."""
    from arat_dist.objectives.attack import AttackDefaults, TrainingAttack

    for name in ("pgd", "fgsm", "nfgsm", "apgd"):
        attack = TrainingAttack(AttackConfig(name=name), AttackDefaults(), 0)  # pyright: ignore[reportArgumentType]
        assert attack.at(1) == attack.at(2)
        assert hash(attack.at(1)) == hash(attack.at(2))
    warming = TrainingAttack(AttackConfig(eps_warmup_epochs=5), AttackDefaults(), 0)
    assert warming.at(1) != warming.at(2)
    assert cuda_graph.NUM_WARMUPS >= 3
