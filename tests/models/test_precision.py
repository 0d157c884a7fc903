"""Weights of a step: cast once, followed by their gradients; and gradients that fp16 would lose."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import toy_batch, toy_classifier, toy_setting

from arat_dist.config import ARATConfig
from arat_dist.models.precision import StepWeights, amplified
from arat_dist.objectives import ARAT


class Net(nn.Module):
    """A convolution, a norm and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(self.conv(x).float()).mean((2, 3))
        return self.second(self.first(normed.to(self.first.weight.dtype)))


def held(module: nn.Module) -> list[torch.Tensor]:
    """What stands where a layer's parameters are."""
    return [p for p in module._parameters.values() if p is not None]


class WeightCasts(TorchDispatchMode):
    """Counts casts of float32 tensors to bf16 by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return out


def arat_in(precision: str, **attack: Any) -> ARAT:
    config = ARATConfig(name="arat", gamma=3)
    return ARAT(toy_classifier(), toy_setting(ARAT, precision=precision, **attack), config).float().train()


def test_convolutions_and_linear_layers_are_cast_and_the_master_weights_come_back():
    net = Net()
    masters = dict(net.named_parameters())
    with StepWeights(net, torch.bfloat16).cast():
        assert {p.dtype for p in (net.conv.weight, *held(net.conv), *held(net.second))} == {torch.bfloat16}
        assert net.norm.weight is masters["norm.weight"]
        assert net.first.weight is net.second.weight
    assert all(net.get_parameter(name) is p for name, p in masters.items())
    with contextlib.suppress(RuntimeError), StepWeights(net, torch.bfloat16).cast():
        net(torch.rand(2, 5, 8, 8))
    assert all(net.get_parameter(name) is p for name, p in masters.items())


def test_gradients_reach_the_master_weights():
    net, x = Net(), torch.rand(2, 3, 8, 8)
    net(x).square().sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    with StepWeights(net, torch.float64).cast():
        loss = net(x.double()).square().sum()
    loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_without_a_dtype_weights_stay_what_they_are():
    net = Net()
    with StepWeights(net, None).cast():
        assert net.conv.weight is dict(net.named_parameters())["conv.weight"]


def test_detached_weights_share_memory_and_ask_for_no_gradient():
    net = Net()
    weights = StepWeights(net, torch.bfloat16)
    with weights.cast():
        cast = net.conv.weight
        with weights.detached():
            assert not any(p.requires_grad for p in (net.conv.weight, net.norm.weight, net.first.weight))
            assert net.conv.weight.data_ptr() == cast.data_ptr()
        assert net.conv.weight is cast
        assert cast.requires_grad


def test_a_step_casts_every_weight_once():
    """Whatever the number of attack steps, as the passes share the cast weights."""
    arat, batch = arat_in("bf16", steps=4), toy_batch()
    with WeightCasts() as casts:
        arat(*batch)
    layers = [m for m in arat.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shapes = [tuple(p.shape) for layer in layers for p in layer.parameters()]
    assert len(shapes) == 5 + 2 * 3  # the net and two predictors
    for shape in shapes:
        assert casts.shapes.count(shape) == shapes.count(shape), shape


def test_the_attack_sees_no_weight_that_asks_for_a_gradient():
    arat = arat_in("bf16")
    seen = []

    def look(net: nn.Module, _args: object) -> None:
        seen.append({p.requires_grad for m in net.modules() for p in held(m)})

    arat.classifier.backbone.register_forward_pre_hook(look)
    arat(*toy_batch())
    assert seen == [{False}] * 3 + [{True}] * 2


class Sure(nn.Module):
    """Logits so sure of themselves that the gradient of the loss has no place in fp16 unless it is amplified."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(0))), size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = pixels.to(self.weight.dtype).flatten(1) @ self.weight.T
        return logits * 0.01 + logits.new_tensor([self.size, 0, 0])


@pytest.mark.parametrize("size", [0.0, 17.0])
def test_an_attack_in_fp16_gets_the_gradient_of_fp32(size):
    pixels = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(4, dtype=torch.long)

    def gradient(dtype: torch.dtype, *, amplify: bool) -> torch.Tensor:
        net = Sure(size).to(dtype)
        x = pixels.clone().requires_grad_()
        logits = (amplified(net) if amplify else net)(x).float()
        return torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), x)[0]

    exact = gradient(torch.float32, amplify=False)
    tolerance = 0.02 * float(exact.abs().max())
    torch.testing.assert_close(gradient(torch.float16, amplify=True), exact, rtol=0.05, atol=tolerance)
    lost = gradient(torch.float16, amplify=False) == 0
    assert lost.any() == (size == 17.0)  # unless it is amplified


def test_what_is_no_number_stands_still():
    x = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    logits = amplified(lambda pixels: pixels.flatten(1) * float("inf"))(x)
    assert torch.equal(torch.autograd.grad(logits.sum(), x)[0].isfinite(), torch.ones(1, 3, 2, 2, dtype=torch.bool))


def test_fp16_attacks_like_fp32():
    images, labels, keys = toy_batch()
    pixels = images / 255
    found = {}
    for precision in ("fp32", "fp16"):
        arat = arat_in(precision)
        with arat.passes(len(images), images.device):
            found[precision] = arat.perturb(pixels, labels, keys)
    same = (found["fp16"] - found["fp32"]).abs() < 1e-6
    assert same.float().mean() > 0.95
    assert (found["fp16"] - pixels).abs().max() > 0.05
