"""Which plots a report has: for each, the numbers that it shows, its words, and its two pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from arat_dist.report.gather import ClassAccuracies, RunRecord, Series, class_accuracies, printable, read_verdicts
from arat_dist.report.names import evaluation_name, radius_name, share_name
from arat_dist.report.peers import Comparison
from arat_dist.report.pictures import STEPS, Attacked
from arat_dist.report.plots import Curve, class_plot, comparison_plot, eps_plot, line_plot, shown_classes
from arat_dist.report.style import styled, to_png, to_svg

MOST_PARTS = 6
"""Lines of one plot that belong to one run."""


@dataclass(frozen=True)
class Plot:
    """One plot: `name` is its file's, `alt` its content in words, `svg` for the page, `png` for a file.

    run: label of the run that it is about; None where it compares them. Without `svg` the page has other means.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    png: bytes
    run: str | None = None


@dataclass(frozen=True)
class Shared:
    """A metric that all runs are compared in."""

    key: str
    title: str
    unit: str = ""
    is_share: bool = False
    reference: float | None = None
    from_zero: bool = False
    has_markers: bool = False
    caption: str = ""


TRAINING = (
    Shared("clean_accuracy", "Clean accuracy, training pictures", is_share=True),
    Shared(
        "robust_accuracy", "Robust accuracy, training pictures", is_share=True, caption="Under the training attack."
    ),
    Shared("val_clean_accuracy", "Clean accuracy, validation", is_share=True, has_markers=True),
    Shared(
        "val_robust_accuracy",
        "Robust accuracy, validation",
        is_share=True,
        has_markers=True,
        caption="Evaluations in the course of training, with eval.every_attack.",
    ),
    Shared("lr", "Learning rate", from_zero=True),
    Shared("gradient_norm", "Gradient norm", from_zero=True),
    Shared("adv_weight", "Weight of the adversarial loss", from_zero=True),
)

CONFLICT = (
    Shared(
        "gradient_cosine",
        "Gradients of invariance and classification",
        unit="cosine",
        reference=0,
        caption="Below zero the two pull against each other.",
    ),
    Shared(
        "gradient_opposed",
        "Weights whose two gradients have opposite signs",
        is_share=True,
        reference=0.5,
        caption="Half is what chance would give.",
    ),
    Shared(
        "branch_mean_distance",
        "Distance of the norm branches' means",
        unit="standard deviations",
        from_zero=True,
    ),
    Shared("branch_variance_distance", "Distance of the norm branches' variances", unit="|ln ratio|", from_zero=True),
)

SPEED = (
    Shared("images_per_second", "Training speed", unit="pictures/s", from_zero=True),
    Shared("memory_mb", "Peak memory of the first worker", unit="MiB", from_zero=True),
)


def training_plots(records: Sequence[RunRecord]) -> list[Plot]:
    """Losses by part of each run, then what all are compared in."""
    losses = [_parts(n, record, "losses", "Loss by part", prefix="loss") for n, record in enumerate(records)]
    return [*_drawn(losses), *shared_plots(records, TRAINING)]


def conflict_plots(records: Sequence[RunRecord]) -> list[Plot]:
    """The diagnostics of those runs that logged them."""
    title = "Cosine of the two gradients, by layer"
    layers = [
        _parts(n, record, "conflict-layers", title, prefix="gradient_cosine_", reference=0)
        for n, record in enumerate(records)
    ]
    return [*shared_plots(records, CONFLICT), *_drawn(layers)]


def speed_plots(records: Sequence[RunRecord]) -> list[Plot]:
    """Pictures a second, memory, and where the time went."""
    shares = [
        _parts(n, record, "time", "Shares of the time", suffix="_fraction", is_share=True)
        for n, record in enumerate(records)
    ]
    return [*shared_plots(records, SPEED), *_drawn(shares)]


def shared_plots(records: Sequence[RunRecord], metrics: Sequence[Shared]) -> list[Plot]:
    """A plot for each metric that a run has."""
    plots = []
    for metric in metrics:
        curves = [
            Curve(record.label, series, number, metric.has_markers)
            for number, record in enumerate(records)
            if len(series := record.series(metric.key))
        ]
        if curves:
            plots.append(
                draw(
                    metric.key.replace("_", "-"),
                    metric.title,
                    _last_values(curves, metric.is_share),
                    lambda curves=curves, metric=metric: line_plot(
                        curves,
                        unit=metric.unit,
                        is_share=metric.is_share,
                        reference=metric.reference,
                        from_zero=metric.from_zero,
                    ),
                    caption=metric.caption,
                )
            )
    return plots


def part_curves(record: RunRecord, *, prefix: str = "", suffix: str = "") -> list[Curve]:
    """The metrics of one run whose names begin and end so, named by what is left; of many, some evenly spaced."""
    keys = [key for key in record.keys(prefix) if key.endswith(suffix) and len(record.series(key))]
    if len(keys) > MOST_PARTS:
        keys = [keys[at] for at in np.linspace(0, len(keys) - 1, MOST_PARTS).round().astype(int)]
    names = [key.removeprefix(prefix).removesuffix(suffix).strip("_").replace("_", " ") or "total" for key in keys]
    return [Curve(name, record.series(key), at) for at, (key, name) in enumerate(zip(keys, names, strict=True))]


def comparison_plots(comparisons: Sequence[Comparison]) -> list[Plot]:
    """Clean against robust accuracy, a plot for each group that may be compared."""
    return [
        draw(
            f"clean-robust-{number}",
            f"{comparison.data}, {radius_name(comparison.norm, comparison.eps)}",
            "Clean against robust accuracy; the table beside it has the figures.",
            lambda comparison=comparison: comparison_plot(comparison, has_key=False),
            for_file=lambda comparison=comparison: comparison_plot(comparison, has_key=True),
        )
        for number, comparison in enumerate(comparisons, 1)
    ]


def eps_plots(records: Sequence[RunRecord], attacked: Sequence[Attacked | None]) -> list[Plot]:
    """Robust accuracy against eps: a plot for each norm."""
    plots = []
    for norm in sorted({each.norm for each in attacked if each is not None}):
        found = [(n, each) for n, each in enumerate(attacked) if each is not None and each.norm == norm]
        curves = [Curve(records[n].label, Series(*each.curve()), n) for n, each in found]
        counts = sorted({len(each.samples) for _, each in found})
        caption = (
            f"PGD-{STEPS} on {' or '.join(map(str, counts))} pictures of each run's validation set; one that fell in a "
            "smaller ball counts as fallen in a larger one. Upright: the runs' own eps. A curve that doesn't come down "
            "to zero hints at gradients that mislead the attack."
        )
        plots.append(
            draw(
                f"eps-{norm}",
                f"Robust accuracy against eps, {norm}",
                _last_values(curves, is_share=True, which="at the largest eps"),
                lambda curves=curves, norm=norm, found=found: eps_plot(
                    curves, norm=norm, eps=[each.eps for _, each in found]
                ),
                caption=caption,
            )
        )
    return plots


def class_plots(records: Sequence[RunRecord], attacked: Sequence[Attacked | None]) -> list[Plot]:
    """Accuracy by class of each run for which the verdicts of single pictures are known."""
    plots = []
    for number, (record, own) in enumerate(zip(records, attacked, strict=True)):
        if (found := by_class(record, own)) is None:
            continue
        accuracies, source = found
        names = record_classes(record, own, accuracies)
        worst = accuracies.labels[accuracies.robust.argmin()]
        is_part = len(shown_classes(accuracies)) < len(accuracies.labels)
        plots.append(
            draw(
                f"classes-{number + 1}-{slug(record.label)}",
                "Accuracy by class",
                f"The lowest robust accuracy is {share_name(float(accuracies.robust.min()))}, of {names[worst]}.",
                lambda accuracies=accuracies, names=names, number=number: class_plot(accuracies, names, number),
                caption=source + ("; the ten least and the ten most robust classes" if is_part else "") + ".",
                run=record.label,
            )
        )
    return plots


def by_class(record: RunRecord, attacked: Attacked | None) -> tuple[ClassAccuracies, str] | None:
    """Accuracies by class and what they were counted on: the evaluation of most pictures, else the attacked ones."""
    evaluations = [each for each in record.evaluations if each.result["robust_accuracy"] is not None]
    for evaluation in sorted(
        evaluations, key=lambda each: (-each.result["num_samples"], each.result["robust_accuracy"])
    ):
        result = evaluation.result
        if (accuracies := read_verdicts(evaluation)) is not None:
            ball = radius_name(result["norm"], result["eps"])
            return accuracies, f"{evaluation_name(result)}, {ball}, {result['num_samples']:,} pictures"
    if attacked is None:
        return None
    accuracies = class_accuracies(attacked.labels, attacked.is_clean_right, attacked.is_robust)
    ball = radius_name(attacked.norm, attacked.eps)
    return accuracies, f"PGD-{STEPS}, {ball}, {len(attacked.samples):,} pictures"


def record_classes(record: RunRecord, attacked: Attacked | None, accuracies: ClassAccuracies) -> list[str]:
    """Names of the classes, as far as they are known."""
    if record.manifest is not None:
        names: Sequence[str] = record.manifest.class_names
    else:
        names = attacked.class_names if attacked is not None else ()
    most = int(accuracies.labels.max()) + 1
    return [printable(name) for name in names] + [str(label) for label in range(len(names), most)]


def draw(
    name: str,
    title: str,
    alt: str,
    figure: Callable[[], Figure],
    *,
    caption: str = "",
    run: str | None = None,
    for_file: Callable[[], Figure] | None = None,
) -> Plot:
    """Draw a plot twice: for the page, whose words are beside it, and for a file of its own, with its title."""
    with styled():
        svg = to_svg(figure(), name)
        png = to_png((for_file or figure)(), f"{run}: {title}" if run else title)
    return Plot(name, title, f"{title}. {alt}", caption, svg, png, run)


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", label).strip("-.")[-60:] or "run"


def _parts(
    number: int, record: RunRecord, name: str, title: str, *, prefix: str = "", suffix: str = "", **options: Any
) -> Plot | None:
    """Several metrics of one run in one plot; None where it has none of them."""
    if not (curves := part_curves(record, prefix=prefix, suffix=suffix)):
        return None
    return draw(
        f"{name}-{number + 1}-{slug(record.label)}",
        title,
        _last_values(curves, bool(options.get("is_share"))),
        lambda: line_plot(curves, **options),
        run=record.label,
    )


def _drawn(plots: Sequence[Plot | None]) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


def _last_values(curves: Sequence[Curve], is_share: bool, which: str = "last") -> str:
    values = (curve.series.values[-1] for curve in curves)
    shown = [share_name(value) if is_share else f"{value:.3g}" for value in values]
    pairs = (f"{curve.label} {value}" for curve, value in zip(curves, shown, strict=True))
    return f"{which.capitalize()}: {', '.join(pairs)}."
