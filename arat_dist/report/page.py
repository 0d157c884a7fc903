"""The page: what the template shows, in words and figures; every name in it is escaped by Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from arat_dist.config import Recipe
from arat_dist.report.figures import Plot
from arat_dist.report.gallery import gallery
from arat_dist.report.gather import Evaluation, RunRecord, data_name, standard_error
from arat_dist.report.names import attack_name, duration_name, evaluation_name, radius_name, share_name
from arat_dist.report.peers import Comparison, known_data
from arat_dist.report.pictures import Attacked
from arat_dist.report.plots import letters, marker_of
from arat_dist.report.search import search_tables
from arat_dist.report.style import DARK, LIGHT, colour
from arat_dist.search.search import Search
from arat_dist.tracking import flatten

_SIGNS = {"o": "circle", "^": "triangle", "D": "diamond", "s": "square"}


@dataclass(frozen=True)
class Sections:
    """The plots of the page, in its order."""

    searches: list[Plot]
    comparisons: list[Plot]
    eps: list[Plot]
    classes: list[Plot]
    training: list[Plot]
    conflict: list[Plot]
    speed: list[Plot]
    pictures: list[Plot]

    def all(self) -> list[Plot]:
        """All of them."""
        return [plot for field in fields(self) for plot in getattr(self, field.name)]


def render(
    records: Sequence[RunRecord],
    searches: Sequence[Search],
    comparisons: Sequence[Comparison],
    attacked: Sequence[Attacked | None],
    sections: Sections,
    left_out: Sequence[str],
) -> str:
    """The whole page as HTML that asks for nothing else."""
    environment = Environment(
        loader=PackageLoader("arat_dist.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share_name, "svg": Markup}
    return environment.get_template("report.html").render(
        light=LIGHT,
        dark=DARK,
        runs=[run_card(record, number) for number, record in enumerate(records)],
        searches=[
            {"name": search.run.name, "plot": plot, **table}
            for search, plot, table in zip(searches, sections.searches, search_tables(searches), strict=True)
        ],
        comparisons=[
            {"plot": plot, "points": comparison_rows(comparison), "sources": comparison.sources}
            for plot, comparison in zip(sections.comparisons, comparisons, strict=True)
        ],
        evaluations=[row for record in records for row in evaluation_rows(record)],
        corruptions=[row for record in records for row in corruption_rows(record)],
        warnings=warning_rows(records),
        galleries=[
            gallery(record, each)
            for record, each in zip(records, attacked, strict=True)
            if each is not None and len(each.shown)
        ],
        differences=recipe_differences(records),
        recipes=[(record.label, record.recipe.to_yaml()) for record in records],
        sections=sections,
        left_out=left_out,
        made=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
    )


def run_card(record: RunRecord, number: int) -> dict[str, Any]:
    """What the head of the page says of a run."""
    recipe, summary = record.recipe, record.summary
    data = known_data(record.manifest) or recipe.data.val
    speed = record.series("images_per_second").values
    done = f"{record.epochs_done:.2f} of {recipe.train.epochs} epochs"
    ball = f"{recipe.attack.name}, {radius_name(recipe.attack.norm, recipe.attack.eps)}"
    facts = {
        "objective": recipe.objective.name,
        "model": recipe.model.name,
        "data": data,
        "trained against": "nothing" if recipe.objective.name == "standard" else ball,
        "weights": summary.get("weights", "raw"),
        "workers": str(summary.get("world_size", recipe.world_size)),
        "speed": f"{np.median(speed):,.0f} pictures/s" if len(speed) else "not known yet",
        "time": duration_name(record.lines[-1]["time_s"]) if record.lines else "not known yet",
        "restarts": str(record.num_restarts),
        "skipped steps": str(record.num_skipped),
    }
    return {
        "label": record.label,
        "colour": _variable(number),
        "state": "finished" if record.is_finished else f"unfinished: {done}",
        "is_finished": record.is_finished,
        "scores": scores(record),
        "facts": facts,
    }


def scores(record: RunRecord) -> list[dict[str, str]]:
    """The accuracies at the head of a run: of its summary, and the lowest that another attack left."""
    summary = record.summary
    if not summary:
        return []
    n = summary["num_samples"]
    found = [_score("clean", summary["clean_accuracy"], n, "")]
    if (robust := summary["robust_accuracy"]) is not None:
        ball = radius_name(summary["norm"], summary["eps"])
        found.append(_score(attack_name(summary["robust_attack"]), robust, n, ball))
    lower = [each.result for each in record.evaluations if _is_stronger(each, record)]
    if lower:
        least = min(lower, key=lambda result: result["robust_accuracy"])
        ball = radius_name(least["norm"], least["eps"])
        found.append(_score(evaluation_name(least), least["robust_accuracy"], least["num_samples"], ball))
    return found


def _is_stronger(evaluation: Evaluation, record: RunRecord) -> bool:
    """Whether it attacked in the run's own ball and on its own data, and left less right than its summary says."""
    summary, result = record.summary, evaluation.result
    if result["robust_accuracy"] is None or summary["robust_accuracy"] is None:
        return False
    same_ball = result["norm"] == summary["norm"] and np.isclose(result["eps"], summary["eps"])
    same_data = data_name(record, evaluation) == data_name(record)
    return bool(same_ball) and same_data and result["robust_accuracy"] < summary["robust_accuracy"]


def _score(name: str, share: float, num_samples: int, ball: str) -> dict[str, str]:
    error = standard_error(share, num_samples)
    return {
        "name": name,
        "value": share_name(share),
        "note": f"\N{PLUS-MINUS SIGN} {100 * error:.1f}, {num_samples:,} pictures",
        "ball": ball,
    }


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table beside a comparison: its points by their letters."""
    points = comparison.points
    return [
        {
            "letter": letter,
            "colour": "var(--muted)" if point.run is None else _variable(point.run),
            "sign": _SIGNS[marker_of(point.attack)],
            "is_run": point.run is not None,
            "label": point.label,
            "attack": point.attack,
            "clean": point.clean,
            "robust": point.robust,
            "num_samples": point.num_samples,
        }
        for letter, point in zip(letters(len(points)), points, strict=True)
    ]


def evaluation_rows(record: RunRecord) -> list[dict[str, Any]]:
    """The run's own evaluation and all others, a row each, and one for each attack of an ensemble."""
    results = [(data_name(record, each), each.result) for each in record.evaluations]
    if record.summary:
        own = record.summary | {"attack": record.summary["robust_attack"], "target": "at the end of the run"}
        own.pop("wall_s", None)  # of the whole run
        results.insert(0, (data_name(record), own))
    rows = []
    for data, result in results:
        has_ball = result.get("norm") is not None and result.get("eps") is not None
        rows.append(
            {
                "run": record.label,
                "attack": evaluation_name(result),
                "is_part": False,
                "ball": radius_name(result["norm"], result["eps"]) if has_ball else "",
                "weights": result.get("weights") or "",
                "data": data,
                "num_samples": result["num_samples"],
                "clean": result["clean_accuracy"],
                "robust": result["robust_accuracy"],
                "time": duration_name(result["wall_s"]) if "wall_s" in result else "",
            }
        )
        parts = result.get("attacks") or ()
        for part in parts if len(parts) > 1 else ():
            time = duration_name(part["wall_s"]) if "wall_s" in part else ""
            changed = {
                "attack": f"after {attack_name(part['name'])}",
                "is_part": True,
                "ball": "",
                "clean": None,
                "time": time,
            }
            rows.append(rows[-1] | changed | {"robust": part["robust_accuracy"], "num_samples": part["num_attacked"]})
    return rows


def corruption_rows(record: RunRecord) -> list[dict[str, Any]]:
    """Accuracy under each common corruption, by severity."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for evaluation in record.evaluations:
        for each in evaluation.result.get("corruptions") or ():
            row = rows.setdefault((evaluation.folder.uri, each["name"]), {"run": record.label, "name": each["name"]})
            row.setdefault("by_severity", {})[each["severity"]] = each["accuracy"]
    return list(rows.values())


def warning_rows(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Every warning of every evaluation."""
    return [
        {"run": record.label, "attack": evaluation_name(evaluation.result), "text": warning}
        for record in records
        for evaluation in record.evaluations
        for warning in evaluation.warnings
    ]


def recipe_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The recipes' keys whose values are not the same in all runs, and each run's value; a dash: none."""
    trees = [flatten(record.recipe.model_dump(mode="json")) for record in records]
    sections = list(Recipe.model_fields)
    keys = sorted(
        dict.fromkeys(key for tree in trees for key in tree), key=lambda key: sections.index(key.partition(".")[0])
    )
    rows = [(key, [_value(tree, key) for tree in trees]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _value(tree: dict[str, Any], key: str) -> str:
    if key not in tree:
        return "\N{EN DASH}"
    value = tree[key]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _variable(number: int) -> str:
    """The CSS variable of a run's colour."""
    return next(f"var({name})" for name, value in LIGHT.items() if value == colour(number))
