"""The project's own nets."""

from typing import Any

import timm
import torch

import arat_dist.models


def sizes(net: Any) -> dict[str, tuple[int, ...]]:
    """Shape of the output of each part, without the batch, for a 32x32 picture."""
    seen = {}
    for name, part in net.named_children():
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    net.eval()(torch.rand(1, 3, 32, 32))
    return seen


def test_cifar_resnet18_has_the_papers_size_and_shapes():
    assert arat_dist.models.cifar
    net: Any = timm.create_model("cifar_resnet18", num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    shapes = sizes(net)
    assert shapes["conv1"] == (64, 32, 32)
    stages = [shapes[f"layer{i}"] for i in range(1, 5)]
    assert stages == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert [stage["reduction"] for stage in net.feature_info] == [1, 1, 2, 4, 8]
    assert net.pretrained_cfg["mean"] == (0, 0, 0)
    assert net.pretrained_cfg["std"] == (1, 1, 1)
    assert net.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_last_norm_of_a_block_starts_at_one():
    net: Any = timm.create_model("cifar_resnet18")
    assert (net.layer4[1].bn2.weight == 1).all()


def test_channels_make_it_narrow_from_the_stem_on():
    shapes = sizes(timm.create_model("cifar_resnet18", channels=[8, 12, 16, 20], num_classes=3))
    assert shapes["conv1"] == (8, 32, 32)
    assert shapes["layer4"] == (20, 4, 4)
    assert shapes["fc"] == (3,)
