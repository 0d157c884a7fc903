"""The pictures before and after the attack, and what it added: as figures of the page, and as a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_dist.report.figures import Plot, slug
from arat_dist.report.gather import RunRecord, printable
from arat_dist.report.names import radius_name
from arat_dist.report.pictures import STEPS, Attacked
from arat_dist.report.plots import pictures_plot
from arat_dist.report.style import styled, to_png

LARGEST_PNG = 64
"""Side up to which pictures are kept as they are, in pixels; larger ones become JPEG."""


def gallery(record: RunRecord, attacked: Attacked) -> dict[str, Any]:
    """The pictures of a run: each before and after the attack, and what was added."""
    names = [printable(name) for name in attacked.class_names]
    noise = perturbations(attacked)
    cards = []
    for at, position in enumerate(attacked.shown):
        label, before, after = (
            int(each)
            for each in (
                attacked.labels[position],
                attacked.clean_predictions[position],
                attacked.adversarial_predictions[at],
            )
        )
        cards.append(
            {
                "sample": int(attacked.samples[position]),
                "label": names[label],
                "before": {"name": names[before], "is_right": before == label, "share": attacked.confidences[at, 0]},
                "after": {"name": names[after], "is_right": after == label, "share": attacked.confidences[at, 1]},
                "clean": picture_uri(attacked.clean[at]),
                "noise": picture_uri(noise[at]),
                "adversarial": picture_uri(attacked.adversarial[at]),
            }
        )
    return {
        "run": record.label,
        "cards": cards,
        "factor": f"{amplification(attacked):.3g}",
        "attack": f"PGD-{STEPS}, {radius_name(attacked.norm, attacked.eps)}",
        "num_samples": len(attacked.samples),
        "clean": float(attacked.is_clean_right.mean()),
        "robust": float(attacked.is_robust.mean()),
        "is_small": attacked.clean.shape[1] <= LARGEST_PNG,
    }


def picture_uri(picture: NDArray[Any]) -> str:
    """A picture uint8 [H,W,3], or float in [0,1], as a data: URI."""
    pixels = picture if picture.dtype == np.uint8 else np.rint(picture * 255).astype(np.uint8)
    kind = "PNG" if len(pixels) <= LARGEST_PNG else "JPEG"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 92}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_plots(records: Sequence[RunRecord], attacked: Sequence[Attacked | None]) -> list[Plot]:
    """The grids of clean pictures, perturbations and adversarial pictures, as files; the page shows them singly."""
    plots = []
    for number, (record, each) in enumerate(zip(records, attacked, strict=True)):
        if each is None or not len(each.shown):
            continue
        names = [printable(name) for name in each.class_names]
        before, after = each.clean_predictions[each.shown], each.adversarial_predictions
        clean = [(picture, names[label]) for picture, label in zip(each.clean, before, strict=True)]
        noise = [(picture, "") for picture in perturbations(each)]
        moved = [(picture, names[label]) for picture, label in zip(each.adversarial, after, strict=True)]
        rows = ("clean", f"perturbation x{amplification(each):.3g}", "adversarial")
        title = f"Predictions before and after PGD-{STEPS}, {radius_name(each.norm, each.eps)}"
        with styled():
            png = to_png(pictures_plot([clean, noise, moved], rows), f"{record.label}: {title}")
        plots.append(Plot(f"pictures-{number + 1}-{slug(record.label)}", title, title, "", "", png, record.label))
    return plots


def amplification(attacked: Attacked) -> float:
    """By how much the perturbations that are shown are multiplied, so that the largest fills the range of colours."""
    largest = np.abs(attacked.adversarial - attacked.clean / np.float32(255)).max()
    return float(0.5 / largest) if largest > 0 else 1.0


def perturbations(attacked: Attacked) -> NDArray[np.float32]:
    """What the attack added, amplified around grey: float32 [P,H,W,3] in [0,1]."""
    delta = attacked.adversarial - attacked.clean / np.float32(255)
    return np.clip(0.5 + amplification(attacked) * delta, 0, 1).astype(np.float32)
