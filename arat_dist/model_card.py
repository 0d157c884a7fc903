"""The model card: README.md of an export, as the Hugging Face hub reads it and as people do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from arat_dist.config import Recipe
from arat_dist.export import OWN_NETS, Handover, is_own_net
from arat_dist.hub_metadata import base_model, front_matter, radius
from arat_dist.measured import Measurement

_MAX_NAMES = 20
"""Class names that the card lists; config.json and model.json hold them all."""

CITATION = """@inproceedings{waseda2025rethinking,
  title={Rethinking Invariance Regularization in Adversarial Training to Improve Robustness-Accuracy Trade-off},
  author={Waseda, Futa and Chang, Ching-Chun and Echizen, Isao},
  booktitle={International Conference on Learning Representations},
  year={2025},
  url={https://arxiv.org/abs/2402.14648}
}"""


@dataclass(frozen=True)
class DataSet:
    """One of the two sets of a run; what is None isn't known here, as the set has been moved away.

    role: train or val.
    name: its file and the folder that it is in.
    num_samples: number of pictures.
    sha256: of the .beton, as its manifest says it.
    class_names: in the order of the logits.
    """

    role: str
    name: str
    num_samples: int | None = None
    sha256: str | None = None
    class_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    name: str
    """The run's."""
    recipe: Recipe
    """The resolved recipe."""
    weights: str
    """raw, ema or swa."""
    step: int
    """Steps that they were trained for."""
    about: Handover
    """How pictures come to the net."""
    formats: Sequence[str]
    """timm, onnx: what the folder holds."""
    sets: Sequence[DataSet]
    """What it was trained and evaluated on."""
    measured: Sequence[Measurement]
    """Its accuracies."""


def write_card(folder: Path, card: Card) -> None:
    """Write README.md."""
    (folder / "README.md").write_text(render(card), encoding="utf-8")


def render(card: Card) -> str:
    """The card: YAML for the hub, Markdown for people."""
    sections = [
        f"# {plain(card.name)}",
        _summary(card),
        "## Accuracy\n\n" + _accuracy(card),
        "## How to load it\n\n" + "\n\n".join(_loading(card)),
        "## What it is for, and its limits\n\n" + _limits(card),
        "## Data\n\n" + _data(card),
        "## Recipe\n\n" + _recipe(card),
        f"## Citation\n\n{_cited(card)}:\n\n```bibtex\n{CITATION}\n```",
        "## Licence\n\nNone is stated: that is for whoever publishes these weights to choose, as `license:` at the top "
        "of this file. The data, and the weights that training began with if there were any, may limit the choice.",
    ]
    head = front_matter(card.name, card.recipe, card.formats, card.measured)
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _is_standard(card: Card) -> bool:
    """Whether it was trained on clean pictures alone, so that the recipe's attack says nothing of it."""
    return card.recipe.objective.name == "standard"


# Sections -----------------------------------------------------------------------------------------------------------


def _summary(card: Card) -> str:
    model, about = card.recipe.model, card.about
    size = f"{about.image_size}x{about.image_size}"
    kind = {"raw": "the weights as trained", "ema": "their moving average (EMA)", "swa": "their even average (SWA)"}
    start = ""
    if base := base_model(card.recipe):
        start = f" Training began with the weights `{base}`."
    elif model.pretrained or model.checkpoint is not None:
        start = " Training began with given weights."
    how = "on clean pictures alone" if _is_standard(card) else "against adversarial examples"
    return (
        f"An image classifier trained {how} with arat-dist: `{model.name}`, "
        f"{card.recipe.data.num_classes} classes, pictures of {size}, method {card.recipe.objective.name.upper()}. "
        f"It holds {kind[card.weights]} after {card.step:,} steps; of norm layers with two branches, the one for "
        f"attacked pictures.{start}"
    )


def _accuracy(card: Card) -> str:
    if not card.measured:
        return "Not measured."
    parts = [
        _accuracy_table(card.measured),
        "Accuracies are fractions of 1. A picture is robust when it is right before and after the attack.",
    ]
    corrupted = [each for each in card.measured if each.corruptions]
    parts += [_corruption_table(each) for each in corrupted]
    if warnings := dict.fromkeys(warning for each in card.measured for warning in each.warnings):
        parts.append("Warnings of the evaluations:\n\n" + "\n".join(f"- {plain(warning)}" for warning in warnings))
    return "\n\n".join(parts)


def _accuracy_table(measured: Sequence[Measurement]) -> str:
    rows = []
    for each in measured:
        ball = [each.norm, radius(each.norm, each.eps)] if each.attack != "none" else ["", ""]
        last = "" if each.robust_accuracy is None else f"{each.robust_accuracy:.4f}"
        about = [each.data, f"{each.num_samples:,}", f"{each.clean_accuracy:.4f}"]
        rows.append([*about, each.attack, *ball, last])
        rows += [["", "", "", f"… after {name}", "", "", f"{accuracy:.4f}"] for name, accuracy in each.parts]
    return table(["data", "pictures", "clean", "attack", "norm", "eps", "robust"], rows)


def _corruption_table(each: Measurement) -> str:
    severities = sorted({severity for _, severity, _ in each.corruptions})
    found = {(name, severity): accuracy for name, severity, accuracy in each.corruptions}
    rows = [
        [name, *(f"{found[name, s]:.4f}" if (name, s) in found else "" for s in severities)]
        for name in dict.fromkeys(name for name, _, _ in each.corruptions)
    ]
    title = f"Common corruptions by severity, {each.num_samples:,} pictures of {plain(each.data)}:\n\n"
    return title + table(["corruption", *map(str, severities)], rows)


def _loading(card: Card) -> Iterator[str]:
    about = card.about
    if "timm" in card.formats:
        own = is_own_net(card.recipe.model.name)
        imports = (
            f"import {OWN_NETS}  # of the package arat-dist: registers the architecture with timm\n" if own else ""
        )
        yield "\n".join(
            [
                "With timm; `FOLDER` is where this file lies, or say `hf-hub:USER/NAME` once it is on the hub:\n",
                "```python",
                f"{imports}import timm",
                "from PIL import Image",
                "",
                'net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)",
                'picture = Image.open("PICTURE").convert("RGB")',
                "logits = net(transform(picture).unsqueeze(0))",
                "```\n",
                f"timm's transform normalises: pixels in [0,1] less {list(about.mean)}, over {list(about.std)}. "
                "Attacks and their eps are on pixels before that.",
            ]
        )
    if "onnx" in card.formats:
        side = about.image_size
        yield "\n".join(
            [
                "With onnxruntime, any number of pictures at a time; `model.onnx` takes pixels in [0,1] and normalises "
                "them itself (`model.json` says the rest):\n",
                "```python",
                "import numpy as np",
                "import onnxruntime",
                "from PIL import Image, ImageOps",
                "",
                'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
                'picture = Image.open("PICTURE").convert("RGB")',
                f"picture = ImageOps.fit(picture, ({side}, {side}), Image.Resampling.{about.interpolation.upper()}, "
                f"bleed={(1 - about.crop_pct) / 2:.4g})",
                "pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255  # [B,3,H,W]",
                '(logits,) = session.run(["logits"], {"pixels": pixels})',
                "```",
            ]
        )


def _limits(card: Card) -> str:
    attack = card.recipe.attack
    against = f"for small changes of pixels, {attack.norm} up to {radius(attack.norm, attack.eps)}. Larger ones, "
    trained = "on clean pictures: attacks fool it. Large changes, " if _is_standard(card) else against
    return "\n".join(
        [
            f"- It was trained {trained}other norms, patches and changed scenes may fool it.",
            "- The accuracies above are upper bounds of the true ones: nothing here is certified, and stronger "
            "attacks, AutoAttack before all, may find more. Compare figures of the same attack and pictures only.",
            f"- It knows {card.recipe.data.num_classes} classes and gives one of them to any picture. It has the "
            "biases of the data that it was trained on.",
            "- It is meant for research and as a start for training. Before anything depends on it, measure it on your "
            "own pictures, `arat eval` with the timm folder.",
        ]
    )


def _cited(card: Card) -> str:
    ours = card.recipe.objective.name == "arat"
    return "The method, ARAT" if ours else "ARAT, the method that arat-dist is built around and compares this one with"


def _data(card: Card) -> str:
    rows = [
        [each.role, each.name, "" if each.num_samples is None else f"{each.num_samples:,}", each.sha256 or ""]
        for each in card.sets
    ]
    names = card.about.class_names
    num_classes = card.recipe.data.num_classes
    listed = "Their names weren't at hand."
    if names is not None:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        listed = ", ".join(plain(name) for name in names[:_MAX_NAMES]) + more
    return table(["set", "name", "pictures", "SHA-256 of the .beton"], rows) + f"\n\n{num_classes} classes: {listed}"


def _recipe(card: Card) -> str:
    rows = [
        [key, ", ".join(f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())]
        for key, values in _settings(card.recipe).items()
    ]
    return table(["section", "settings"], rows) + f"\n\nSHA-256 of the resolved recipe: `{card.recipe.sha256()}`"


def _settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The keys of a recipe that a reader wants first. No paths: those are of the machine that trained."""
    attack, train = recipe.attack, recipe.train
    averages = {"ema_decay": train.ema_decay, "swa_start_epoch": train.swa_start_epoch}
    kept = {
        "model": ("name", "args", "pretrained"),
        "data": ("image_size", "augment", "flip", "mixup", "cutmix", "rand_augment"),
        "attack": ("name", "norm", "steps", "step_size", "loss", "start"),
        "optim": ("name", "lr", "weight_decay", "schedule", "warmup_epochs", "milestones"),
        "train": ("epochs", "global_batch_size", "precision", "seed", *(key for key, on in averages.items() if on)),
    }
    sections = {key: {name: getattr(getattr(recipe, key), name) for name in names} for key, names in kept.items()}
    sections["attack"]["eps"] = radius(attack.norm, attack.eps)
    if attack.step_size is not None:
        sections["attack"]["step_size"] = radius(attack.norm, attack.step_size)
    if recipe.objective.name == "standard":
        del sections["attack"]
    objective = {"name": recipe.objective.name} | recipe.objective.model_dump(mode="json", exclude={"teacher"})
    order = {"model": sections["model"], "objective": objective}
    # What is left to the method or the net says nothing.
    return {
        key: {name: value for name, value in values.items() if value is not None and value not in ({}, ())}
        for key, values in (order | sections).items()
    }


# Words --------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are plain text."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plain(text: str) -> str:
    """Text in one line with nothing in it that Markdown or HTML would read: names come from folders."""
    return re.sub(r"([\\`*_\[\]<>#|&~])", r"\\\1", " ".join(text.split()))
