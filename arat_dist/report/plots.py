"""The report's plots, each a matplotlib figure from plain numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from arat_dist.report.gather import ClassAccuracies, Series
from arat_dist.report.peers import Comparison, Point
from arat_dist.report.style import GRID, INK, MUTED, SURFACE, colour, dash

SIZE = (4.4, 2.9)
"""Of one plot, in inches: as wide as a phone at a legible size of letters."""
MOST_POINTS = 600
MOST_CLASSES = 20


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `index` chooses its colour and dashes, and the same run has the same everywhere."""

    label: str
    series: Series
    index: int
    has_markers: bool = False


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most so many points: the means of neighbours."""
    if len(series) <= most:
        return series
    parts = np.array_split(np.arange(len(series)), most)
    return Series(
        np.array([series.epochs[part].mean() for part in parts]),
        np.array([series.values[part].mean() for part in parts]),
    )


def line_plot(
    curves: Sequence[Curve],
    *,
    unit: str = "",
    is_share: bool = False,
    reference: float | None = None,
    from_zero: bool = False,
) -> Figure:
    """Metrics over epochs.

    Args:
        curves: the lines.
        unit: of the values.
        is_share: values are shares of 1, shown in percent.
        reference: a value to compare with, drawn as a thin line.
        from_zero: the axis begins at zero.
    """
    figure, axes = _new(SIZE)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.9)
    for curve in curves:
        series = thinned(curve.series)
        marker = "o" if curve.has_markers or len(series) == 1 else None
        axes.plot(
            series.epochs,
            series.values,
            color=colour(curve.index),
            linestyle=dash(curve.index),
            marker=marker,
            markersize=3.5,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if from_zero:
        axes.set_ylim(bottom=0)
    _legend(axes, [curve.label for curve in curves])
    return figure


def eps_plot(curves: Sequence[Curve], *, norm: str, eps: Sequence[float]) -> Figure:
    """Robust accuracy against the radius; `eps` are the runs' own, drawn as thin upright lines."""
    figure, axes = _new(SIZE)
    scale = 255 if norm == "linf" else 1
    for radius in sorted(set(eps)):
        axes.axvline(radius * scale, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for curve in curves:
        radii = curve.series.epochs * scale
        style = {"color": colour(curve.index), "linestyle": dash(curve.index), "marker": "o", "markersize": 4}
        axes.plot(radii, curve.series.values, **style)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"eps ({norm}, 1/255)" if norm == "linf" else f"eps ({norm})")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes, [curve.label for curve in curves])
    return figure


def letters(count: int) -> list[str]:
    """a, b, ..., z, aa, ab, ...: names of points."""

    def name(index: int) -> str:
        return (name(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)

    return [name(index) for index in range(count)]


def comparison_plot(comparison: Comparison, *, has_key: bool) -> Figure:
    """Clean against robust accuracy: filled points are runs, hollow ones are published; the shape is the attack.

    Args:
        comparison: the points; bars are standard errors, where the number of pictures is known.
        has_key: put the names of the points beside them, for where no table does.
    """
    figure, axes = _new((7.6 if has_key else SIZE[0], 3.4))
    points = comparison.points
    for point, name in zip(points, letters(len(points)), strict=True):
        _draw_point(axes, point, name)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1, zorder=0)
    bars = [point.errors or (0.0, 0.0) for point in points]
    axes.set_xlim(*_room([p.clean + side * bar[0] for p, bar in zip(points, bars, strict=True) for side in (-1, 1)]))
    axes.set_ylim(*_room([p.robust + side * bar[1] for p, bar in zip(points, bars, strict=True) for side in (-1, 1)]))
    axes.set_xlabel("clean accuracy")
    axes.set_ylabel("robust accuracy")
    _percent(axes)
    if has_key:
        key = [f"{name}  {key_text(point)}" for point, name in zip(points, letters(len(points)), strict=True)]
        axes.text(1.03, 1, "\n".join(key), transform=axes.transAxes, va="top", fontsize=7.5, linespacing=1.45)
    return figure


@dataclass(frozen=True)
class TrialPoints:
    """Clean and robust accuracies of a search's trials, float64 [N,2] each, and the names of those of the front."""

    front: NDArray[np.float64]
    names: Sequence[str]
    beaten: NDArray[np.float64]
    pruned: NDArray[np.float64]


def front_plot(points: TrialPoints) -> Figure:
    """Trials by clean and robust accuracy: the front joined, what it beats hollow, what was pruned as crosses."""
    figure, axes = _new((SIZE[0], 3.4))
    ink = colour(0)
    axes.plot(*points.pruned.T, "x", color=MUTED, markersize=5, zorder=2)
    axes.plot(*points.beaten.T, "o", color=ink, markerfacecolor=SURFACE, markersize=6, zorder=3)
    axes.plot(*points.front.T, "o-", color=ink, markersize=7, linewidth=1.2, zorder=4)
    for at, name in zip(points.front, points.names, strict=True):
        axes.annotate(name, at, (5, 5), textcoords="offset points", color=ink, fontweight="bold", zorder=5)
    # Trials that were pruned early lie far off: those that finished set the scale.
    every = np.concatenate([points.front, points.beaten]) if len(points.front) else points.pruned
    if len(every):
        axes.set_xlim(*_room([float(value) for value in every[:, 0]]))
        axes.set_ylim(*_room([float(value) for value in every[:, 1]]))
    axes.set_xlabel("clean accuracy")
    axes.set_ylabel("robust accuracy")
    _percent(axes)
    return figure


def _percent(axes: Axes) -> None:
    """Shares in percent on both axes."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def key_text(point: Point) -> str:
    """What a point is, in one line."""
    return f"{point.label}, {point.attack}: {point.clean:.1%} / {point.robust:.1%}"


def class_plot(accuracies: ClassAccuracies, class_names: Sequence[str], index: int) -> Figure:
    """Clean (hollow) and robust (filled) accuracy of each class; of many, the ten worst and the ten best."""
    rows = shown_classes(accuracies)
    figure, axes = _new((SIZE[0], 0.9 + 0.21 * len(rows)))
    at = np.arange(len(rows))[::-1]
    clean, robust = accuracies.clean[rows], accuracies.robust[rows]
    axes.hlines(at, robust, clean, color=GRID, linewidth=3)
    axes.plot(clean, at, "o", color=colour(index), markerfacecolor=SURFACE, markersize=6, label="clean")
    axes.plot(robust, at, "o", color=colour(index), markersize=4, label="robust")
    axes.set_yticks(at, [_short(class_names[int(label)]) for label in accuracies.labels[rows]])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(rows) < len(accuracies.labels):
        axes.axhline(len(rows) / 2 - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    _above(axes, *axes.get_legend_handles_labels(), columns=2)
    return figure


def shown_classes(accuracies: ClassAccuracies) -> NDArray[np.int64]:
    """Rows of the classes that `class_plot` shows: all, or the extremes by robust, then clean accuracy."""
    if len(accuracies.labels) <= MOST_CLASSES:
        return np.arange(len(accuracies.labels))
    order = np.lexsort((accuracies.clean, accuracies.robust))
    return np.concatenate([order[: MOST_CLASSES // 2], order[-MOST_CLASSES // 2 :]])


def pictures_plot(rows: Sequence[Sequence[tuple[NDArray[Any], str]]], row_names: Sequence[str]) -> Figure:
    """Rows of pictures [H,W,3], uint8 or in [0,1], each with a line of text below; a row has a name on its left."""
    figure = Figure(figsize=(0.6 + 1.35 * len(rows[0]), 1.62 * len(rows) + 0.4))
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row, name in zip(grid, rows, row_names, strict=True):
        for axes, (picture, text) in zip(line, row, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.set_xlabel(text, fontsize=7.5, color=INK)
        line[0].set_ylabel(name, fontsize=8.5)
    return figure


def _draw_point(axes: Axes, point: Point, name: str) -> None:
    is_run = point.run is not None
    ink = MUTED if point.run is None else colour(point.run)
    if point.errors is not None:
        clean, robust = point.errors
        axes.errorbar(
            point.clean, point.robust, xerr=clean, yerr=robust, color=ink, linewidth=1, zorder=2, clip_on=False
        )
    style = {"color": ink, "markerfacecolor": ink if is_run else SURFACE, "markersize": 8 if is_run else 6}
    axes.plot(
        point.clean, point.robust, marker=marker_of(point.attack), linestyle="none", zorder=3, clip_on=False, **style
    )
    weight = "bold" if is_run else "normal"
    at = (point.clean, point.robust)
    axes.annotate(name, at, (-5, 5), textcoords="offset points", ha="right", color=ink, fontweight=weight, zorder=4)


def marker_of(attack: str) -> str:
    """Matplotlib's sign for an attack as it is shown: a circle for PGD, a triangle for APGD, a diamond for AutoAttack.

    All others have a square.
    """
    signs = {r"PGD-\d+(, \d+ starts)?": "o", r"APGD(-\w+)?(, \d+ starts)?": "^", "AutoAttack": "D"}
    return next((sign for pattern, sign in signs.items() if re.fullmatch(pattern, attack)), "s")


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of shares with room around the values, a tenth at least."""
    low, high = min(values), max(values)
    margin = max(0.02, 0.12 * (high - low), (0.1 - (high - low)) / 2)
    return max(low - margin, -0.005), min(high + margin, 1.005)


def _new(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _legend(axes: Axes, labels: Sequence[str]) -> None:
    """Names of several lines above them; of one line the title tells."""
    if len(labels) > 1:
        names = [_short(label) for label in labels]
        # Three abreast where they have room.
        columns = 3 if sum(map(len, names[:3])) <= 30 and max(map(len, names)) <= 14 else 2
        _above(axes, axes.get_lines()[-len(labels) :], names, columns)


def _above(axes: Axes, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    axes.legend(handles, names, loc="lower left", bbox_to_anchor=(-0.02, 1), borderaxespad=0.1, ncols=columns)


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
