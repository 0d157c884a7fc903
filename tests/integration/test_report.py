"""`arat report` as a reader meets it: in a browser, on a desk and on a phone, by day and by night."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Page, chromium_page
from PIL import Image
from small import as_options, tiny_overrides

from launcher.cli import main

NAMES = ("first", "_<b>second & $x$")
WINDOWS = [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]

# Of every picture, plot and table: is it there, and within the window's width?
SEEN = """
[...document.querySelectorAll("img, .plot svg, table")].map(each => {
  each.scrollIntoView();
  const box = (each.closest(".scroll") || each).getBoundingClientRect(), style = getComputedStyle(each);
  return {
    tag: each.localName,
    natural: each.localName == "img" ? each.naturalWidth : 1,
    width: box.width, height: box.height, left: box.left, right: box.right, top: box.top,
    visible: style.visibility == "visible" && style.opacity == "1" && each.checkVisibility(),
    lines: each.localName == "svg" ? each.querySelectorAll("path").length : 1,
  };
})
"""


@pytest.fixture(scope="module")
def report(digits: Path, tmp_path_factory) -> dict[str, Any]:
    """What `arat report --json` printed of two runs, one of them with an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    more = {"train.log_every": "1", "eval.every": "1", "track.diagnostics_every": "2", "train.max_steps": "50"}
    objectives = ({}, {"objective.name": "trades"})
    for name, objective in zip(NAMES, objectives, strict=True):
        overrides = tiny_overrides(digits, folder / "runs") | more | objective
        assert main(["train", "digits", "--name", name, *as_options(overrides)]) == 0
    write_evaluation(folder / "runs" / NAMES[0] / "evaluations" / "autoattack-1")
    targets = [str(folder / "runs" / name) for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        arguments = ["--out", str(folder / "out"), "--limit", "20", "--pictures", "3", "--json"]
        assert main(["report", *targets, *arguments]) == 0
    return json.loads(printed.getvalue())


def write_evaluation(folder: Path) -> None:
    """One with a warning long enough to break any narrow layout, and unbroken paths."""
    folder.mkdir(parents=True)
    result = {"clean_accuracy": 0.5, "robust_accuracy": 0.1, "attack": "autoattack", "norm": "linf", "eps": 24 / 255}
    about = {"num_samples": 360, "warnings": ["x" * 200], "wall_s": 3.0, "data": "/a" * 100, "data_sha256": "0" * 64}
    (folder / "result.json").write_text(json.dumps(result | about))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium_page() as page:
        yield page


@pytest.mark.parametrize(("width", "height", "scheme"), WINDOWS, ids=[f"{w} {s}" for w, _, s in WINDOWS])
def test_everything_is_seen_and_nothing_is_asked_for(report, page: Page, width, height, scheme):
    page.open(Path(report["report"]), width=width, height=height, scheme=scheme)
    requests = [event["request"]["url"] for event in page.of("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:image/")] == [Path(report["report"]).as_uri()]
    assert page.of("Log.entryAdded") == page.of("Runtime.consoleAPICalled") == page.of("Runtime.exceptionThrown") == []
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("innerWidth") == width
    found = page.value(SEEN)
    kinds = [each["tag"] for each in found]
    assert kinds.count("img") == 2 * 3 * 3
    assert kinds.count("svg") == len(report["plots"]) - 2  # the grids are pictures in the page
    assert kinds.count("table") == 4
    for each in found:
        assert each["natural"] > 0, each
        assert each["visible"], each
        assert each["width"] >= 60, each
        assert each["height"] >= 25, each
        assert each["left"] >= 0, each
        assert each["right"] <= width, each
        assert each["lines"] > 0, each


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_are_drawn_in_the_theme(report, page: Page, scheme):
    page.open(Path(report["report"]), width=1280, height=900, scheme=scheme)
    page.value("document.querySelector('#training').scrollIntoView()")
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        pixels = np.asarray(shot.convert("RGB")).reshape(-1, 3)
    assert (pixels.mean() > 128) == (scheme == "light")
    # The first run's colour in this theme is on the screen: its lines are drawn, and follow the theme.
    first = page.value("getComputedStyle(document.documentElement).getPropertyValue('--c0').trim()")
    wanted = [int(first[at : at + 2], 16) for at in (1, 3, 5)]
    assert (np.abs(pixels.astype(int) - wanted).max(1) < 8).sum() > 300


def test_names_are_shown_as_they_are(report, page: Page):
    page.open(Path(report["report"]), width=1280, height=900, scheme="light")
    assert page.value("document.querySelector('h1').textContent") == ", ".join(NAMES)
    assert page.value("document.querySelectorAll('h1 b').length") == 0
    words = page.value("[...document.querySelectorAll('.plot svg text')].map(each => each.textContent)")
    assert NAMES[1] in words


def test_a_second_call_attacks_nothing_again(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("arat_dist.report.pictures.attack_target", None)
    arguments = ["--out", str(tmp_path / "again"), "--limit", "20", "--pictures", "3", "--json"]
    assert main(["report", *report["runs"], *arguments]) == 0
    assert len(json.loads(capsys.readouterr().out)["plots"]) == len(report["plots"])
    assert {path.suffix for path in (tmp_path / "again").iterdir() if path.name[0] != "."} == {".html", ".png"}
