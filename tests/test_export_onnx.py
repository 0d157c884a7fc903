"""model.onnx takes pixels in [0,1], any number of them, and gives the attacked branch's logits."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exports import NAMES, OURS, SIZE, STOCK, about, branch_logits, trained
from torch import Tensor, nn

import arat_dist.export_onnx
from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.export import plain_net
from arat_dist.export_onnx import check_onnx, verify_onnx, write_onnx
from arat_dist.models.classifier import Classifier

NETS = {
    "resnet": (STOCK, SIZE, "batch"),
    "vit": (ModelConfig(name="vit_tiny_patch16_224", args={"depth": 2}, std=(0.2, 0.3, 0.4)), 64, "layer"),
    "cifar_resnet18": (OURS, 32, "batch"),
    "cifar_preact_resnet18": (
        ModelConfig(name="cifar_preact_resnet18", args={"channels": [8, 16, 24, 40]}),
        32,
        "batch",
    ),
    "cifar_wrn_34_10": (ModelConfig(name="cifar_wrn_34_10", args={"depth": 10, "width": 1}), 32, "batch"),
}


def write(classifier: Classifier, model: ModelConfig, folder: Path, size: int = SIZE) -> Path:
    write_onnx(folder, plain_net(classifier.state_dict(), model, 5, size), about(classifier, model, size))
    return folder


def run(file: Path, pixels: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels.numpy()})
    assert isinstance(logits, np.ndarray)
    return logits


@pytest.mark.parametrize("name", NETS)
def test_batches_of_any_size_give_the_attacked_branchs_logits(name, tmp_path):
    model, size, split = NETS[name]
    classifier = trained(model, size, split)
    write(classifier, model, tmp_path, size)
    for batch_size in (1, 2, 9):
        pixels = torch.rand(batch_size, 3, size, size)
        found = run(tmp_path / "model.onnx", pixels)
        np.testing.assert_allclose(found, branch_logits(classifier, pixels, "adv").numpy(), rtol=0, atol=1e-4)
        assert np.abs(found - branch_logits(classifier, pixels, "clean").numpy()).max() > 1e-2
    assert verify_onnx(tmp_path, classifier.train(), size) <= 1e-4
    assert all(module.training for module in classifier.modules())


def test_what_the_file_says_of_itself(tmp_path):
    classifier = trained(STOCK)
    write(classifier, STOCK, tmp_path)
    notes = json.loads((tmp_path / "model.json").read_text())
    side = {"dtype": "float32", "shape": ["batch", 3, SIZE, SIZE], "layout": "NCHW", "channels": "RGB", "range": [0, 1]}
    assert notes["input"].items() >= side.items()
    assert notes["input"]["normalisation"] == {"inside": True, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    assert (notes["label_names"], notes["output"]["shape"]) == (NAMES, ["batch", 5])
    assert notes["arat_dist"] == {"recipe": "r", "clean": 0.5}

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inside = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert inside == notes
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(float)", ["batch", 3, SIZE, SIZE])
    assert (logits.name, logits.shape) == ("logits", ["batch", 5])

    import onnx

    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import if not each.domain] == [("", notes["opset"])]


def test_nothing_of_this_machine_is_in_the_file(tmp_path):
    write(trained(STOCK), STOCK, tmp_path)
    content = (tmp_path / "model.onnx").read_bytes()
    for trace in (b"stack_trace", b".py", str(Path(arat_dist.__file__).parent).encode()):
        assert trace not in content, trace


def test_weights_that_are_too_many_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(arat_dist.export_onnx, "_ONE_FILE_BYTES", 0)
    classifier = trained(STOCK)
    (tmp_path / "a").mkdir()
    write(classifier, STOCK, tmp_path / "a")
    # They are found wherever the folder goes.
    folder = (tmp_path / "a").rename(tmp_path / "b")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx", "model.onnx.data"]
    assert verify_onnx(folder, classifier, SIZE) <= 1e-4


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_other_logits_are_noticed(damage, tmp_path):
    classifier = trained(STOCK)
    write(classifier, STOCK, tmp_path)
    with torch.no_grad():
        classifier.backbone.get_parameter("fc.bias")[0] += damage
    with pytest.raises(RuntimeError, match="logits differ"):
        verify_onnx(tmp_path, classifier, SIZE)


def test_user_errors_are_one_line(tmp_path, monkeypatch):
    class Unsayable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"^--format: onnx: torch can't write this net") as refused:
        write_onnx(tmp_path, Unsayable(), about(trained(STOCK), STOCK))
    assert "\n" not in str(refused.value)

    check_onnx()
    monkeypatch.setattr(arat_dist.export_onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"^--format: onnx: not installed: onnxscript; pip install onnxscript$"):
        check_onnx()
