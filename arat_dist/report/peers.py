"""Points that others published, for context: only those of the same data set, norm and eps stand beside a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from arat_dist.config import Count, Positive, Section
from arat_dist.data.manifest import Manifest
from arat_dist.report.gather import RunRecord, data_name, standard_error
from arat_dist.report.names import attack_name, evaluation_name

Percent = Annotated[float, Field(ge=0, le=100)]


class KnownData(Section):
    """How a public data set is recognised."""

    num_classes: Count
    first: str
    """Name of the first class."""
    last: str
    """Name of the last class."""
    num_samples: tuple[Count, ...]
    """Pictures of a validation set that is meant."""


class PublishedPoint(Section):
    """One net that somebody measured, in percent."""

    method: str
    model: str
    clean: Percent
    robust: Percent


class PublishedTable(Section):
    """Nets measured alike."""

    data: str
    norm: str
    eps: Positive
    attack: str
    source: str
    points: tuple[PublishedPoint, ...]


class Published(Section):
    """All of peers.yaml."""

    data: dict[str, KnownData]
    tables: tuple[PublishedTable, ...]


@dataclass(frozen=True)
class Point:
    """Clean and robust accuracy of one net, shares of 1, and the attack that they were measured with.

    attack: as it is shown.
    num_samples: pictures they were measured on; None where it is in the source.
    run: its number in the report; None for a published point.
    """

    label: str
    clean: float
    robust: float
    attack: str
    num_samples: int | None = None
    run: int | None = None

    @property
    def errors(self) -> tuple[float, float] | None:
        """Standard errors of clean and robust accuracy; None where the number of pictures isn't known."""
        n = self.num_samples
        return None if n is None else (standard_error(self.clean, n), standard_error(self.robust, n))


@dataclass(frozen=True)
class Comparison:
    """Points that may be compared: one data set, one norm, one eps.

    measured: those of the runs; published: those of others, with their sources.
    """

    data: str
    norm: str
    eps: float
    measured: tuple[Point, ...]
    published: tuple[Point, ...]
    sources: tuple[str, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """All of them, the runs' first."""
        return self.measured + self.published


@cache
def published() -> Published:
    """What ships with the package."""
    return Published.model_validate(yaml.safe_load((Path(__file__).parent / "peers.yaml").read_text()))


def known_data(manifest: Manifest | None) -> str | None:
    """Name of the public data set that a validation set is, by its classes and its number of pictures."""
    if manifest is None:
        return None
    names = manifest.class_names
    for name, known in published().data.items():
        classes = (known.num_classes, known.first, known.last)
        if (len(names), names[0], names[-1]) == classes and manifest.num_samples in known.num_samples:
            return name
    return None


def compare(records: list[RunRecord]) -> list[Comparison]:
    """Every point that the runs measured, in groups that may be compared, with what others published beside them."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    radii: dict[str, float] = {}
    for number, record in enumerate(records):
        for data, norm, eps, point in _measured(record, number):
            shown = f"{eps:.6g}"  # 8/255 read from two files is one radius
            radii[shown] = eps
            groups.setdefault((data, norm, shown), []).append(point)
    comparisons = []
    for (data, norm, shown), points in groups.items():
        tables = [t for t in published().tables if (t.data, t.norm, f"{t.eps:.6g}") == (data, norm, shown)]
        others = tuple(
            Point(", ".join(filter(None, (p.method, p.model))), p.clean / 100, p.robust / 100, attack_name(t.attack))
            for t in tables
            for p in t.points
        )
        sources = tuple(t.source for t in tables)
        comparisons.append(Comparison(data, norm, radii[shown], tuple(points), others, sources))
    return comparisons


def _measured(record: RunRecord, number: int) -> list[tuple[str, str, float, Point]]:
    """Data, norm, eps and point of the run's own evaluation and of all others that attacked."""
    known, summary = known_data(record.manifest), record.summary
    found = [(data_name(record, each), evaluation_name(each.result), each.result) for each in record.evaluations]
    if summary:
        found.insert(0, (data_name(record), attack_name(summary["robust_attack"]), summary))
    points = []
    for data, attack, result in found:
        clean, robust, weights = (result.get(key) for key in ("clean_accuracy", "robust_accuracy", "weights"))
        if clean is None or robust is None:
            continue
        is_other = weights is not None and weights != summary.get("weights", weights)
        label = f"{record.label} ({weights})" if is_other else record.label
        point = Point(label, clean, robust, attack, result["num_samples"], number)
        is_own = known is not None and data == record.recipe.data.val
        points.append((known if is_own else data, result["norm"], result["eps"], point))
    return points
