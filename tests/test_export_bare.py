"""Exports in an environment that holds timm alone: they load there and give the logits of the branch that was attacked.

Logits travel in files.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_venv import bare_python, run_bare
from exports import SIZE, STOCK, about, branch_logits, card, export, trained
from PIL import Image

from arat_dist.config import ModelConfig
from arat_dist.export import load_exported
from arat_dist.export_onnx import write_onnx
from arat_dist.model_card import Card, render

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
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bare")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[np.ndarray]]:
    """Logits of the adv and of the clean branch, by family, of the pixels in NAME.npy; the exports are loaded by then.

    Starting torch takes longer than all the rest: one process loads them all, the last one from a hub.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments, expected = [], {}
    for family, (model, size, split) in FAMILIES.items():
        classifier = trained(model, size, split)
        out_dir = export(classifier, model, folder / family, size)
        pixels = torch.rand(3, 3, size, size)
        np.save(folder / f"{family}.npy", pixels.numpy())
        arguments += [f"local-dir:{out_dir}", str(folder / f"{family}.npy")]
        expected[family] = [branch_logits(classifier, pixels, branch).numpy() for branch in ("adv", "clean")]

    # A hub's repository as its client keeps it on disk, where it is found without a network.
    repository, commit = folder / "hub/models--user--net", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder / "resnet", repository / "snapshots" / commit)
    shutil.copy(folder / "resnet.npy", folder / "hub.npy")
    arguments += ["hf-hub:user/net", str(folder / "hub.npy")]

    facts = card(crop_pct=0.95, name="resnet")
    (code,) = python_code(facts, folder / "resnet", folder / "picture.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(folder / "picture.png")
    script = f"{LOADS}\n{code}\nnp.save('card.npy', logits.detach().numpy())"
    python = bare_python(folder / "venv", "timm")
    run_bare(python, "-c", script, *arguments, cwd=folder, HF_HUB_CACHE=str(folder / "hub"))
    return expected


def python_code(facts: Card, folder: Path, picture: Path) -> list[str]:
    """The code that a card shows, for a folder and a picture."""
    found = re.findall(r"```python\n(.*?)```", render(facts), flags=re.DOTALL)
    return [code.replace("FOLDER", str(folder)).replace("PICTURE", str(picture)) for code in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_alone_gives_the_attacked_branchs_logits(family, folder, expected):
    adv, clean = expected[family]
    found = np.load(folder / f"{family}.logits.npy")
    np.testing.assert_allclose(found, adv, rtol=0, atol=1e-4)
    if FAMILIES[family][2] != "none":
        assert np.abs(found - clean).max() > 1e-2


def test_it_loads_from_the_hub_as_well(folder, expected):
    np.testing.assert_array_equal(np.load(folder / "hub.logits.npy"), np.load(folder / "resnet.logits.npy"))


def test_the_cards_code_runs_as_it_stands(folder, expected):
    """With timm, and in an environment of onnxruntime and Pillow alone: the same picture, nearly the same logits."""
    classifier = load_exported(folder / "resnet")
    facts = about(classifier, STOCK, crop_pct=0.95)
    write_onnx(folder, classifier.backbone, facts)
    (code,) = python_code(replace(card(formats=("onnx",)), about=facts), folder, folder / "picture.png")
    script = f"import sys\n{code}\nassert not {{'torch', 'timm'}} & set(sys.modules)\nnp.save('onnx.npy', logits)"
    python = bare_python(folder / "onnx-venv", "onnxruntime", "pillow")
    run_bare(python, "-c", script, cwd=folder)
    by_timm, by_onnx = np.load(folder / "card.npy"), np.load(folder / "onnx.npy")
    assert by_timm.shape == by_onnx.shape == (1, 5)
    # One cuts before it shrinks, the other behind: edges differ by parts of a pixel.
    np.testing.assert_allclose(by_timm, by_onnx, rtol=0, atol=0.1 * np.abs(by_timm).max())
