"""The page and its files: whole for any run, closed to what names bring along, and handed on to MLflow."""

import json
import logging
import socket
import sqlite3
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from report_runs import NOWHERE, line, summary, write_evaluation, write_manifest, written_run
from toys import Sets, toy_recipe

from arat_dist.errors import UserError
from arat_dist.report.build import write_report
from arat_dist.report.gallery import picture_uri
from arat_dist.report.search import front_png
from arat_dist.report.style import DARK, LIGHT, styled, to_svg
from arat_dist.run import Run
from arat_dist.search.config import parse_search
from arat_dist.search.ledger import Accuracies
from arat_dist.search.search import Search
from arat_dist.tracking import Replica

HOSTILE = '<img src=x onerror=alert(1)> & "$x_1$" \x07\N{SNOWMAN}'
HOSTILE_NAME = '<b onload="x">&'


class Read(HTMLParser):
    """Tags with their attributes, all text, and the words in plots, of a page."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.words = "", []
        self.feed(Path(path).read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1][0] == "text":
            self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_closed(page: Read) -> None:
    """The page asks for nothing, runs nothing, and no id stands twice."""
    assert page.all("script") == []
    assert all(each["src"].startswith("data:image/") and each["alt"] for each in page.all("img"))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(link.startswith("data:") or link[1:] in ids for link in links)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    (policy,) = (each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'")


def test_a_trained_run_has_all_of_it(trained, tmp_path):
    result = write_report([trained.folder.uri], tmp_path / "out", limit=9, num_pictures=3)
    page = Read(result["report"])
    check_closed(page)
    assert result["left_out"] == []
    names = {Path(plot).stem for plot in result["plots"]}
    shared = {"eps-linf", "clean-robust-1", "clean-accuracy", "robust-accuracy", "val-clean-accuracy", "lr"}
    shared |= {"val-robust-accuracy", "gradient-norm", "gradient-cosine", "gradient-opposed", "images-per-second"}
    own = {"losses-1-trained", "classes-1-trained", "pictures-1-trained", "time-1-trained", "conflict-layers-1-trained"}
    assert shared | own <= names
    for plot in result["plots"]:
        with Image.open(plot) as picture:
            assert picture.width > 500
            assert len(picture.convert("L").getcolors(maxcolors=256) or ()) > 5  # something is drawn
    labels = [each["aria-label"] for each in page.all("div") if each.get("role") == "img"]
    assert len(labels) == len(result["plots"]) - 1  # the grid of pictures stands in the page as pictures
    last = json.loads(Path(trained.folder.path("metrics.jsonl")).read_text().splitlines()[-1])
    assert f"Loss by part. Last: total {last['loss']:.3g}, adv {last['loss_adv']:.3g}" in " ".join(labels)
    assert len(page.all("img")) == 9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [".report.json", "report.html", *(Path(plot).name for plot in result["plots"])]
    )


def test_names_are_text_wherever_they_stand(tmp_path):
    val = write_manifest(tmp_path / "val.beton", ("<b>ant", 'bee"', "$c"), 9)
    labels = np.arange(9) % 3
    verdicts = {"label": labels, "clean_right": labels < 3, "robust": labels < 2}
    runs = []
    for name in (HOSTILE, "_under", "$a_1$ <b>"):
        run = written_run(tmp_path, name, [line(1, loss=2, loss_adv=1)], summary(0.9, 0.5), Sets(val, val))
        result = {"clean_accuracy": 1, "robust_accuracy": 0.6, "warnings": ["<i>odd</i>"], "num_samples": 9}
        write_evaluation(run, "aa", result, verdicts)
        runs.append(run.folder.uri)
    result = write_report(runs, tmp_path / "out", limit=0)
    page = Read(result["report"])
    check_closed(page)
    assert page.all("img") == []
    assert page.all("i") == []
    shown = HOSTILE.replace("\x07", "\N{REPLACEMENT CHARACTER}")
    (title,) = [text for text in Path(result["report"]).read_text().splitlines() if text.startswith("<title>")]
    assert "<img" not in title
    assert page.text.count(shown) > 5
    assert "<i>odd</i>" in page.text
    assert {"_under", "$a_1$ <b>", "<b>ant", "$c"} <= set(page.words)  # of the plots
    assert all(name in page.text for name in ("<b>ant", 'bee"', "$c", "_under"))
    assert all(f"{run}: no attacked pictures" in page.text for run in (shown, "_under"))
    assert all(Path(plot).parent == tmp_path / "out" for plot in result["plots"])


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    begun = written_run(tmp_path, "begun")
    page = Read(write_report([begun.folder.uri], tmp_path / "out")["report"])
    check_closed(page)
    assert "unfinished: 0.00 of 3 epochs" in page.text
    assert "begun: no attacked pictures, no curve over eps" in page.text
    assert "has no whole checkpoint yet" in page.text
    headings = [each.get("id") for each in page.all("h2")]
    assert headings == [None, "recipes"]


def test_runs_of_other_data_stand_on_one_page(trained, tmp_path):
    other = written_run(tmp_path, "other", [line(1, loss=1), line(2, loss=0.5)], summary(0.5, 0.2, norm="l2", eps=0.5))
    result = write_report([trained.folder.uri, other.folder.uri], tmp_path / "out", limit=4, num_pictures=1)
    page = Read(result["report"])
    check_closed(page)
    assert {"clean-robust-1", "clean-robust-2", "losses-2-other"} <= {Path(plot).stem for plot in result["plots"]}
    assert len(result["left_out"]) == 1
    assert "l2 0.5" in page.text


def test_a_later_report_leaves_nothing_stale_and_other_files_alone(tmp_path):
    run = written_run(tmp_path, "one", [line(1, loss=1)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").touch()
    first = write_report([run.folder.uri], out)
    assert (out / "losses-1-one.png") in map(Path, first["plots"])
    bare = written_run(tmp_path, "bare")
    write_report([bare.folder.uri], out)
    assert sorted(path.name for path in out.iterdir()) == [".report.json", "mine.png", "report.html"]
    (out / ".report.json").write_text("{")
    write_report([bare.folder.uri], out)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    run = written_run(tmp_path, "one")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .*file: File exists"):
        write_report([run.folder.uri], tmp_path / "file")
    with pytest.raises(UserError, match="--out"):
        write_report([run.folder.uri], tmp_path / "file" / "below")


def test_graphics_follow_the_page(tmp_path):
    with styled():
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=LIGHT["--c1"], label="x", clip_on=True)
        axes.set_title(f'{LIGHT["--c0"]} id="a" url(#b)')
        svg = to_svg(figure, "one")
    assert "var(--c1)" in svg
    assert f"{LIGHT['--c1']};" not in svg
    assert f'{LIGHT["--c0"]} id="a" url(#b)' in svg  # words stay as they are
    assert 'id="one-figure_1"' in svg
    assert "url(#one-" in svg
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert set(LIGHT) == set(DARK)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_what_is_behind_them(theme):
    """WCAG's contrast: 4.5 for text, 3 for graphics."""

    def luminance(value: str) -> float:
        parts = [int(value[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str) -> float:
        low, high = sorted((luminance(theme[name]), luminance(theme["--surface"])))
        return (high + 0.05) / (low + 0.05)

    assert contrast("--ink") > 7
    assert contrast("--muted") > 4.5
    for name in theme:
        assert contrast(name) > 3 or name in ("--grid", "--surface"), name


def test_small_pictures_are_kept_to_the_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert picture_uri(pixels).startswith("data:image/png;base64,")
    assert picture_uri(pixels) == picture_uri(pixels.astype(np.float32) / 255)
    assert picture_uri(np.zeros((65, 65, 3), np.uint8)).startswith("data:image/jpeg;base64,")


# MLflow -------------------------------------------------------------------------------------------------------------


def mirrored(folder: Path, name: str) -> tuple[Run, str]:
    """A run of one line and its MLflow run in the default database."""
    run = written_run(folder, name, [line(1, loss=1)], summary(0.9, 0.5, steps=1), track={"mlflow": True})
    uri = f"sqlite:///{folder}/mlflow.db"
    Replica(run, run.recipe(), uri).close(run.summary())
    return run, uri


def artifacts(uri: str, run: Run) -> set[str]:
    from mlflow.tracking import MlflowClient

    run_id = run.folder.read_json("mlflow.json")["run_id"]
    return {Path(each.path).name for each in MlflowClient(uri).list_artifacts(run_id, "report")}


def test_mlflow_gets_each_run_its_own_plots_and_the_shared_ones(tmp_path):
    (one, uri), (two, _) = mirrored(tmp_path, "one"), mirrored(tmp_path, "two")
    write_report([one.folder.uri, two.folder.uri], tmp_path / "out")
    shared = {"report.html", "images-per-second.png", "clean-robust-1.png"}
    assert artifacts(uri, one) == shared | {"losses-1-one.png"}
    assert artifacts(uri, two) == shared | {"losses-2-two.png"}


def test_a_server_that_is_down_costs_one_line(tmp_path, caplog):
    run, _ = mirrored(tmp_path, "one")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        run.folder.write_json("mlflow.json", run.folder.read_json("mlflow.json") | {"tracking_uri": uri})
        with caplog.at_level(logging.WARNING):
            result = write_report([run.folder.uri], tmp_path / "out")
    (message,) = [each.getMessage() for each in caplog.records if each.name.startswith("arat_dist")]
    assert message.startswith(f"one: the report isn't in MLflow: {uri}: ")
    assert "\n" not in message
    assert Path(result["report"]).exists()


def test_a_database_that_is_gone_is_not_made_anew(tmp_path, caplog):
    run, _ = mirrored(tmp_path, "one")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]
    (tmp_path / "mlflow.db").unlink()
    write_report([run.folder.uri], tmp_path / "out")
    assert "no such file" in caplog.text
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_without_mirror_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow.tracking", None)
    run = written_run(tmp_path, "one")
    write_report([run.folder.uri], tmp_path / "out")


def test_a_search_is_shown_with_its_front_and_its_best_trials_as_runs(tmp_path):
    tree = {
        "space": {"objective.gamma": {"type": "loguniform", "low": 1, "high": 100}},
        "trials": 4,
        "robust_weight": 0.25,
    }
    search = Search.of(parse_search(tree), toy_recipe(NOWHERE, cluster={"storage": str(tmp_path)}), HOSTILE_NAME)
    search.open()
    ends = [Accuracies(0.9, 0.3), Accuracies(0.7, 0.6), Accuracies(0.6, 0.5), None]
    for end in ends:
        trial = search.next_trial()
        assert trial is not None
        search.ledger.report(trial.number, 1, Accuracies(0.5, 0.25))
        search.ledger.end(trial.number, "finished" if end else "pruned", end)
        about = summary(end.clean, end.robust) if end else None
        written_run(tmp_path / HOSTILE_NAME / "trials", trial.name, [line(1, loss=1.0)], about)
    result = write_report([str(tmp_path / HOSTILE_NAME)], tmp_path / "out", limit=0)
    page = Read(result["report"])
    check_closed(page)
    assert [Path(run).name for run in result["runs"]] == ["0001", "0000"], "the best by robust, and by score and clean"
    assert f"{HOSTILE_NAME}/0001" in page.text
    assert "3 finished, 1 pruned, 0 failed" in page.text
    assert "best by" in page.text
    assert "clean, score" in page.text
    assert "objective.gamma" in page.text
    (plot,) = (each for each in page.all("div") if "beaten by no other" in each.get("aria-label", ""))
    assert "2 of 4 trials" in plot["aria-label"]
    assert str(tmp_path / "out/search-1.png") in result["plots"]
    assert front_png(search).startswith(b"\x89PNG")


def test_a_search_without_a_finished_trial_has_a_page(tmp_path):
    tree = {"space": {"objective.gamma": {"type": "int", "low": 1, "high": 9}}, "trials": 4}
    search = Search.of(parse_search(tree), toy_recipe(NOWHERE, cluster={"storage": str(tmp_path)}), "begun")
    search.open()
    search.next_trial()
    result = write_report([str(tmp_path / "begun")], tmp_path / "out", limit=0)
    assert "0 finished, 0 pruned, 0 failed" in Read(result["report"]).text
    with pytest.raises(UserError, match="not a run"):
        write_report([str(tmp_path / "none")], tmp_path / "out", limit=0)
