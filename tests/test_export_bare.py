"""Exports in an environment that holds timm alone: they load there and give the logits of the branch that was attacked.

Logits travel in files.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_venv import bare_python, run_bare
from exports import SIZE, STOCK, branch_logits, export, trained

from arat_dist.config import ModelConfig

FAMILIES = {
    "resnet": (STOCK, SIZE, "batch"),
    "one-branch": (STOCK, SIZE, "none"),
    "resnetv2": (ModelConfig(name="resnetv2_50", args={"channels": (16, 16, 32, 32)}), 32, "batch"),
    "mobilenet": (ModelConfig(name="mobilenetv3_small_050"), 32, "batch"),
    "convnext": (ModelConfig(name="convnext_atto", args={"depths": (1, 1, 1, 1)}), 32, "layer"),
    "vit": (ModelConfig(name="vit_tiny_patch16_224", args={"depth": 2}), 64, "layer"),
    "swin": (
        ModelConfig(
            name="swin_tiny_patch4_window7_224",
            args={"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 2)},
        ),
        224,
        "layer",
    ),
}

LOADS = """
import sys
from pathlib import Path
for name in ("arat_dist", "launcher", "ray", "deepspeed", "onnx"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported here")
import numpy as np, timm, torch
torch.set_num_threads(1)
for target, pixels in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    net = timm.create_model(target, pretrained=True).eval()
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = net((torch.from_numpy(np.load(pixels)) - mean) / std)
    np.save(Path(pixels).with_suffix(".logits.npy"), logits.numpy())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare") / "venv", "timm")


def test_every_family_gives_the_attacked_branchs_logits(python, tmp_path):
    arguments, expected = [], {}
    for family, (model, size, split) in FAMILIES.items():
        classifier = trained(model, size, split)
        out_dir = export(classifier, model, tmp_path / family, size)
        pixels = torch.rand(3, 3, size, size)
        np.save(tmp_path / f"{family}.npy", pixels.numpy())
        arguments += [f"local-dir:{out_dir}", str(tmp_path / f"{family}.npy")]
        expected[family] = [branch_logits(classifier, pixels, branch).numpy() for branch in ("adv", "clean")]
    run_bare(python, "-c", LOADS, *arguments, cwd=tmp_path)
    for family, (adv, clean) in expected.items():
        found = np.load(tmp_path / f"{family}.logits.npy")
        np.testing.assert_allclose(found, adv, rtol=0, atol=1e-4, err_msg=family)
        if FAMILIES[family][2] != "none":
            assert np.abs(found - clean).max() > 1e-2, family


def test_it_loads_from_the_hub_as_well(python, tmp_path):
    """The hub's layout, as its client keeps it on disk: the client finds it there without a network."""
    classifier = trained(STOCK)
    repository, commit = tmp_path / "hub/models--user--net", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(export(classifier, STOCK, tmp_path / "out"), repository / "snapshots" / commit)
    pixels = torch.rand(3, 3, SIZE, SIZE)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    arguments = ["hf-hub:user/net", str(tmp_path / "pixels.npy")]
    run_bare(python, "-c", LOADS, *arguments, cwd=tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    found = np.load(tmp_path / "pixels.logits.npy")
    np.testing.assert_allclose(found, branch_logits(classifier, pixels, "adv").numpy(), rtol=0, atol=1e-4)
