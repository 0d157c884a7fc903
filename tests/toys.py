"""Ten-line nets, tiny pictures and recipes for the tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from arat_dist.config import AttackConfig, Recipe
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import split_norms
from arat_dist.objectives.attack import TrainingAttack
from arat_dist.objectives.base import Objective, Setting
from arat_dist.recipe import parse_recipe


def is_installed(library: str) -> bool:
    """Whether a library is there: unit tests also run where there are few, as on a bare machine with a GPU."""
    return find_spec(library) is not None


class ToyNet(nn.Module):
    """Two convolutions, each with a norm; 3 classes. `group` has no statistics, so batches may be cut at will."""

    def __init__(self, norm: Literal["batch", "group"] = "batch", width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Conv2d(width, width, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
        self.norm2 = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
        self.fc = nn.Linear(width, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def toy_classifier(*, norm: Literal["batch", "group"] = "batch", split: bool = True, seed: int = 0) -> Classifier:
    """A float64 classifier around `ToyNet`, tapped at both norms; the branches differ if there are two."""
    torch.manual_seed(seed)
    net = ToyNet(norm)
    switch = split_norms(net, "batch") if split else None
    classifier = Classifier(
        net, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], switch=switch, taps=("norm1", "norm2"), tap_dims=(8, 8)
    ).double()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return classifier


ATTACK = {"eps": 0.1, "step_size": 0.04, "steps": 3}


def toy_setting(
    method: type[Objective], *, seed: int = 5, precision: str = "fp32", label_smoothing: float = 0.0, **attack: Any
) -> Setting:
    """What a recipe would give to a method; keys of the attack come on top of `ATTACK`."""
    config = AttackConfig.model_validate(ATTACK | attack)
    return Setting(TrainingAttack(config, method.attack_defaults, seed), precision, label_smoothing)


def toy_batch(count: int = 12, *, side: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 [B,3,side,side], labels and keys int64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (count,), generator=generator), torch.arange(count) + 100 * seed


@dataclass
class BlotchSource:
    """Noise around a colour that the class decides: something to learn, not all of it right at once."""

    count: int
    seed: int
    class_names: Sequence[str] = ("ant", "bee", "cow")
    description: str = "test"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        label = index % 3
        colour = 128 + 12 * np.eye(3)[label]
        noise = np.random.default_rng([self.seed, index]).normal(colour, 40, (16, 16, 3))
        return np.clip(noise, 0, 255).astype(np.uint8), label

    def name_of(self, index: int) -> str:
        return f"picture-{index}"


@dataclass(frozen=True)
class Sets:
    """Paths of a training and a validation .beton."""

    train: str
    val: str


def toy_recipe(sets: Sets, **sections: dict[str, Any]) -> Recipe:
    """ARAT on a timm net of 8 channels; keys given per section come on top."""
    tree: dict[str, dict[str, Any]] = {
        "data": {
            "train": sets.train,
            "val": sets.val,
            "num_classes": 3,
            "image_size": 16,
            "augment": "pad_crop",
            "loader": "ffcv" if is_installed("ffcv") else "torchvision",
        },
        "model": {
            "name": "resnet10t",
            "args": {"channels": [8, 8, 8, 8], "stem_width": 8, "zero_init_last": False},
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
        },
        "objective": {"name": "arat", "gamma": 2},
        "attack": {"steps": 1},
        "optim": {"lr": 0.05},
        "train": {"epochs": 3, "global_batch_size": 8, "precision": "fp32", "log_every": 2, "keep_checkpoints": 99},
        "eval": {"attack": "pgd2", "batch_size": 5},
        "track": {"mlflow": False},
        "cluster": {"workers": 0},
    }
    for section, keys in sections.items():
        own = tree.setdefault(section, {})
        if keys.get("name", own.get("name")) != own.get("name"):
            own.clear()
        own.update(keys)
    return parse_recipe(tree)


class WeightCasts(TorchDispatchMode):
    """Counts casts of float32 tensors to bf16 by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return out
