"""Two gloo processes against one: the same gradients and weights, in float64, attack and unequal shares included."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from toys import toy_batch, toy_classifier

from arat_dist.attacks import PGD
from arat_dist.config import ARATConfig, EngineConfig, OptimConfig
from arat_dist.data.order import SampleOrder
from arat_dist.engine import DDPEngine, Rank, average_statistics, build_engine
from arat_dist.errors import UserError
from arat_dist.objectives import ARAT, AT, Objective
from arat_dist.objectives.base import Output

CPU = torch.device("cpu")
ATTACK = PGD("linf", 0.1, 0.04, 2, seed=3)
OPTIM = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, clip_grad_norm=0.5)
BATCH = 10  # dealt to two ranks as 6 and 4
STEPS = 3


def objective(kind: str) -> Objective:
    """Nets whose samples know nothing of each other, so that a batch may be cut anywhere."""
    if kind == "at":
        return AT(toy_classifier(norm="group", split=False), ATTACK)
    keys = {"split_norm": "none", "predictor": False, "gamma": 3, "adv_weight": 0.25}
    config = ARATConfig.model_validate({"name": "arat", **keys})
    arat = ARAT(toy_classifier(norm="group", split=False), ATTACK, config, precision="fp32")
    return arat.double()


def run_steps(kind: str, rank: Rank) -> dict[str, Any]:
    """Three steps as `train` takes them, on this rank's share."""
    module = objective(kind)
    if rank.index:  # DDP hands out the first rank's weights
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    engine = build_engine(module, EngineConfig(), OPTIM, rank)
    order = SampleOrder(BATCH * STEPS, BATCH, 1, 0)
    images, labels, _ = toy_batch(BATCH * STEPS)
    result: dict[str, Any] = {"gradients": [], "norms": [], "sizes": []}
    for step in range(STEPS):
        keys = torch.from_numpy(order.share(step, rank.index, rank.world_size))
        engine.set_lr(0.1 / (step + 1))
        out = engine(images[keys], labels[keys], keys)
        engine.backward(out.loss * (len(keys) * rank.world_size / BATCH))
        result["gradients"].append([p.grad.clone() for p in engine.objective.parameters() if p.grad is not None])
        result["norms"].append(engine.gradient_norm().clone())
        result["sizes"].append(len(keys))
        engine.step()
    engine.objective.end_epoch(rank.all_reduce)
    result["state"] = engine.objective.state_dict()
    result["optimizer"] = engine.state_dict()["state"]
    return result


def run_statistics(rank: Rank) -> dict[str, Any]:
    """Two steps of a net with BatchNorm: statistics before and after they are averaged."""
    engine = build_engine(BothBranches(toy_classifier()), EngineConfig(), OPTIM, rank)
    images, labels, keys = toy_batch(BATCH)
    half = slice(0, 6) if rank.index == 0 else slice(6, 10)
    for _ in range(2):
        engine.backward(engine(images[half], labels[half], keys[half]).loss)
        engine.step()
    own = {name: value.clone() for name, value in engine.objective.named_buffers()}
    average_statistics(engine.objective, rank)
    return {"own": own, "averaged": dict(engine.objective.named_buffers())}


class BothBranches(Objective):
    """Both branches in one loss, each on its own pictures."""

    def losses(self, pixels: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> Output:
        with self.classifier.branch("adv"):
            adv = self.cross_entropy(self.classifier(pixels), labels)
        with self.classifier.branch("clean"):
            clean = self.cross_entropy(self.classifier(1 - pixels), labels)
        return Output(adv + clean, {})


def _worker(index: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=index,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    rank = Rank(index, world_size, CPU)
    result = {kind: run_steps(kind, rank) for kind in ("at", "arat")}
    result["statistics"] = run_statistics(rank)
    dist.barrier()
    torch.save(result, Path(folder) / f"rank{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("two")
    context = spawn(_worker, args=(2, str(folder)), nprocs=2, join=False)
    assert context is not None
    deadline = time.monotonic() + 90
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the two processes hang"
    finally:
        for process in filter(None, context.processes):
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{index}.pt") for index in range(2)]


def assert_close(a: torch.Tensor, b: torch.Tensor, what: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("kind", ["at", "arat"])
def test_two_processes_equal_one(two, kind):
    one = run_steps(kind, Rank(0, 1, CPU))
    assert one["sizes"] == [10] * 3
    assert [part[kind]["sizes"] for part in two] == [[6] * 3, [4] * 3]
    for part in two:
        for step in range(STEPS):
            assert len(part[kind]["gradients"][step]) == len(one["gradients"][step]) > 0
            for i, (a, b) in enumerate(zip(part[kind]["gradients"][step], one["gradients"][step], strict=True)):
                assert_close(a, b, f"step {step}, gradient {i}")
            assert_close(part[kind]["norms"][step], one["norms"][step], f"step {step}, norm")
        for name, value in part[kind]["state"].items():
            assert_close(value, one["state"][name], name)
        for key, state in part[kind]["optimizer"].items():
            assert_close(state["momentum_buffer"], one["optimizer"][key]["momentum_buffer"], key)
    start = objective(kind).state_dict()
    assert any((one["state"][name] - value).abs().max() > 1e-3 for name, value in start.items())


def test_statistics_are_each_ranks_own_until_they_are_averaged(two):
    first, second = (part["statistics"] for part in two)
    names = [name for name in first["own"] if name.endswith(("running_mean", "running_var"))]
    assert len(names) == 8  # two norms, two branches
    for name in names:
        assert not torch.equal(first["own"][name], second["own"][name]), name
        mean = (first["own"][name] + second["own"][name]) / 2
        for part in (first, second):
            assert_close(part["averaged"][name], mean, name)
    for name in set(first["own"]) - set(names):
        assert torch.equal(first["averaged"][name], first["own"][name]), name


def test_gradient_norm_and_clipping_written_out():
    engine = DDPEngine(objective("at"), OPTIM, Rank(0, 1, CPU))
    images, labels, keys = toy_batch()
    engine.set_lr(0.1)
    engine.backward(engine(images, labels, keys).loss)
    parameters = dict(engine.objective.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    assert float(engine.gradient_norm()) == pytest.approx(norm, rel=1e-12)
    assert norm > 0.5  # so that it is clipped
    engine.step()
    for name, parameter in parameters.items():
        decay = 0.01 if name.endswith(("conv1.weight", "conv2.weight", "fc.weight")) else 0
        step = 0.1 * (gradients[name] * 0.5 / (norm + 1e-6) + decay * before[name])
        assert_close(parameter.detach(), before[name] - step, name)
        assert parameter.grad is None


def test_one_rank_needs_no_process_group():
    assert not dist.is_initialized()
    rank = Rank(0, 1, CPU)
    assert rank.is_first
    assert not Rank(1, 2, CPU).is_first
    assert torch.equal(rank.all_reduce(torch.ones(2)), torch.ones(2))
    classifier = toy_classifier()
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    average_statistics(classifier, rank)
    assert all(torch.equal(before[name], value) for name, value in classifier.named_buffers())


def test_deepspeed_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^engine.kind: deepspeed:"):
        build_engine(objective("at"), EngineConfig(kind="deepspeed"), OPTIM, Rank(0, 1, CPU))
