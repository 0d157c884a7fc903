"""The numbers behind the plots, against the files that they come from."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_runs import CIFAR10, line, record, summary, write_evaluation, write_manifest, written_run
from toys import Sets

from arat_dist.errors import UserError
from arat_dist.report.figures import by_class, part_curves
from arat_dist.report.gather import Series, class_accuracies, read_runs, read_verdicts, standard_error
from arat_dist.report.names import attack_name, duration_name, evaluation_name, radius_name
from arat_dist.report.page import evaluation_rows, recipe_differences, run_card, scores, warning_rows
from arat_dist.report.peers import compare, known_data, published
from arat_dist.report.plots import (
    Curve,
    class_plot,
    comparison_plot,
    eps_plot,
    letters,
    line_plot,
    marker_of,
    shown_classes,
    thinned,
)
from arat_dist.report.style import styled


def drawn(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """x and y of every line with more than two points in the only plot of a figure."""
    lines = figure.axes[0].get_lines()
    pairs = [(np.asarray(each.get_xdata()), np.asarray(each.get_ydata())) for each in lines]
    return [(x.tolist(), y.tolist()) for x, y in pairs if len(x) > 2]


# Metrics over a run -------------------------------------------------------------------------------------------------


def test_curves_are_the_lines_of_the_file(trained):
    lines = [json.loads(each) for each in Path(trained.folder.path("metrics.jsonl")).read_text().splitlines()]
    read = record(trained)
    for key in ("loss", "loss_adv", "clean_accuracy", "robust_accuracy", "lr", "gradient_norm", "images_per_second"):
        series = read.series(key)
        assert len(series) == len(lines) > 5
        assert series.values.tolist() == [each[key] for each in lines]
        assert series.epochs.tolist() == [each["epoch"] for each in lines]
    evaluated = [each for each in lines if "val_robust_accuracy" in each]
    assert len(evaluated) == 2
    assert read.series("val_robust_accuracy").values.tolist() == [each["val_robust_accuracy"] for each in evaluated]
    assert len(read.series("gradient_cosine")) > 0
    with styled():
        figure = line_plot([Curve("trained", read.series("loss"), 0)])
    assert drawn(figure) == [(read.series("loss").epochs.tolist(), read.series("loss").values.tolist())]


def test_what_is_no_number_is_no_point(tmp_path):
    lines = [line(1, loss=2.0), line(2, loss=math.nan), line(3), line(4, loss=1.0)]
    run = written_run(tmp_path, "one", lines)
    with Path(run.folder.path("metrics.jsonl")).open("a") as file:
        file.write('{"step": 5, "epo')  # being written
    read = record(run)
    assert read.series("loss").values.tolist() == [2, 1]
    assert read.series("loss").epochs.tolist() == [0.1, 0.4]
    assert len(read.series("nothing")) == 0
    assert read.epochs_done == 0.4


def test_parts_are_named_by_what_they_are(trained, tmp_path):
    losses = part_curves(record(trained), prefix="loss")
    assert [curve.label for curve in losses] == ["total", "adv", "clean", "invariance"]
    shares = part_curves(record(trained), suffix="_fraction")
    assert [curve.label for curve in shares] == ["loader wait", "compute", "checkpoint"]
    many = {f"gradient_cosine_blocks_{n}": n / 10 for n in range(12)}
    curves = part_curves(record(written_run(tmp_path, "deep", [line(1, **many)])), prefix="gradient_cosine_")
    assert [curve.label for curve in curves] == [f"blocks {n}" for n in (0, 2, 4, 7, 9, 11)]
    assert [curve.series.values[0] for curve in curves] == [0, 0.2, 0.4, 0.7, 0.9, 1.1]


def test_long_curves_keep_their_mean_and_their_ends():
    values = np.arange(10_001) % 7 + 0.5
    short = thinned(Series(np.linspace(0, 100, 10_001, dtype=np.float64), values.astype(np.float64)), most=100)
    assert len(short) == 100
    assert short.values.mean() == pytest.approx(values.mean(), rel=1e-3)
    assert (short.epochs[0], short.epochs[-1]) == (pytest.approx(0.5, abs=0.01), pytest.approx(99.5, abs=0.01))
    few = Series(np.arange(3.0), np.arange(3.0))
    assert thinned(few, most=3) is few


def test_eps_is_drawn_in_255ths():
    curve = Series(np.array([0, 4 / 255, 8 / 255]), np.array([0.9, 0.5, 0.25]))
    with styled():
        figure = eps_plot([Curve("one", curve, 0)], norm="linf", eps=[8 / 255])
        other = eps_plot([Curve("one", curve, 0)], norm="l2", eps=[0.5])
    ((x, y),) = drawn(figure)
    assert x == pytest.approx([0, 4, 8])
    assert y == [0.9, 0.5, 0.25]
    assert drawn(other)[0][0] == pytest.approx([0, 4 / 255, 8 / 255])


# Evaluations and classes --------------------------------------------------------------------------------------------


def verdicts(count: int = 500) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    clean = rng.random(count) < 0.9
    return {
        "sample": np.arange(count),
        "label": labels,
        "clean_prediction": labels,
        "clean_right": clean,
        "robust": clean & (rng.random(count) < 0.4 + 0.2 * labels),
    }


def test_class_accuracies_equal_a_written_out_count(tmp_path):
    run, found = written_run(tmp_path, "one"), verdicts()
    write_evaluation(run, "aa", {"clean_accuracy": 0.9, "robust_accuracy": 0.5}, found)
    accuracies = read_verdicts(record(run).evaluations[0])
    assert accuracies is not None
    assert accuracies.labels.tolist() == [0, 1, 2]
    for label in range(3):
        rows = [n for n in range(500) if found["label"][n] == label]
        assert accuracies.num_samples[label] == len(rows)
        assert accuracies.clean[label] == sum(found["clean_right"][n] for n in rows) / len(rows)
        assert accuracies.robust[label] == sum(found["robust"][n] for n in rows) / len(rows)
    with styled():
        figure = class_plot(accuracies, ["ant", "bee", "cow"], 0)
    clean, robust = drawn(figure)
    assert (clean[0], robust[0]) == (accuracies.clean.tolist(), accuracies.robust.tolist())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ant", "bee", "cow"]
    assert clean[1] == [2, 1, 0]  # the first class stands above


def test_classes_come_from_the_evaluation_of_most_pictures(tmp_path):
    run = written_run(tmp_path, "one")
    write_evaluation(run, "few", {"clean_accuracy": 1, "robust_accuracy": 0.1, "num_samples": 9}, verdicts(9))
    write_evaluation(run, "many", {"clean_accuracy": 1, "robust_accuracy": 0.2, "num_samples": 500}, verdicts())
    write_evaluation(run, "most", {"clean_accuracy": 1, "robust_accuracy": 0.2, "num_samples": 900})  # kept none
    write_evaluation(run, "none", {"clean_accuracy": 1, "robust_accuracy": None, "num_samples": 999}, verdicts())
    found = by_class(record(run), None)
    assert found is not None
    assert found[0].num_samples.sum() == 500
    assert found[1] == "AutoAttack, linf 8/255, 500 pictures"
    assert by_class(record(written_run(tmp_path, "two")), None) is None


def test_of_many_classes_the_extremes_are_shown():
    labels = np.repeat(np.arange(100), 100)
    robust = np.arange(10_000) % 100 < (labels * 37) % 100  # class c: (37 c) % 100 %
    accuracies = class_accuracies(labels, np.ones(10_000), robust)
    rows = shown_classes(accuracies)
    shares = np.round(100 * accuracies.robust[rows]).astype(int).tolist()
    assert shares == [*range(10), *range(90, 100)]


def test_an_evaluation_without_result_is_at_work_and_a_damaged_one_is_named(tmp_path):
    run = written_run(tmp_path, "one")
    (run.folder / "evaluations" / "half").write("verdicts.parquet", b"")
    assert record(run).evaluations == []
    result = run.folder / "evaluations" / "odd"
    result.write("result.json", b'{"clean_')
    with pytest.raises(UserError, match=r"odd/result\.json: damaged"):
        record(run)
    result.write("result.json", b'{"clean_accuracy": 1}')
    with pytest.raises(UserError, match=r"odd/result\.json: has no attack, num_samples, robust_accuracy"):
        record(run)
    result.delete("result.json")
    run.folder.write("metrics.jsonl", b"{]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
        record(run)


def test_the_table_of_evaluations_has_each_attack_of_an_ensemble(tmp_path):
    run = written_run(tmp_path, "one", summary=summary(0.9, 0.5, wall_s=77))
    parts = [
        {"name": "apgd-ce", "robust_accuracy": 0.48, "num_attacked": 9000, "wall_s": 60},
        {"name": "square", "robust_accuracy": 0.46, "num_attacked": 4800, "wall_s": 3},
    ]
    warnings = ["more steps keep helping"]
    result = {"clean_accuracy": 0.9, "robust_accuracy": 0.46, "attacks": parts, "wall_s": 63, "warnings": warnings}
    write_evaluation(run, "aa", result)
    rows = evaluation_rows(record(run))
    assert [(row["attack"], row["robust"], row["num_samples"], row["time"]) for row in rows] == [
        ("PGD-20", 0.5, 10_000, ""),
        ("AutoAttack", 0.46, 10_000, "1 min 3 s"),
        ("after APGD-CE", 0.48, 9000, "1 min 0 s"),
        ("after Square", 0.46, 4800, "3 s"),
    ]
    assert warning_rows([record(run)]) == [{"run": "one", "attack": "AutoAttack", "text": warnings[0]}]
    assert [score["value"] for score in scores(record(run))] == ["90.0%", "50.0%", "46.0%"]
    assert scores(record(run))[1]["note"] == "± 0.5, 10,000 pictures"


def test_another_ball_or_other_data_is_no_stronger_evaluation(tmp_path):
    val = write_manifest(tmp_path / "val.beton", CIFAR10, 10_000)
    run = written_run(tmp_path, "one", summary=summary(0.9, 0.5), sets=Sets(val, val))
    write_evaluation(run, "larger", {"clean_accuracy": 0.9, "robust_accuracy": 0.1, "eps": 16 / 255})
    write_evaluation(run, "other", {"clean_accuracy": 0.9, "robust_accuracy": 0.2, "data_sha256": "c" * 64})
    write_evaluation(run, "weaker", {"clean_accuracy": 0.9, "robust_accuracy": 0.6, "data_sha256": "b" * 64})
    assert len(scores(record(run))) == 2


# Beside what others published ---------------------------------------------------------------------------------------


def test_published_points_are_those_of_the_paper():
    tables = {table.data: table for table in published().tables}
    assert {name: len(table.points) for name, table in tables.items()} == {
        "CIFAR-10": 14,
        "CIFAR-100": 13,
        "ImageNet": 8,
    }
    arat = next(p for p in tables["CIFAR-10"].points if (p.method, p.model) == ("ARAT", "WRN-34-10"))
    assert (arat.clean, arat.robust) == (90.89, 50.77)
    assert {table.attack for table in tables.values()} == {"autoattack"}
    assert [tables[name].eps * 255 for name in ("CIFAR-10", "ImageNet")] == [pytest.approx(8), pytest.approx(4)]


@pytest.mark.parametrize(
    ("change", "num_published"),
    [
        ({}, 14),
        ({"eps": 0.0313725}, 14),
        ({"eps": 4 / 255}, 0),
        ({"norm": "l2"}, 0),
        ({"class_names": (*CIFAR10[:-1], "lorry")}, 0),
        ({"pictures": 5000}, 0),
        ({"no_manifest": True}, 0),
    ],
    ids=lambda value: next(iter(value), "same") if isinstance(value, dict) else "",
)
def test_only_the_same_data_norm_and_eps_stand_beside_a_run(tmp_path, change: dict[str, Any], num_published):
    val = str(tmp_path / "val.beton")
    if "no_manifest" not in change:
        write_manifest(Path(val), change.get("class_names", CIFAR10), change.get("pictures", 10_000))
    ball = {key: change[key] for key in ("norm", "eps") if key in change}
    run = written_run(tmp_path, "one", summary=summary(0.9, 0.5, **ball), sets=Sets(val, val))
    (comparison,) = compare([record(run)])
    assert len(comparison.published) == num_published
    assert len(comparison.sources) == (num_published > 0)
    (own,) = comparison.measured
    assert (own.label, own.clean, own.robust, own.attack, own.num_samples) == ("one", 0.9, 0.5, "PGD-20", 10_000)
    assert own.errors == (pytest.approx(0.003), pytest.approx(0.005))


def test_a_comparison_draws_every_point_where_it_belongs(tmp_path):
    val = write_manifest(tmp_path / "val.beton", CIFAR10, 10_000)
    runs = [
        written_run(tmp_path, name, summary=summary(0.88, robust), sets=Sets(val, val))
        for name, robust in (("_hidden", 0.5), ("two", 0.45))
    ]
    write_evaluation(runs[0], "aa", {"clean_accuracy": 0.88, "robust_accuracy": 0.4, "weights": "ema"})
    records = read_runs([run.folder.uri for run in runs])
    (comparison,) = compare(records)
    assert [(p.label, p.attack) for p in comparison.measured] == [
        ("_hidden", "PGD-20"),
        ("_hidden (ema)", "AutoAttack"),
        ("two", "PGD-20"),
    ]
    with styled():
        axes = comparison_plot(comparison, has_key=True).axes[0]
    points: list[Any] = [(each.get_xdata(), each.get_ydata(), each.get_marker()) for each in axes.get_lines()]
    dots = [(float(x[0]), float(y[0]), marker) for x, y, marker in points if len(x) == 1 and marker in tuple("oD^s")]
    assert dots[:3] == [(0.88, 0.5, "o"), (0.88, 0.4, "D"), (0.88, 0.45, "o")]
    assert len(dots) == 17
    assert (0.8377, 0.4242, "D") in [(round(x, 4), round(y, 4), marker) for x, y, marker in dots]


def test_runs_of_other_data_are_not_compared(tmp_path):
    runs = [
        written_run(tmp_path, name, summary=summary(0.9, 0.5), sets=Sets(f"{name}/t.beton", f"{name}/v.beton"))
        for name in ("one", "two")
    ]
    unattacked = written_run(tmp_path, "three", summary=summary(0.9, None))
    comparisons = compare(read_runs([run.folder.uri for run in [*runs, unattacked]]))
    assert [(each.data, len(each.measured)) for each in comparisons] == [("one/v.beton", 1), ("two/v.beton", 1)]
    assert known_data(None) is None


# Names and recipes --------------------------------------------------------------------------------------------------


def test_recipes_differ_in_these_keys(tmp_path):
    runs = [
        written_run(tmp_path, "one", objective={"name": "arat", "gamma": 2}),
        written_run(tmp_path, "two", objective={"name": "trades"}, train={"epochs": 5}),
    ]
    rows = dict(recipe_differences(read_runs([run.folder.uri for run in runs])))
    assert rows["objective.name"] == ["arat", "trades"]
    assert rows["objective.gamma"] == ["2", "\N{EN DASH}"]
    assert rows["objective.beta"] == ["\N{EN DASH}", "6"]
    assert rows["train.epochs"] == ["3", "5"]
    assert "optim.lr" not in rows
    sections = [key.partition(".")[0] for key in rows]
    assert sections == sorted(sections, key=["objective", "train"].index)


def test_runs_of_one_name_are_told_apart_and_none_is_taken_twice(tmp_path):
    runs = [written_run(tmp_path / folder, "same") for folder in ("a", "b")]
    uris = [run.folder.uri for run in runs]
    assert [read.label for read in read_runs(uris)] == uris
    with pytest.raises(UserError, match="is given twice"):
        read_runs([uris[0], f"{uris[0]}/"])
    with pytest.raises(UserError, match="nowhere: not a run"):
        read_runs([uris[0], "nowhere"])


def test_a_card_says_how_far_a_run_is(tmp_path):
    run = written_run(tmp_path, "one", [line(3), line(15)])
    run.begin_attempt(step=0)
    run.begin_attempt(step=3)
    run.note_skipped(7, [1, 2])
    card = run_card(record(run), 7)
    assert card["state"] == "unfinished: 1.50 of 3 epochs"
    assert card["scores"] == []
    facts = card["facts"]
    assert (facts["restarts"], facts["skipped steps"], facts["speed"]) == ("1", "1", "109 pictures/s")
    assert card["colour"] == "var(--c1)"
    assert run_card(record(written_run(tmp_path, "new")), 0)["facts"]["speed"] == "not known yet"


def test_names():
    attacks = ("pgd20", "apgd", "apgd50", "apgd-ce", "fab-t", "autoattack", "none", "pgd20,square", "my attack")
    shown = ("PGD-20", "APGD", "APGD-50", "APGD-CE", "FAB-T", "AutoAttack", "none", "PGD-20 + Square", "my attack")
    assert tuple(map(attack_name, attacks)) == shown
    assert "".join(map(marker_of, shown)) == "o^^^sDsss"
    result = {"attack": "pgd20", "restarts": None, "transfer_from": None, "branch": "adv"}
    assert evaluation_name(result) == "PGD-20"
    assert evaluation_name(result | {"restarts": 5}) == "PGD-20, 5 starts"
    other = evaluation_name(result | {"transfer_from": "runs/other", "branch": "clean"})
    assert other == "PGD-20, transferred, clean branch"
    assert marker_of(other) == "s"
    assert (radius_name("linf", 8 / 255), radius_name("l2", 0.5)) == ("linf 8/255", "l2 0.5")
    assert [duration_name(seconds) for seconds in (0.4, 61, 3600, 90_000)] == [
        "0 s",
        "1 min 1 s",
        "1 h 0 min",
        "1 d 1 h",
    ]
    assert letters(28)[-3:] == ["z", "aa", "ab"]
    assert standard_error(0.9, 360) == pytest.approx(0.0158, abs=1e-4)
