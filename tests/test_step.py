"""A step in parts, and a step that fp16 has to take twice."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from test_engine import BATCH, OPTIM, SIDE, from_recipe, objective
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import toy_batch, toy_classifier, toy_setting

from arat_dist.config import ARATConfig, EngineConfig
from arat_dist.data.loader import Batch
from arat_dist.data.order import SampleOrder
from arat_dist.engine import DDPEngine, Rank, build_engine
from arat_dist.objectives import ARAT
from arat_dist.step import compute_gradients, micro_batches, part_sizes
from arat_dist.train import seed_step

CPU = torch.device("cpu")
ALONE = Rank(0, 1, CPU)


def share_of(rank: Rank) -> Batch:
    images, labels, _ = toy_batch(BATCH, side=SIDE)
    keys = torch.from_numpy(SampleOrder(BATCH, BATCH, 1, 0).share(0, rank.index, rank.world_size))
    return Batch(images[keys], labels[keys], keys)


def gradients_in_parts(rank: Rank, num_parts: int) -> dict[str, Any]:
    """A step's gradients, and how many all-reduces of gradients DDP made."""
    engine = DDPEngine(objective("arat"), OPTIM, rank)
    reduced = []
    if rank.world_size > 1:
        assert isinstance(engine._wrapped, DistributedDataParallel)

        def count(_state, bucket):
            reduced.append(bucket.buffer().numel())
            work = dist.all_reduce(bucket.buffer().div_(rank.world_size), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        engine._wrapped.register_comm_hook(None, count)
    parts = micro_batches(share_of(rank), num_parts, BATCH, rank)
    result = compute_gradients(engine, parts, rank.world_size / BATCH, lambda: None)
    gradients = {name: p.grad.clone() for name, p in engine.objective.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "sizes": [n for _, n in result.metrics], "reduced": sum(reduced)}


def run_parts(rank: Rank) -> dict[int, dict[str, Any]]:
    return {num_parts: gradients_in_parts(rank, num_parts) for num_parts in (1, 2)}


def synced_parts(rank: Rank) -> list[int]:
    """With norms over all ranks, every rank must make as many passes."""
    engine = build_engine(from_recipe("at", "batch"), EngineConfig(), OPTIM, rank)
    parts = micro_batches(share_of(rank), 3, BATCH, rank)
    return [n for _, n in compute_gradients(engine, parts, rank.world_size / BATCH, lambda: None).metrics]


def run_all(rank: Rank) -> dict[str, Any]:
    return {"parts": run_parts(rank), "synced": synced_parts(rank)}


@pytest.mark.parametrize(
    ("num_samples", "num_parts", "sizes"),
    [(8, 1, [8]), (8, 2, [4, 4]), (10, 2, [4, 6]), (11, 2, [4, 7]), (12, 5, [2, 2, 2, 2, 4]), (3, 1, [3]), (1, 1, [1])],
)
def test_parts_are_cut_between_pairs(num_samples, num_parts, sizes):
    assert part_sizes(num_samples, num_parts) == sizes


def test_a_small_batch_has_fewer_parts():
    images, labels, keys = toy_batch(4)
    assert [len(p.labels) for p in micro_batches(Batch(images, labels, keys), 8, 4, ALONE)] == [2, 2]
    assert torch.equal(torch.cat([p.images for p in micro_batches(Batch(images, labels, keys), 8, 4, ALONE)]), images)


def test_parts_add_up_to_the_whole_on_one_rank_and_on_two(tmp_path):
    """In float64, on a net whose samples know nothing of each other; one all-reduce a step however many parts."""
    whole = gradients_in_parts(ALONE, 1)["gradients"]
    two = on_two_ranks(run_all, tmp_path)
    cases = [gradients_in_parts(ALONE, n) for n in (2, 5)] + [part["parts"][n] for part in two for n in (1, 2)]
    for case in cases:
        assert case["gradients"].keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(case["gradients"][name], gradient, rtol=0, atol=1e-9, msg=name)
    assert [case["sizes"] for case in cases] == [[4, 6], [2] * 5, [6], [2, 4], [4], [2, 2]]
    num_weights = sum(g.numel() for g in whole.values())
    assert [case["reduced"] for case in cases[2:]] == [num_weights] * 4
    assert [part["synced"] for part in two] == [[2, 4], [2, 2]]


class Fp16Engine(DDPEngine):
    """Counts its tries; `factor` spoils the loss."""

    tries, factor = 0, 1.0

    def backward(self, loss: torch.Tensor) -> None:
        self.tries += 1
        super().backward(loss * self.factor)


def fp16_engine(scale: float) -> Fp16Engine:
    config = ARATConfig(name="arat", gamma=3, adv_weight=0.25)
    arat = ARAT(toy_classifier(), toy_setting(ARAT, precision="fp16"), config).float().train()
    arat.classifier.backbone.register_module("fc", nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)))
    with torch.no_grad():
        for i, parameter in enumerate(arat.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    engine = Fp16Engine(arat, OPTIM, ALONE, scales_loss=True)
    engine.load_state_dict(engine.state_dict() | {"loss_scale": engine._scaler.state_dict() | {"scale": scale}})
    return engine


def fp16_step(engine: Fp16Engine) -> tuple[int, dict[str, torch.Tensor]]:
    """Tries that overflowed, and all weights, statistics and counts afterwards."""
    engine.set_lr(0.1)
    result = compute_gradients(engine, [Batch(*toy_batch())], 1 / 12, partial(seed_step, 0, 0, ALONE))
    engine.step()
    return result.num_overflows, {name: value.clone() for name, value in engine.objective.state_dict().items()}


def test_a_step_that_overflows_is_done_again_with_the_same_batch():
    at_once, again = fp16_engine(2.0**8), fp16_engine(2.0**24)
    num_overflows, weights = fp16_step(at_once)
    assert num_overflows == 0
    num_overflows, others = fp16_step(again)
    assert num_overflows > 0
    assert again.tries == num_overflows + 1
    assert again.state_dict()["loss_scale"]["scale"] == 2.0 ** (24 - num_overflows)
    start = fp16_engine(1.0).objective.state_dict()
    for name, value in weights.items():
        if name in dict(again.objective.named_parameters()):
            torch.testing.assert_close(others[name], value, rtol=0.01, atol=1e-3, msg=name)
        else:  # dropout, statistics and counts are those of one try
            torch.testing.assert_close(others[name], value, rtol=0, atol=0, msg=name)
        assert name == "adv_weight" or name == "counts" or not torch.equal(value, start[name]), name
    assert again.objective.get_buffer("local_counts")[1] == 12


def test_a_gradient_whose_norm_overflows_is_tried_at_half_the_scale():
    """The scaler itself sees no infinity there."""
    engine = fp16_engine(2.0**8)
    weight = next(engine.objective.parameters())
    engine.backward(weight.sum())
    weight.grad = torch.full_like(weight, 1e30)
    assert not engine.is_finite()
    assert engine.loss_scale == 2.0**7


def test_a_state_without_a_scale_leaves_the_own_one():
    engine = fp16_engine(2.0**8)
    engine.load_state_dict(engine.state_dict() | {"loss_scale": None})
    assert engine.loss_scale == 2.0**8


def test_a_step_that_is_no_number_at_any_scale_is_skipped_and_says_nothing_of_scales():
    """Neither weights nor momentum move, and the next step is taken at once, at the scale of the one before."""
    engine = fp16_engine(2.0**8)
    fp16_step(engine)
    before = {name: value.clone() for name, value in engine.objective.named_parameters()}
    momentum = [value.clone() for value in engine.held().optimizer_state]
    engine.tries, engine.factor = 0, float("inf")
    compute_gradients(engine, [Batch(*toy_batch())], 1 / 12, lambda: None)
    assert not engine.step().isfinite()
    assert 1 < engine.tries < 30
    assert all(torch.equal(value, before[name]) for name, value in engine.objective.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(engine.held().optimizer_state, momentum, strict=True))
    engine.tries, engine.factor = 0, 1.0
    num_overflows, after = fp16_step(engine)
    assert (num_overflows, engine.tries, engine.loss_scale) == (0, 1, 2.0**8)
    assert not any(torch.equal(after[name], value) for name, value in before.items())


def test_the_scale_grows_after_enough_steps():
    engine = fp16_engine(2.0**8)
    engine._scaler.set_growth_interval(2)
    scales = []
    for _ in range(4):
        fp16_step(engine)
        scales.append(engine.loss_scale)
    assert scales == [2.0**8, 2.0**9, 2.0**9, 2.0**10]
