"""Exports are read back by timm alone, in a fresh process too, and give the trained net's logits."""

import json

import pytest
import timm
import torch
from exports import OURS, SIZE, STOCK, export, trained
from safetensors.torch import load_file, save_file

from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.export import handover, load_exported, verify_export


@pytest.mark.parametrize(
    ("model", "size", "split"),
    [
        (STOCK, SIZE, "batch"),
        (STOCK, SIZE, "none"),
        (OURS, 32, "batch"),
        (ModelConfig(name="vit_tiny_patch16_224", args={"depth": 2}), 64, "layer"),
        (ModelConfig(name="resnetv2_50", args={"channels": (16, 16, 32, 32)}), 32, "batch"),
        (ModelConfig(name="convnext_atto", args={"depths": (1, 1, 1, 1)}), 32, "layer"),
    ],
)
def test_verify_compares_with_the_net_and_leaves_it_in_training_mode(tmp_path, model, size, split):
    classifier = trained(model, size, split)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    out_dir = export(classifier, model, tmp_path / "out", size)
    assert verify_export(out_dir, classifier) <= 1e-4
    assert all(m.training for m in classifier.modules())
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())

    plain = set(timm.create_model(model.name, num_classes=5, **model.args).state_dict())
    assert set(load_file(out_dir / "model.safetensors")) == plain


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_verify_notices_weights_that_differ(tmp_path, damage):
    classifier = trained(STOCK)
    out_dir = export(classifier, STOCK, tmp_path / "out")
    weights = load_file(out_dir / "model.safetensors")
    weights["fc.bias"][0] += damage
    save_file(weights, out_dir / "model.safetensors")
    with pytest.raises(RuntimeError, match="logits differ"):
        verify_export(out_dir, classifier)


def test_config_says_how_to_feed_the_net_and_keeps_our_notes_at_the_top(tmp_path):
    out_dir = export(trained(STOCK), STOCK, tmp_path / "out", crop_pct=0.95)
    config = json.loads((out_dir / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert config["architecture"] == "resnet10t"
    assert config["num_classes"] == 5
    assert config["label_names"] == [f"class {i}" for i in range(5)]
    assert config["model_args"]["channels"] == [8, 16, 24, 40]
    assert config["arat_dist"] == {"recipe": "r", "clean": 0.5}
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], [3, SIZE, SIZE])
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.95, "bicubic")
    # The weights aren't timm's, and neither is their licence.
    assert not cfg.get("tag")
    assert not cfg.get("license")
    assert (out_dir / "model.safetensors").stat().st_mode == (out_dir / "config.json").stat().st_mode


def test_our_own_nets_name_what_has_to_be_imported(tmp_path):
    classifier = trained(OURS, 32)
    out_dir = export(classifier, OURS, tmp_path / "out", 32)
    assert json.loads((out_dir / "config.json").read_text())["arat_dist"]["requires"] == "arat_dist.models"
    exported = load_exported(out_dir)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(exported(pixels), classifier.eval()(pixels))
    assert not exported.is_split
    assert not exported.training


def test_an_earlier_export_is_replaced_and_anything_else_is_not(tmp_path):
    first, second = trained(STOCK), trained(STOCK)
    export(first, STOCK, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    out_dir = export(second, STOCK, tmp_path / "out")
    verify_export(out_dir, second)
    assert sorted(p.name for p in out_dir.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    (tmp_path / "empty").mkdir()
    export(second, STOCK, tmp_path / "empty")

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no earlier export"):
        export(first, STOCK, photos)
    assert [p.name for p in photos.iterdir()] == ["config.json"]


def test_a_failing_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    first = trained(STOCK)
    out_dir = export(first, STOCK, tmp_path / "out")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("arat_dist.export.save_for_hf", fail)
    with pytest.raises(OSError, match="disk full"):
        export(trained(STOCK), STOCK, tmp_path / "out")
    assert verify_export(out_dir, first) <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_user_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="timm can't load it"):
        load_exported(tmp_path)
    with pytest.raises(UserError, match="4 names; 5"):
        handover(trained(STOCK).backbone, STOCK, SIZE, ["a", "b", "c", "d"], {})
