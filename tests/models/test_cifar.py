"""The project's own nets: their published sizes, and a forward pass written out from the papers."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from exports import export
from torch import Tensor

import arat_dist.models
from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.export import load_exported
from arat_dist.models.classifier import build_classifier
from arat_dist.models.split_norm import SplitNorm
from arat_dist.models.taps import automatic_taps

PREACT = {
    "cifar_preact_resnet18": {"channels": [8, 16, 24, 32]},
    "cifar_wrn_34_10": {"depth": 16, "width": 2},
}
WRN_TAPS = (*(f"stages.2.blocks.{block}.norm{i}" for block in range(5) for i in (1, 2)), "head.global_pool")


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


# Millions of parameters with 10 classes, as the papers print them.
@pytest.mark.parametrize(
    ("name", "args", "num_parameters", "published"),
    [
        ("cifar_preact_resnet18", {}, 11_172_170, "11.17"),
        ("cifar_wrn_34_10", {}, 46_160_474, "46.16"),
        ("cifar_wrn_34_10", {"depth": 28}, 36_479_194, "36.5"),
        ("cifar_wrn_34_10", {"depth": 16, "width": 8}, 10_961_370, "11.0"),
    ],
)
def test_the_pre_activation_nets_have_their_published_size(name, args, num_parameters, published):
    with torch.device("meta"):
        net = timm.create_model(name, **args)
    assert sum(p.numel() for p in net.parameters()) == num_parameters
    assert f"{num_parameters / 1e6:.{len(published) - 3}f}" == published


def preact(name: str, **args: Any) -> Any:
    """The narrow net in float64, evaluation mode, every weight and statistic away from its first value."""
    net: Any = timm.create_model(name, **PREACT[name], **args).double().eval()
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) if "var" in key else 0.1 * torch.randn_like(value))
    return net


def written_out(net: Any, x: Tensor, num_blocks: list[int]) -> dict[str, Tensor]:
    """Pre-activation residual blocks in plain tensor maths; stages after the first begin with stride 2.

    Returns the ReLU outputs under the names of their taps, the pooled features and the logits.
    """
    w = net.state_dict()
    out = {}

    def relu_of_norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            w[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        out[name] = torch.clamp((x - mean) / torch.sqrt(var + 1e-5) * scale + shift, min=0)
        return out[name]

    x = F.conv2d(x, w["stem.conv.weight"], padding=1)
    for stage, blocks in enumerate(num_blocks):
        for block in range(blocks):
            name = f"stages.{stage}.blocks.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            active = relu_of_norm(x, f"{name}.norm1")
            branch = F.conv2d(active, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            branch = F.conv2d(relu_of_norm(branch, f"{name}.norm2"), w[f"{name}.conv2.weight"], padding=1)
            if branch.shape == x.shape:
                x = x + branch
            else:
                x = F.conv2d(active, w[f"{name}.downsample.conv.weight"], stride=stride) + branch
    maps = relu_of_norm(x, "norm")
    out["head.global_pool"] = maps.sum((2, 3)) / (maps.shape[2] * maps.shape[3])
    out["logits"] = out["head.global_pool"] @ w["head.fc.weight"].T + w["head.fc.bias"]
    return out


@pytest.mark.parametrize(("name", "num_blocks"), [("cifar_preact_resnet18", [2] * 4), ("cifar_wrn_34_10", [2] * 3)])
def test_a_pre_activation_net_is_the_papers_written_out(name, num_blocks):
    net = preact(name)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    expected = written_out(net, x, num_blocks)
    torch.testing.assert_close(net(x), expected["logits"], rtol=0, atol=1e-10)
    maps = net.forward_features(x)
    torch.testing.assert_close(maps, expected["norm"], rtol=0, atol=1e-10)
    pooled = net.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(pooled, expected["head.global_pool"], rtol=0, atol=1e-10)
    torch.testing.assert_close(net.get_classifier()(pooled), expected["logits"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PREACT)
def test_a_pre_activation_net_is_a_timm_net(name):
    net = preact(name, num_classes=7, in_chans=1)
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    assert (net.num_classes, net.in_chans, net.num_features) == (7, 1, net.feature_info[-1]["num_chs"])
    assert net.pretrained_cfg["input_size"] == (3, 32, 32)
    assert (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]) == ((0, 0, 0), (1, 1, 1))
    assert net.get_submodule(net.pretrained_cfg["classifier"]) is net.get_classifier()
    assert net.get_submodule(net.pretrained_cfg["first_conv"]).in_channels == 1
    assert net.pretrained_cfg["pool_size"] == tuple(net.forward_features(x).shape[2:])
    features: Any = timm.create_model(name, **PREACT[name], in_chans=1, features_only=True).double()
    for map_, stage in zip(features(x), net.feature_info, strict=True):
        assert map_.shape[1:] == (stage["num_chs"], 32 // stage["reduction"], 32 // stage["reduction"])
    net.reset_classifier(4)
    assert net(x).shape == (2, 4)
    net.reset_classifier(0)
    assert net(x).shape == (2, net.num_features)


def test_the_papers_taps_of_the_wide_net_can_be_named():
    """Ten ReLU outputs of the last stage and the final average pool, in a split net of WRN-34's depth."""
    model = ModelConfig(name="cifar_wrn_34_10", args={"width": 1})
    classifier = build_classifier(model, num_classes=10, image_size=32, split="batch", taps=WRN_TAPS).double().eval()
    assert classifier.tap_dims == (32, *[64] * 10)  # the first ReLU works on what comes in
    assert isinstance(classifier.backbone.get_submodule(WRN_TAPS[0]), SplitNorm)
    plain: Any = timm.create_model("cifar_wrn_34_10", width=1).double().eval()
    state = {key.removeprefix("backbone."): value for key, value in classifier.state_dict().items()}
    plain.load_state_dict({key.replace(".adv.", "."): v for key, v in state.items() if ".clean." not in key})
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = written_out(plain, x, [5] * 3)
    logits, features = classifier.forward_with_taps(x)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-10)
    for tap, feature in zip(WRN_TAPS, features, strict=True):
        wanted = expected[tap].flatten(2).mean(2) if expected[tap].ndim == 4 else expected[tap]
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-10)
    assert automatic_taps(plain) == tuple(f"stages.2.blocks.{block}" for block in range(5))


def test_a_depth_that_no_wide_net_has_is_one_line():
    model = ModelConfig(name="cifar_wrn_34_10", args={"depth": 18})
    with pytest.raises(UserError, match=r"^model.args: .*: cifar_wrn_34_10 can't be built so: depth: 18: 6n"):
        build_classifier(model, num_classes=10, image_size=32, split="none", taps=None)


@pytest.mark.parametrize("name", PREACT)
def test_an_export_keeps_what_made_the_net_another_size(tmp_path, name):
    model = ModelConfig(name=name, args=PREACT[name])
    classifier = build_classifier(model, num_classes=5, image_size=32, split="batch", taps=None).eval()
    exported = load_exported(export(classifier, model, tmp_path / "out", 32))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(exported(x), classifier(x))
