"""Two gloo processes with 6 and 4 samples against the plain layer on all 10 in one process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_two_ranks
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn
from toys import toy_batch, toy_classifier

from arat_dist.attacks import PGD
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.models.split_norm import BATCH_NORMS, AttackMode, SplitNorm, split_norms
from arat_dist.models.sync_norm import SYNCED, global_statistics, synchronise_norms
from arat_dist.objectives.base import to_pixels

ALL = slice(0, 10)
SHARES = (slice(0, 6), slice(6, 10))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# name -> the layer, the shape of the whole batch
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(5), (10, 5)),
    "1d_sequences": (lambda: nn.BatchNorm1d(5), (10, 5, 7)),
    "2d": (lambda: nn.BatchNorm2d(5), (10, 5, 6, 4)),
    "2d_cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (10, 5, 6, 4)),
    "2d_without_weights": (lambda: nn.BatchNorm2d(5, affine=False), (10, 5, 6, 4)),
    "2d_untracked": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (10, 5, 6, 4)),
    "3d": (lambda: nn.BatchNorm3d(5), (10, 5, 3, 2, 2)),
    "act": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU, drop_layer=nn.Tanhshrink), (10, 5, 6, 4)),
    "act_in_place": (lambda: BatchNormAct2d(5, act_layer=nn.ReLU), (10, 5, 6, 4)),
}


def scramble(module: nn.Module) -> None:
    """Every float away from its first value; variances stay above 0."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) if "var" in name else 0.3 * torch.randn_like(value))


def make_layer(kind: str, *, sync: bool) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().double()
    scramble(layer)
    if sync:
        synchronise_norms(layer)
        layer = copy.deepcopy(layer)
    return layer


def run_layer(kind: str, memory_format: str, share: slice, *, sync: bool) -> dict[str, Any]:
    """Two training passes with gradients of a loss that is a sum over samples."""
    layer = make_layer(kind, sync=sync)
    shape = LAYERS[kind][1]
    result: dict[str, Any] = {}
    for i in range(2):
        values, slopes = (torch.randn(shape, dtype=torch.float64)[share] for _ in range(2))
        x = 2 + 3 * values
        x = (x.contiguous(memory_format=FORMATS[memory_format]) if x.ndim == 4 else x).requires_grad_()
        y = layer(x)
        (y * slopes).sum().backward()
        result |= {f"output {i}": y.detach(), f"input gradient {i}": x.grad}
    result["gradients"] = {name: p.grad for name, p in layer.named_parameters()}
    result["buffers"] = dict(layer.named_buffers())
    return result


def evaluates_as_plain(kind: str) -> bool:
    """Whether the layer in evaluation mode gives the plain layer's bits, from this rank's samples alone."""
    x = torch.randn(LAYERS[kind][1], dtype=torch.float64)
    return torch.equal(make_layer(kind, sync=True).eval()(x), make_layer(kind, sync=False).eval()(x))


def run_attack(stats: str, share: slice, *, sync: bool) -> dict[str, Any]:
    """Three PGD steps through each branch of a split net; the attack mode is made before norms are synchronised."""
    classifier = toy_classifier()
    scramble(classifier)
    attack_mode = AttackMode(classifier)
    if sync:
        synchronise_norms(classifier)
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    images, labels, keys = (tensor[share] for tensor in toy_batch(10))
    pixels = to_pixels(images, torch.float64)
    attack = PGD("linf", 0.1, 0.04, 3, seed=3)
    result: dict[str, Any] = {}
    for branch in ("adv", "clean"):
        with attack_mode(stats), classifier.branch(branch):
            result[branch] = attack(lambda x: F.cross_entropy(classifier(x), labels, reduction="sum"), pixels, keys)
    result["unchanged"] = all(torch.equal(before[name], value) for name, value in classifier.named_buffers())
    return result


def run_bf16(share: slice, *, sync: bool) -> dict[str, Any]:
    """A step under autocast, where norms get bf16 and keep float32 weights, and an input gradient inside the region."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Flatten(), nn.Linear(128, 8), nn.BatchNorm1d(8))
    if sync:
        synchronise_norms(net)
    x, slopes = torch.randn(10, 3, 6, 6)[share].requires_grad_(), torch.randn(10, 8)[share]
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        (gradient,) = torch.autograd.grad((y * slopes).sum(), x, retain_graph=True)
    (y * slopes).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"output": y.detach(), "input": gradient, "gradients": gradients, "buffers": dict(net.named_buffers())}


def far_from_zero() -> Tensor:
    """Float32 values whose squares have no digit left for the variance."""
    return 3000 + torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def run_all(rank: Rank) -> dict[str, Any]:
    share = SHARES[rank.index]
    return {
        "layers": {f"{k} {f}": run_layer(k, f, share, sync=True) for k in LAYERS for f in FORMATS},
        "evaluates_as_plain": {kind: evaluates_as_plain(kind) for kind in LAYERS},
        "attack": {stats: run_attack(stats, share, sync=True) for stats in ("batch", "running")},
        "bf16": run_bf16(share, sync=True),
        "far": [*global_statistics(far_from_zero()[share])],
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(run_all, tmp_path_factory.mktemp("two"))


def assert_close(a: Tensor, b: Tensor, what: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", LAYERS)
def test_unequal_shares_equal_the_plain_layer_on_the_whole_batch(two, kind, memory_format):
    one = run_layer(kind, memory_format, ALL, sync=False)
    alone = run_layer(kind, memory_format, SHARES[0], sync=False)
    first, second = (part["layers"][f"{kind} {memory_format}"] for part in two)
    for i in range(2):
        for name in (f"output {i}", f"input gradient {i}"):
            assert_close(torch.cat([first[name], second[name]]), one[name], name)
            assert (alone[name] - one[name][SHARES[0]]).abs().max() > 1e-3, name
    for name, gradient in one["gradients"].items():
        assert_close(first["gradients"][name] + second["gradients"][name], gradient, name)
    assert list(first["buffers"]) == list(one["buffers"])
    for name, value in one["buffers"].items():
        assert_close(first["buffers"][name], value, name)
        assert torch.equal(first["buffers"][name], second["buffers"][name]), name


def test_evaluation_mode_is_the_plain_layer_among_ranks_too(two):
    for part in two:
        assert part["evaluates_as_plain"] == dict.fromkeys(LAYERS, True)


@pytest.mark.parametrize("stats", ["batch", "running"])
def test_an_attack_through_split_norms_is_the_whole_batchs(two, stats):
    one = run_attack(stats, ALL, sync=False)
    parts = [part["attack"][stats] for part in two]
    for branch in ("adv", "clean"):
        assert_close(torch.cat([part[branch] for part in parts]), one[branch], branch)
    assert not torch.equal(one["adv"], one["clean"])
    assert all(part["unchanged"] for part in parts)
    # With running statistics a sample's attack knows nothing of its batch; with the batch's it does.
    alone = run_attack(stats, SHARES[0], sync=False)["adv"]
    assert torch.allclose(alone, one["adv"][SHARES[0]], rtol=0, atol=1e-12) == (stats == "running")


def test_bf16_autocast_is_close_to_the_whole_batchs(two):
    one, (first, second) = run_bf16(ALL, sync=False), (part["bf16"] for part in two)
    assert first["output"].dtype == torch.bfloat16
    assert_close(torch.cat([first["output"], second["output"]]), one["output"], "output", 0.05)
    for name, gradient in one["gradients"].items():
        own = first["gradients"][name] + second["gradients"][name]
        assert own.dtype == torch.float32
        # Biases in front of a BatchNorm have no gradient but rounding.
        if gradient.norm() > 1:
            assert F.cosine_similarity(own.flatten(), gradient.flatten(), dim=0) > 0.995, name
    inputs = torch.cat([first["input"], second["input"]])
    assert F.cosine_similarity(inputs.flatten(), one["input"].flatten(), dim=0) > 0.995
    for name, value in one["buffers"].items():
        assert_close(first["buffers"][name], value, name, 1e-4)


def test_a_mean_far_from_zero_leaves_the_variance_its_digits(two):
    x = far_from_zero().double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    for part in two:
        assert_close(part["far"][0].double(), mean, "mean", 1e-3)
        assert_close(part["far"][1].double(), var, "var", 1e-5)
        assert part["far"][2].tolist() == [640]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_rank_is_the_plain_layer_bit_for_bit(tmp_path: Path, kind, group):
    if group:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        synced, plain = (run_layer(kind, "channels_last", ALL, sync=sync) for sync in (True, False))
    finally:
        if group:
            dist.destroy_process_group()
    for name in ("gradients", "buffers"):
        synced |= synced.pop(name)
        plain |= plain.pop(name)
    assert list(synced) == list(plain)
    assert all(torch.equal(synced[name], plain[name]) for name in plain)


@pytest.mark.parametrize("split_first", [False, True])
def test_only_the_class_changes(split_first):
    net: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    )
    plain = copy.deepcopy(net)
    split_norms(plain, "batch")
    steps = [lambda: split_norms(net, "batch"), lambda: synchronise_norms(net)]
    for step in steps if split_first else reversed(steps):
        step()
    synchronise_norms(net)  # once more changes nothing
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(isinstance(net[i], SplitNorm) for i in (1, 2))
    assert type(net[3]) is nn.GroupNorm
    for norm in (net[1].adv, net[1].clean, net[2].adv, net[2].clean):
        assert type(norm) in SYNCED.values()
        assert isinstance(norm, BATCH_NORMS)
    assert isinstance(net[1].clean, BatchNormAct2d)
    assert isinstance(net[1].clean.act, nn.SiLU)
    twin = copy.deepcopy(net)
    assert type(twin[1].clean) is type(net[1].clean)
    assert twin[1].clean.weight is not net[1].clean.weight


def test_a_kind_without_a_synchronised_version_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SplitBatchNorm2d(4))
    with pytest.raises(UserError, match=r"^train\.sync_norms: true: 1 is a SplitBatchNorm2d.*false would be right$"):
        synchronise_norms(net)
