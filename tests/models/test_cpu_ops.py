"""The versions for CPUs against torch's own operations, forward and backward, and in whole nets."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_dist.models import cpu_ops
from arat_dist.models.cpu_ops import CpuOps, on_cpu

Operation = Callable[..., Tensor]


def results(operation: Operation, *tensors: Tensor, **settings: Any) -> list[Tensor]:
    """What it yields, and the gradient of a bent sum of that with respect to each tensor."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = operation(*leaves, **settings)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


def assert_same(operation: str, *tensors: Tensor, is_ours: bool = True, **settings: Any) -> None:
    """Ours equals torch's; and it is ours, or torch's, that the mode runs."""
    torchs, ours = getattr(F, operation), getattr(cpu_ops, operation)
    for found, expected in zip(results(ours, *tensors, **settings), results(torchs, *tensors, **settings), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    with CpuOps():
        within = torchs(*(t.requires_grad_() for t in tensors), **settings)
    assert kind(within) == kind(ours(*tensors, **settings))
    assert (kind(within) != kind(torchs(*tensors, **settings))) == is_ours


def kind(result: Tensor) -> str:
    """The operation that made a result."""
    return type(result.grad_fn).__name__


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, **{"training": True, **settings})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(6, 5, 7, 9), (2, 3, 1, 1), (3, 600, 5, 5), (4, 1, 64, 64), (7, 11, 1, 13)])
def test_batch_norm(shape):
    x, weight, bias = channels_last(normal(*shape) * 3 + 2), normal(shape[1]), normal(shape[1])
    with CpuOps():
        found = results(batch_norm, x, weight, bias, eps=1e-3)
    for ours, torchs in zip(found, results(batch_norm, x, weight, bias, eps=1e-3), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-9)


def test_batch_norm_moves_the_running_statistics_as_torch_does():
    x, weight, bias = channels_last(normal(4, 3, 5, 5)), normal(3), normal(3)
    expected, found = (normal(3), normal(3).exp()), (normal(3), normal(3).exp())
    for ours, torchs in zip(found, expected, strict=True):
        ours.copy_(torchs)
    before = found[0].clone()
    F.batch_norm(x, *expected, weight, bias, True, 0.3)
    cpu_ops.batch_norm(x, *found, weight, bias, True, 0.3)
    assert not torch.equal(found[0], before)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_keeps_its_digits_where_the_mean_is_large():
    x = channels_last(normal(8, 4, 16, 16) + 1000)
    weight, bias = torch.ones(4), torch.zeros(4)
    found = cpu_ops.batch_norm(x.float(), None, None, weight, bias, True)
    expected = F.batch_norm(x.float().double(), None, None, weight.double(), bias.double(), True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)  # a difference of squares errs by 0.03


@pytest.mark.parametrize("change", ["evaluation", "contiguous", "matrix", "no weight"])
def test_other_batch_norms_stay_with_torch(change):
    x, factors = channels_last(normal(4, 3, 5, 6)).requires_grad_(), (normal(3), normal(3))
    x = {"contiguous": x.contiguous(), "matrix": x[:, :, 0, 0]}.get(change, x)
    weight, bias = (None, None) if change == "no weight" else factors
    means, variances = normal(3), normal(3).exp()

    def run() -> Tensor:
        return F.batch_norm(x, means.clone(), variances.clone(), weight, bias, change != "evaluation")

    with CpuOps():
        found = run()
    assert kind(found) == kind(run())
    assert torch.equal(found, run())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("size", "kernel"), [((8, 12), (4, 4)), ((6, 6), (2, 3)), ((16, 16), (16, 16))])
def test_convolution_of_patches(size, kernel, with_bias):
    bias = [normal(7)] if with_bias else []
    assert_same("conv2d", channels_last(normal(2, 3, *size)), normal(7, 3, *kernel), *bias, stride=kernel)


@pytest.mark.parametrize(
    "settings",
    [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "dilation": 2}, {"stride": 2, "groups": 2}],
    ids=str,
)
def test_other_convolutions_stay_with_torch(settings):
    weight = normal(6, 4 // settings.get("groups", 1), 2, 2)
    assert_same("conv2d", normal(2, 4, 8, 8), weight, is_ours=False, **settings)


def test_a_convolution_that_leaves_pixels_out_stays_with_torch():
    assert_same("conv2d", normal(2, 3, 9, 8), normal(5, 3, 4, 4), is_ours=False, stride=4)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(10, 10), (3, 8), (1, 1)])
def test_attention(num_queries, num_keys):
    query, key, value = normal(2, 3, num_queries, 4), normal(2, 3, num_keys, 4), normal(2, 3, num_keys, 4)
    assert_same("scaled_dot_product_attention", query, key, value)


def test_attention_does_not_overflow():
    query = key = 1e4 * normal(1, 1, 6, 4)
    out = cpu_ops.scaled_dot_product_attention(query, key, normal(1, 1, 6, 4))
    assert out.isfinite().all()


@pytest.mark.parametrize("shapes", [((3, 2), (1, 2)), ((1, 2), (3, 2)), ((2, 4), (2, 1))], ids=str)
def test_attention_that_is_spread_stays_with_torch(shapes):
    query, key, value = normal(*shapes[0], 5, 4), normal(*shapes[1], 5, 4), normal(*shapes[1], 5, 4)
    assert_same("scaled_dot_product_attention", query, key, value, is_ours=False)


@pytest.mark.parametrize("operation", ["batch_norm", "scaled_dot_product_attention"])
def test_gradients_in_bf16_are_about_as_good_as_torchs(operation):
    """Against float64, at the sizes that nets have; sharp attention, and a mean that is large for its deviation."""
    torchs: Operation = F.scaled_dot_product_attention
    tensors = tuple(2 * normal(2, 3, 197, 64) for _ in range(3))
    if operation == "batch_norm":
        torchs, tensors = batch_norm, (channels_last(normal(8, 64, 28, 28) * 2 + 5), normal(64), normal(64))
    rounded = [t.bfloat16() if t.ndim == 4 else t.float() for t in tensors]
    exact = results(torchs, *(t.double() for t in rounded))
    with CpuOps():
        found = results(torchs, *rounded)
    mine, reference = (
        [float((one.double() - right).norm() / right.norm()) for one, right in zip(each, exact, strict=True)]
        for each in (found, results(torchs, *rounded))
    )
    # Scores rounded to bf16 cost the gradient digits that torch's fused kernel keeps; unfused attention does the same.
    most = 1.5 if operation == "batch_norm" else 8
    assert all(a < most * b for a, b in zip(mine, reference, strict=True)), (mine, reference)


@pytest.mark.parametrize(
    "settings", [{"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.zeros(5, 5).double()}], ids=str
)
def test_other_attention_stays_with_torch(settings):
    query, key, value = (normal(1, 2, 5, 4) for _ in range(3))
    assert_same("scaled_dot_product_attention", query, key, value, is_ours=False, **settings)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_whole_net(name):
    """With norms, patches and attention of its own, in float64."""
    arguments: dict[str, dict[str, Any]] = {
        "resnet10t": {"zero_init_last": False},
        "vit_tiny_patch16_224": {"img_size": 32},
    }
    net = timm.create_model(name, num_classes=10, **arguments.get(name, {})).double().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pixels = channels_last(normal(4, 3, 32, 32))
    for found, expected in zip(results(on_cpu(net), pixels), results(net, pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_in_bf16_under_autocast_attention_takes_mixed_numbers():
    """A net that normalises its queries hands them over in float32, its values in bf16."""
    query, key, value = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16), CpuOps():
        out = F.scaled_dot_product_attention(query, key, value.bfloat16())
        out.float().sum().backward()
    expected = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    assert query.grad is not None
    assert query.grad.isfinite().all()
