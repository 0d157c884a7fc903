"""Weights of a step: cast once, followed by their gradients; and gradients that fp16 would lose."""

import contextlib
from typing import Any

import pytest
import timm
import torch
from pydantic import TypeAdapter
from torch import nn
from toys import WeightCasts, toy_batch, toy_classifier, toy_setting

from arat_dist.config import ARATConfig, ObjectiveConfig
from arat_dist.models.precision import StepWeights, amplified, is_cast
from arat_dist.objectives import ARAT, METHODS


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


def test_convolutions_that_standardise_their_weights_keep_them_in_full_precision():
    net = timm.create_model("resnetv2_50x1_bit", num_classes=3)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    standardised = [m for m in convolutions if "Std" in type(m).__name__]
    assert standardised
    assert not any(is_cast(m) for m in standardised)
    assert all(is_cast(m) for m in timm.create_model("resnet10t").modules() if isinstance(m, nn.Conv2d))


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


def test_all_weights_cast_together_are_those_cast_one_by_one():
    """Copies, and gradients of a net with a frozen layer and a weight that two layers share, bit for bit."""
    net, x = Net(), torch.rand(2, 3, 8, 8)
    net.second.bias.requires_grad_(False)
    found = []
    for together in (False, True):
        net.zero_grad()
        with StepWeights(net, torch.bfloat16, together=together).cast():
            copies = {id(p): p.detach().clone() for module in net.modules() for p in held(module)}
            assert net.first.weight is net.second.weight
            assert net.first.weight.dtype is torch.bfloat16
            assert not net.second.bias.requires_grad
            loss = net(x.bfloat16()).float().square().sum()
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        found.append((list(copies.values()), gradients))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert (gradient is None) == (other is None) == (name == "second.bias"), name
        if gradient is not None:
            assert gradient.dtype is torch.float32
            assert torch.equal(gradient, other), name


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
    """Logits whose first class leads by `size` [B,1]: at 17 the loss has a gradient that fp16 can't hold."""

    def __init__(self, size: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(0))), size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = pixels.to(self.weight.dtype).flatten(1) @ self.weight.T
        return logits * 0.01 + self.size.to(logits.dtype) * logits.new_tensor([1, 0, 0])


def sure_gradient(size: float, dtype: torch.dtype, *, per_sample: bool | None, others: int = 0) -> torch.Tensor:
    """Of the loss with respect to four pictures; `others` more in the batch are not sure of anything."""
    pixels = torch.rand(4 + others, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    sure = torch.cat([torch.full((4, 1), size), torch.zeros(others, 1)])
    net = Sure(sure).to(dtype)
    x = pixels.clone().requires_grad_()
    logits = (net if per_sample is None else amplified(net, per_sample=per_sample))(x).float()
    labels = torch.zeros(4 + others, dtype=torch.long)
    return torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), x)[0][:4]


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("size", [0.0, 17.0])
def test_a_gradient_in_fp16_is_that_of_fp32(size, per_sample):
    exact = sure_gradient(size, torch.float32, per_sample=None)
    assert_near(sure_gradient(size, torch.float16, per_sample=per_sample), exact)
    lost = sure_gradient(size, torch.float16, per_sample=None) == 0
    assert lost.any() == (size == 17.0)  # unless it is amplified


def test_with_a_factor_a_sample_unsure_others_take_nothing_away():
    exact = sure_gradient(20.0, torch.float32, per_sample=None, others=3)
    assert_near(sure_gradient(20.0, torch.float16, per_sample=True, others=3), exact)
    assert not sure_gradient(20.0, torch.float16, per_sample=False, others=3).any()  # the price of one for all


@pytest.mark.parametrize("per_sample", [True, False])
def test_what_is_no_number_stands_still(per_sample):
    x = torch.full((2, 3, 2, 2), 0.5, requires_grad=True)
    factors = torch.tensor([[float("inf")], [1.0]])
    logits = amplified(lambda pixels: pixels.flatten(1) * factors, per_sample=per_sample)(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.isfinite().all()
    if per_sample:
        assert gradient[1].eq(1).all()


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


@pytest.mark.parametrize(("method", "norm_stats"), [("trades", "running"), ("mart", "batch")])
def test_every_method_amplifies_its_attack_in_fp16(method, norm_stats):
    """A net that is sure of all its pictures, by more than fp16 can tell."""
    found = {}
    for precision in ("fp32", "fp16"):
        build: Any = METHODS[method]
        module = build(
            toy_classifier(split=False),
            toy_setting(METHODS[method], precision=precision, loss="ce", norm_stats=norm_stats, start="uniform"),
            TypeAdapter(ObjectiveConfig).validate_python({"name": method}),
        ).float()
        net: Any = module.classifier.backbone
        with torch.no_grad():
            net.fc.bias += torch.tensor([40.0, 0, 0])
        images, _, keys = toy_batch()
        with module.passes(len(images), images.device):
            found[precision] = module.perturb(images / 255, torch.zeros(12, dtype=torch.long), keys)
    assert ((found["fp16"] - found["fp32"]).abs() < 1e-6).float().mean() > 0.9
