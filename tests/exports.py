"""Small nets whose norm branches differ, and their exports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toys import Sets, toy_recipe

from arat_dist.config import ModelConfig
from arat_dist.export import Handover, handover, new_folder, plain_net, write_timm
from arat_dist.model_card import Card, DataSet
from arat_dist.models.classifier import Classifier, build_classifier

STOCK = ModelConfig(name="resnet10t", args={"channels": (8, 16, 24, 40)}, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
OURS = ModelConfig(name="cifar_resnet18", args={"channels": [8, 16, 24, 40]})
SIZE = 48
NAMES = [f"class {i}" for i in range(5)]


def trained(model: ModelConfig, size: int = SIZE, split: Any = "batch") -> Classifier:
    """A net of five classes whose branches differ in weights and statistics, in training mode."""
    classifier = build_classifier(model, num_classes=5, image_size=size, split=split, taps=None)
    classifier.load_state_dict(noisy(classifier.state_dict()))
    return classifier


def noisy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight and statistic a little different, logits still small: no two branches agree."""

    def changed(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.clone()
        return value + (torch.rand_like(value) if name.endswith("running_var") else 0.05 * torch.randn_like(value))

    return {name: changed(name, value) for name, value in state.items()}


def branch_logits(classifier: Classifier, pixels: Tensor, branch: Any) -> Tensor:
    """What one branch says in evaluation mode: pixels float [B,3,H,W] in [0,1] -> float [B,5]."""
    with torch.no_grad(), classifier.branch(branch):
        return classifier.eval()(pixels)


def about(classifier: Classifier, model: ModelConfig, size: int = SIZE, **kwargs: Any) -> Handover:
    return handover(classifier.backbone, model, size, NAMES, {"recipe": "r", "clean": 0.5}, **kwargs)


def export(classifier: Classifier, model: ModelConfig, out_dir: Path, size: int = SIZE, **kwargs: Any) -> Path:
    with new_folder(out_dir) as folder:
        net = plain_net(classifier.state_dict(), model, 5, size)
        write_timm(folder, net, model, about(classifier, model, size, **kwargs))
    return out_dir


def card(
    *,
    name: str = "pets-robust",
    objective: str = "arat",
    model: dict[str, Any] | None = None,
    class_names: Any = NAMES,
    crop_pct: float = 0.95,
    **changes: Any,
) -> Card:
    """A card of a net of five classes, of 3 + 2 pictures."""
    sets = Sets("/somewhere/of/mine/pets/train.beton", "/somewhere/of/mine/pets/val.beton")
    recipe = toy_recipe(sets, data={"num_classes": 5}, objective={"name": objective}, model=model or {})
    known = [
        DataSet("train", "pets/train", 3, "a" * 64, class_names),
        DataSet("val", "pets/val", 2, "b" * 64, class_names),
    ]
    facts = Handover(5, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", crop_pct, class_names, {})
    given: dict[str, Any] = {"weights": "raw", "step": 7, "formats": ("timm",), "sets": known, "measured": ()}
    return Card(name=name, recipe=recipe, about=facts, **given | changes)
