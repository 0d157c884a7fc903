"""Small nets whose norm branches differ, and their exports."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arat_dist.config import ModelConfig
from arat_dist.export import Handover, handover, new_folder, plain_net, write_timm
from arat_dist.models.classifier import Classifier, build_classifier

STOCK = ModelConfig(name="resnet10t", args={"channels": (8, 16, 24, 40)}, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
OURS = ModelConfig(name="cifar_resnet18", args={"channels": [8, 16, 24, 40]})
SIZE = 48
NAMES = [f"class {i}" for i in range(5)]


def trained(model: ModelConfig, size: int = SIZE, split: Any = "batch") -> Classifier:
    """A net of five classes whose branches differ in weights and statistics, in training mode."""
    classifier = build_classifier(model, num_classes=5, image_size=size, split=split, taps=None)
    with torch.no_grad():
        for name, value in classifier.state_dict().items():
            if name.endswith("running_var"):
                value.add_(0.5 * torch.rand_like(value))
            elif value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
    return classifier


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
