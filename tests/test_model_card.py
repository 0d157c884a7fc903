"""The card of an export: what the hub's own classes read from it, and what people do."""

import math
import re
from typing import Any

import pytest
from exports import card
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from arat_dist.measured import Measurement
from arat_dist.model_card import DataSet, render

PGD = Measurement("pets/val", 360, 0.9, "pgd20", "linf", 8 / 255, 0.5)
AUTO = Measurement(
    "pets/val",
    100,
    0.91,
    "autoattack",
    "l2",
    0.5,
    0.25,
    parts=[("apgd-ce", 0.375), ("square", 0.25)],
    warnings=["Odd."],
)
CLEAN = Measurement("other/val", 50, 0.8, "none", "linf", 8 / 255, None, corruptions=[("fog", 1, 0.7), ("fog", 5, 0.1)])


def read(**changes: Any) -> tuple[ModelCardData, str]:
    """The front matter and the text of a card, as the hub's client reads them."""
    read_back = ModelCard(render(card(**changes)), ignore_metadata_errors=False)
    assert isinstance(read_back.data, ModelCardData)
    return read_back.data, read_back.text


def results(data: ModelCardData) -> list[EvalResult]:
    return data.eval_results or []


def rows(text: str, section: str) -> list[list[str]]:
    """Cells of the first table of a section, its head first."""
    body = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = body.strip().partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines]
    return [cells[0], *cells[2:]]


def test_the_hub_reads_library_task_and_every_accuracy():
    data, _ = read(measured=[PGD, AUTO, CLEAN])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("timm", "image-classification", "pets-robust")
    assert data.license is None
    assert {"timm", "arat", "adversarial-robustness"} <= set(data.tags or ())
    found = [(each.dataset_name, each.dataset_config, each.metric_name, each.metric_value) for each in results(data)]
    # The same set with another number of pictures is another figure.
    assert found == [
        ("pets/val", "360 pictures", "Clean accuracy", 0.9),
        ("pets/val", "360 pictures", "Robust accuracy (pgd20, linf, eps 8/255)", 0.5),
        ("pets/val", "100 pictures", "Clean accuracy", 0.91),
        ("pets/val", "100 pictures", "Robust accuracy (autoattack, l2, eps 0.5)", 0.25),
        ("other/val", "50 pictures", "Clean accuracy", 0.8),
    ]
    assert read(formats=("onnx",))[0].library_name == "onnx"


def test_each_attack_has_a_row_with_pictures_norm_and_eps():
    _, text = read(measured=[PGD, AUTO, CLEAN])
    assert rows(text, "Accuracy") == [
        ["data", "pictures", "clean", "attack", "norm", "eps", "robust"],
        ["pets/val", "360", "0.9000", "pgd20", "linf", "8/255", "0.5000"],
        ["pets/val", "100", "0.9100", "autoattack", "l2", "0.5", "0.2500"],
        ["", "", "", "… after apgd-ce", "", "", "0.3750"],
        ["", "", "", "… after square", "", "", "0.2500"],
        ["other/val", "50", "0.8000", "none", "", "", ""],
    ]
    assert "- Odd." in text
    assert "| fog | 0.7000 | 0.1000 |" in text
    assert "Not measured." in read(measured=[])[1]


def test_data_recipe_and_weights_are_named():
    hashes = "a" * 64, "b" * 64
    sets = [
        DataSet("train", "pets/train", 1234, hashes[0], ("cat", "dog")),
        DataSet("val", "pets/val", sha256=hashes[1]),
    ]
    _, text = read(sets=sets, weights="ema", step=4321)
    assert rows(text, "Data")[1:] == [["train", "pets/train", "1,234", hashes[0]], ["val", "pets/val", "", hashes[1]]]
    assert "moving average (EMA) after 4,321 steps" in text
    assert card().recipe.sha256() in text
    settings = dict(rows(text, "Recipe")[1:])
    assert "gamma: 2" in settings["objective"]
    assert "eps: 8/255" in settings["attack"]
    assert "global\\_batch\\_size: 8" in settings["train"]
    assert "5 classes: class 0, class 1" in text
    assert "2402.14648" in text
    # A path is of the machine that trained.
    assert "/somewhere/of/mine" not in render(card(sets=sets))


def test_what_a_net_was_not_trained_for_is_not_claimed():
    robust, standard = read()[1], read(objective="standard")[1]
    assert "against adversarial examples" in robust
    assert "against adversarial examples" not in standard
    assert "attack" not in dict(rows(standard, "Recipe")[1:])
    assert "on clean pictures alone" in standard


def test_names_from_folders_stay_text():
    odd = ["<script>", "a|b", "two\nlines", "*star*", "# head"]
    sets = [DataSet("train", "x|y/z", 3, "c" * 64, odd)]
    data, text = read(name="a: [b] - 'c'\"", class_names=odd, sets=sets, measured=[PGD])
    assert data.model_name == "a: [b] - 'c'\""
    assert re.findall(r".<script", text) == ["\\<script"]
    assert "two lines" in text
    assert re.findall(r".\*star", text) == ["\\*star"]
    # A bar in a name opens no new cell.
    assert rows(text, "Data")[1] == ["train", "x\\|y/z", "3", "c" * 64]


def test_only_some_of_many_class_names_are_listed():
    names = [f"n{i:04d}" for i in range(1000)]
    _, text = read(class_names=names)
    assert "n0019 and 980 more" in text
    assert "n0020" not in text


def test_weights_that_training_began_with_are_named():
    assert read()[0].base_model is None
    data, text = read(model={"name": "resnet50", "pretrained": True, "args": {}})
    assert data.base_model == "timm/resnet50.a1_in1k"
    assert "timm/resnet50.a1_in1k" in text


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_onnx_code_cuts_as_the_evaluation_does(crop_pct):
    _, text = read(formats=("onnx",), crop_pct=crop_pct)
    bleed = float(re.search(r"bleed=([\d.]+)", text)[1])  # pyright: ignore[reportOptionalSubscript]
    assert math.isclose(1 - 2 * bleed, crop_pct)
