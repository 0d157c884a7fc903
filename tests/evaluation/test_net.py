"""The copy that attacks see is the same function as the net, and the net is as before."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from toys import toy_classifier

from arat_dist.evaluation.net import attacked, fast_copy, fold_norms
from arat_dist.models.classifier import Classifier


def with_statistics(net: nn.Module) -> nn.Module:
    """Norms that have seen something: a folded identity would prove nothing."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape  # pyright: ignore[reportOptionalMemberAccess]
            module.running_mean = 0.2 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.2 * torch.randn(shape, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "num_left"),
    [
        ("resnet10t", 0),
        ("mobilenetv3_small_050", 0),  # BatchNormAct2d: the activation stays
        ("vit_tiny_patch16_224", 0),
        ("densenet121", None),  # norms before convolutions: some can't be folded
    ],
)
def test_a_copy_gives_the_nets_logits(name, num_left):
    torch.manual_seed(0)
    args: dict[str, Any] = {"img_size": 64} if name.startswith("vit") else {}
    classifier = Classifier(with_statistics(timm.create_model(name, num_classes=5, **args)), [0.5] * 3, [0.3] * 3)
    classifier.eval()
    probe, pixels = torch.rand(2, 3, 64, 64), torch.rand(3, 3, 64, 64)
    copy = fast_copy(classifier, probe)
    with torch.no_grad():
        expected = classifier(pixels)
        assert (copy(pixels) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    left = sum(isinstance(m, nn.BatchNorm2d) for m in copy.modules())
    before = sum(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())
    assert left == num_left if num_left is not None else 0 < left < before
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in classifier.parameters())


@pytest.mark.parametrize("branch", ["adv", "clean"])
def test_a_copy_is_of_one_branch(branch):
    classifier = toy_classifier().eval()
    pixels = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    copy = fast_copy(classifier, pixels, branch)
    with torch.no_grad(), classifier.branch(branch):
        torch.testing.assert_close(copy(pixels), classifier(pixels), rtol=1e-9, atol=1e-9)
    with torch.no_grad(), classifier.branch("clean" if branch == "adv" else "adv"):
        assert (copy(pixels) - classifier(pixels)).abs().max() > 1e-3


class Shared(nn.Module):
    """A convolution whose output the norm takes, and something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.fc((self.norm(y) + y).mean((2, 3)))


def test_where_folding_changes_the_logits_the_net_is_left_as_it_is(caplog):
    classifier = Classifier(with_statistics(Shared()), [0.0] * 3, [1.0] * 3).eval()
    pixels = torch.rand(4, 3, 8, 8)
    with caplog.at_level("INFO"):
        copy = fast_copy(classifier, pixels)
    assert "folding BatchNorm would change the logits" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(copy(pixels), classifier(pixels), rtol=1e-6, atol=1e-6)


def test_a_norm_that_runs_twice_is_not_folded():
    class Twice(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc((self.norm(self.conv(x)) + self.norm(self.conv(x * x))).mean((2, 3)))

    classifier = Classifier(with_statistics(Twice()), [0.0] * 3, [1.0] * 3).eval()
    assert fold_norms(classifier, torch.rand(2, 3, 8, 8)) == 0


def test_attacked_freezes_the_weights_and_puts_everything_back():
    classifier = toy_classifier().train()
    beats: list[int] = []
    next(classifier.parameters()).requires_grad_(False)
    wanted = [p.requires_grad for p in classifier.parameters()]
    buffers = {name: value.clone() for name, value in classifier.named_buffers()}
    pixels = torch.rand(4, 3, 16, 16, dtype=torch.float64).requires_grad_()
    with attacked(classifier, beat=lambda: beats.append(1)) as net:
        net(pixels).sum().backward()
        assert not any(m.training for m in classifier.modules())
    assert len(beats) == 1
    assert pixels.grad is not None
    assert all(p.grad is None for p in classifier.parameters())
    assert [p.requires_grad for p in classifier.parameters()] == wanted
    assert all(m.training for m in classifier.modules())
    assert all(torch.equal(buffers[name], value) for name, value in classifier.named_buffers())


def test_half_precision_is_asked_for():
    classifier = Classifier(with_statistics(timm.create_model("resnet10t", num_classes=5)), [0.5] * 3, [0.3] * 3)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), attacked(classifier, "fp32") as full:
        exact = full(pixels)
    with torch.no_grad(), attacked(classifier, "bf16") as half:
        rounded = half(pixels)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.2 * exact.abs().max()
