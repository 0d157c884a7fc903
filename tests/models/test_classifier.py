"""The classifier on real timm nets: logits and pooled features against the plain net, taps by name."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from arat_dist.config import DataConfig, ModelConfig
from arat_dist.errors import UserError
from arat_dist.models.backbone import create_backbone, load_checkpoint, with_centre_crop
from arat_dist.models.classifier import Classifier, _probe, build_classifier
from arat_dist.models.split_norm import SplitNorm, fold_branch
from arat_dist.models.taps import automatic_taps, pool

SIZE = 64
NARROW = {"channels": [8, 16, 24, 40], "zero_init_last": False}

# name -> the split it can give, its automatic taps, their dims
NETS = {
    "resnet18": ("batch", ["layer4.0", "layer4.1"], 512),
    "resnet50": ("batch", ["layer4.0", "layer4.1", "layer4.2"], 2048),
    "efficientnet_b0": ("batch", ["blocks.6.0"], 320),
    "mobilenetv3_small_100": ("batch", ["blocks.5.0"], 576),
    "regnety_002": ("batch", [f"s4.b{i}" for i in range(1, 8)], 368),
    "convnext_atto": ("layer", ["stages.3.blocks.0", "stages.3.blocks.1"], 320),
    "vit_tiny_patch16_224": ("layer", ["blocks.9", "blocks.10", "blocks.11"], 192),
    "resnetv2_50": ("batch", [f"stages.3.blocks.{i}" for i in range(3)], 2048),
    "resnet50_gn": ("none", ["layer4.0", "layer4.1", "layer4.2"], 2048),
    "swin_tiny_patch4_window7_224": ("layer", ["layers.3.blocks.0", "layers.3.blocks.1"], 768),
}


def build(
    name: str = "resnet18", size: int = 32, split: Any = "batch", taps: Any = None, classes: int = 10, **model: Any
) -> Classifier:
    return build_classifier(
        ModelConfig(name=name, **model), num_classes=classes, image_size=size, split=split, taps=taps
    )


def plain_twin(classifier: Classifier, name: str, **args) -> nn.Module:
    """The stock timm net with the classifier's weights."""
    net = timm.create_model(name, num_classes=10, **args).to(classifier.dtype)
    state = fold_branch(classifier.state_dict())
    net.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    return net.eval()


def watch(net: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the named modules give from now on, copied before anything in place can follow."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output.clone()})

    for name in names:
        net.get_submodule(name).register_forward_hook(hook(name))
    return seen


def scramble(net: nn.Module) -> None:
    """Move every weight, so that no layer is the identity and no feature is zero by initialisation."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_backbone(name):
    split, taps, dim = NETS[name]
    classifier = build(name, SIZE, split, "auto").double().eval()
    assert list(classifier.taps) == taps
    assert classifier.tap_dims == (dim,) * len(taps)
    assert classifier.is_split == (split != "none")

    plain = plain_twin(classifier, name, **({"img_size": SIZE} if name.startswith(("vit", "swin")) else {}))
    scramble(plain)
    state = {f"backbone.{k}": v for k, v in plain.state_dict().items()}
    for branch in ("adv", "clean"):
        own = {k.replace(f".{branch}.", "."): k for k in classifier.state_dict() if f".{branch}." in k}
        classifier.load_state_dict({own.get(k, k): v for k, v in state.items()}, strict=False)

    pixels = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    cfg: Any = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (cfg.mean, cfg.std))
    maps = watch(plain, taps)
    with torch.no_grad():
        expected = plain((pixels - mean) / std)
        for branch in ("adv", "clean"):
            with classifier.branch(branch):
                logits, features = classifier.forward_with_taps(pixels)
                assert torch.equal(logits, classifier(pixels))
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
            for tap, feature in zip(taps, features, strict=True):
                torch.testing.assert_close(feature, written_out(maps[tap], name), rtol=0, atol=1e-6)


def written_out(value: torch.Tensor, name: str) -> torch.Tensor:
    """METHOD's pooling in plain sums: mean over positions of max(map, 0), mean over tokens."""
    if name.startswith("vit"):
        return sum(value[:, i] for i in range(value.shape[1])) / value.shape[1]  # pyright: ignore[reportReturnType]
    if name.startswith("swin"):
        value = value.permute(0, 3, 1, 2)
    return torch.clamp(value, min=0).flatten(2).sum(2) / (value.shape[2] * value.shape[3])


def test_taps_at_norms_see_the_value_before_the_in_place_activation():
    taps = ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
    classifier = build(taps=taps, args=NARROW, size=SIZE).double().eval()
    assert all(isinstance(classifier.backbone.get_submodule(tap), SplitNorm) for tap in taps)
    assert classifier.tap_dims == (40,) * 4
    plain = plain_twin(classifier, "resnet18", **NARROW)
    maps = watch(plain, taps)
    pixels = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    plain((pixels - classifier.mean) / classifier.std)
    for tap, feature in zip(taps, classifier.forward_with_taps(pixels)[1], strict=True):
        torch.testing.assert_close(feature, written_out(maps[tap], "resnet18"), rtol=0, atol=1e-12)


def test_pool_gives_a_copy_and_knows_where_the_features_are():
    pooled = torch.randn(2, 5)
    out = pool(pooled)
    pooled.zero_()
    assert out.abs().sum() > 0
    last = torch.randn(2, 7, 7, 5)
    torch.testing.assert_close(pool(last), pool(last.permute(0, 3, 1, 2)))
    assert pool(last).shape == (2, 5)
    cube = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(pool(cube, channels_last=True), cube.relu().mean((1, 2)))
    torch.testing.assert_close(pool(cube), cube.relu().mean((2, 3)))
    with pytest.raises(ValueError, match="not a map"):
        pool(torch.randn(3))


def test_features_are_pooled_only_inside_forward_with_taps():
    classifier = build(taps="auto", args=NARROW)
    _, features = classifier.forward_with_taps(torch.rand(2, 3, 32, 32))
    assert len(features) == len(classifier.taps)
    with pytest.raises(RuntimeError):
        classifier.forward_with_taps(torch.rand(2, 4, 32, 32))
    with patch("arat_dist.models.taps.pool") as pool:
        classifier(torch.rand(2, 3, 32, 32))
        pool.assert_not_called()
    assert not any(classifier.recorder.features)  # nothing is held that a step has used


def test_a_copys_taps_are_its_own():
    classifier = build(taps="auto", args=NARROW)
    copy = deepcopy(classifier)
    pixels = torch.rand(2, 3, 32, 32)
    expected = classifier.forward_with_taps(pixels)[1]
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
    for feature, other in zip(copy.forward_with_taps(pixels)[1], expected, strict=True):
        torch.testing.assert_close(feature, other)


def test_features_carry_gradients_of_their_own_branch():
    classifier = build(taps="auto", args=NARROW)
    pixels = torch.rand(4, 3, SIZE, SIZE).requires_grad_()
    with classifier.branch("clean"):
        _, features = classifier.forward_with_taps(pixels)
    features[-1].square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    adv = [p.grad for n, p in classifier.named_parameters() if ".adv." in n]
    clean = [p.grad for n, p in classifier.named_parameters() if ".clean." in n]
    assert all(g is None for g in adv)
    assert all(g is not None for g in clean)


def test_an_unsplit_net_has_one_branch_under_both_names():
    classifier = build(split="none", args=NARROW).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = classifier(pixels)
    for branch in ("adv", "clean"):
        with classifier.branch(branch):
            assert torch.equal(classifier(pixels), expected)
    assert not classifier.is_split
    assert classifier.tap_dims == ()


def test_mean_and_std_come_from_the_recipe_first_and_stay_out_of_the_state():
    classifier = build(args=NARROW, mean=(0.1, 0.2, 0.3))
    assert classifier.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert classifier.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert not {"mean", "std"} & set(classifier.state_dict())
    assert classifier.double().dtype == torch.float64


def test_building_leaves_the_flags_and_the_statistics_as_new():
    classifier = build(args=NARROW, taps="auto")
    assert all(m.training for m in classifier.modules())
    counts = [v for k, v in classifier.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)


@pytest.mark.parametrize(
    ("build_args", "start", "contains"),
    [
        ({"taps": ("layer4.0.b1",)}, "objective.taps: layer4.0.b1: no such module", "layer4.0.bn1"),
        ({"taps": ("layer4.0.bn1.adv",)}, "objective.taps: layer4.0.bn1.adv: no such module", "layer4.0.bn1,"),
        ({"taps": ("layer4.0", "layer4.0")}, "objective.taps:", "each once"),
        ({"taps": ("layer4.0.drop_path",), "split": "none"}, "objective.taps: layer4.0.drop_path", "no such"),
        (
            {"taps": ("layer4.1.bn2",), "args": {}},
            "objective.taps: layer4.1.bn2: all its features are zero",
            "zero_init",
        ),
        ({"name": "resnet19"}, "model.name: resnet19: timm has no such architecture", "resnet18"),
        ({"name": "resnet18.mine"}, "model.name: resnet18.mine", "tag"),
        ({"name": "local-dir:/tmp"}, "model.name: local-dir:/tmp", "no such architecture"),
        ({"args": {"chanels": [8]}}, "model.args: {'chanels': [8]}: resnet18 can't be built so", "chanels"),
        ({"args": {"num_classes": 3}}, "model.args: num_classes: is set by data.num_classes", ""),
        ({"name": "inception_v3", "args": {}}, "data.image_size: 32: inception_v3 can't take 32x32", ""),
        ({"checkpoint": "/nowhere/w.pth"}, "model.checkpoint: /nowhere/w.pth: no such file", ""),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_line_that_names_the_key(build_args, start, contains):
    with pytest.raises(UserError) as caught:
        build(**{"args": NARROW, **build_args})
    message = str(caught.value)
    assert message.startswith(start)
    assert contains in message
    assert "\n" not in message


def test_a_module_that_runs_never_or_twice_is_no_tap():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.idle = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Identity()

        def forward(self, x):
            return self.act(self.act(self.conv(x))).mean((2, 3))

    for tap, times in (("act", 2), ("idle", 0)):
        classifier = Classifier(Net(), [0.0] * 3, [1.0] * 3, taps=(tap,))
        with pytest.raises(UserError, match=f"^objective.taps: {tap}: runs {times} times"):
            _probe(classifier, "net", 8)
    assert _probe(Classifier(Net(), [0.0] * 3, [1.0] * 3, taps=("conv",)), "net", 8) == (4,)


def test_pretrained_without_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        build(pretrained=True)
    assert str(caught.value).startswith("model.pretrained: true: the weights of resnet18 can't be had")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_fills_both_branches(tmp_path, suffix, caplog):
    source = timm.create_model("resnet18", num_classes=7, **NARROW)
    scramble(source)
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)

    same = build(args=NARROW, checkpoint=str(path), classes=7).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = source.eval()((pixels - same.mean) / same.std)
    for branch in ("adv", "clean"):
        with same.branch(branch):
            torch.testing.assert_close(same(pixels), expected)

    with caplog.at_level(logging.WARNING):
        other = build(args=NARROW, checkpoint=str(path), classes=3)
    assert "classifier doesn't fit" in caplog.text
    folded = fold_branch(other.state_dict())
    assert all(torch.equal(folded[f"backbone.{k}"], v) for k, v in state.items() if not k.startswith("fc."))


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "backbone."])
def test_weights_of_a_net_within_a_wrapper_are_found(tmp_path, prefix):
    """Other people's robust nets lie in a module that normalises the pixels, or that attacked them in training."""
    source = timm.create_model("resnet18", num_classes=7, **NARROW)
    scramble(source)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    extra = {"module.normalizer.new_mean": torch.zeros(3), f"module.attacker.{prefix}conv1.weight": torch.zeros(1)}
    path = tmp_path / "wrapped.pth"
    torch.save({"model": state | extra}, path)
    net = timm.create_model("resnet18", num_classes=7, **NARROW)
    load_checkpoint(net, str(path), new_head=False)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in net.state_dict().items())
    torch.save({"model": dict(list(state.items())[1:])}, path)
    with pytest.raises(UserError, match=r"not the weights of this net|another number of classes"):
        load_checkpoint(net, str(path), new_head=False)


def test_a_checkpoint_of_another_net_or_with_code_is_refused(tmp_path):
    wide = tmp_path / "wide.pth"
    torch.save(timm.create_model("resnet18", channels=(8, 16, 24, 48)).state_dict(), wide)
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*not the weights of this net") as caught:
        build(args=NARROW, checkpoint=str(wide))
    assert "layer4" in str(caught.value)

    code = tmp_path / "code.pth"
    torch.save(timm.create_model("resnet18", **NARROW), code)
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*plain weights") as caught:
        build(args=NARROW, checkpoint=str(code))
    assert "\n" not in str(caught.value)

    rubbish = tmp_path / "rubbish.safetensors"
    rubbish.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*plain weights"):
        build(args=NARROW, checkpoint=str(rubbish))


def test_a_net_may_have_no_taps():
    classifier = build(args=NARROW, taps=())
    logits, features = classifier.eval().forward_with_taps(torch.rand(2, 3, SIZE, SIZE))
    assert (logits.shape, features, classifier.tap_dims) == ((2, 10), [], ())


def test_automatic_taps_say_so_where_timm_names_no_stages():
    with pytest.raises(UserError, match=r"^objective\.taps: auto"):
        automatic_taps(nn.Sequential(nn.Linear(2, 2)))


def test_the_centre_crop_is_timms_unless_the_recipe_says_it():
    data = DataConfig(train="x.beton", val="y.beton", num_classes=10, image_size=32)
    for name, crop in [("resnet50", 0.95), ("vit_tiny_patch16_224", 0.9), ("cifar_resnet18", 1.0)]:
        net = create_backbone(ModelConfig(name=name), num_classes=10, image_size=32)
        known = timm.get_pretrained_cfg(name)
        assert known is not None
        assert known.crop_pct == crop
        assert with_centre_crop(data, net).val_crop == crop
        assert with_centre_crop(data.model_copy(update={"val_crop": 0.5}), net).val_crop == 0.5
