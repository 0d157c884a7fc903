"""`write_report` reads as the story of a report: read the runs, attack a few pictures, draw, write, pass on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arat_dist.errors import TrackingError, UserError
from arat_dist.report.figures import (
    Plot,
    class_plots,
    comparison_plots,
    conflict_plots,
    eps_plots,
    speed_plots,
    training_plots,
)
from arat_dist.report.gallery import picture_plots
from arat_dist.report.gather import RunRecord, read_runs
from arat_dist.report.page import Sections, render
from arat_dist.report.peers import compare
from arat_dist.report.pictures import Attacked, attack_run
from arat_dist.report.search import search_plots, split_targets
from arat_dist.storage import Storage
from arat_dist.tracking import log_report

logger = logging.getLogger(__name__)

PAGE = "report.html"
CONTENTS = ".report.json"
"""What the folder has of a report, so that the next one leaves nothing stale."""

OnProgress = Callable[[str, int, int], None]


def write_report(
    targets: Sequence[str],
    out: str | Path,
    *,
    limit: int = 256,
    num_pictures: int = 8,
    on_progress: OnProgress = lambda *_: None,
) -> dict[str, Any]:
    """Write one page about some runs, and its plots as PNG files.

    Args:
        targets: folders of runs and searches, or their names in the default storage. Of a search its best trials are
            shown as runs.
        out: folder for report.html and the PNG files; those of an earlier report in it are replaced.
        limit: pictures of each run's validation set that are attacked for the report; 0: none.
        num_pictures: how many of them are shown.
        on_progress: gets a run's label, the number of attacks done, and of all.

    Returns:
        The JSON object of `arat report`: runs, report, plots (paths), left_out (a line for each thing that is missing).

    Raises:
        UserError: a target is neither a run nor a search, or the folder can't be written.
    """
    searches, runs, labels = split_targets(targets)
    records, folder = read_runs(runs, labels), Path(out)
    _check_folder(folder)
    attacked, left_out = attack_all(records, limit, num_pictures, on_progress)
    comparisons = compare(records)
    sections = Sections(
        searches=search_plots(searches),
        comparisons=comparison_plots(comparisons),
        eps=eps_plots(records, attacked),
        classes=class_plots(records, attacked),
        training=training_plots(records),
        conflict=conflict_plots(records),
        speed=speed_plots(records),
        pictures=picture_plots(records, attacked),
    )
    plots = sections.all()
    _write(folder, render(records, searches, comparisons, attacked, sections, left_out), plots)
    for record in records:
        about = [plot for plot in plots if plot.run in (None, record.label)]
        _pass_on(record, [folder / PAGE, *(folder / f"{plot.name}.png" for plot in about)])
    return {
        "runs": [record.run.folder.uri for record in records],
        "report": str(folder / PAGE),
        "plots": [str(folder / f"{plot.name}.png") for plot in plots],
        "left_out": left_out,
    }


def attack_all(
    records: Sequence[RunRecord], limit: int, num_pictures: int, on_progress: OnProgress
) -> tuple[list[Attacked | None], list[str]]:
    """The attacked pictures of each run, None where they can't be had, and a line for each of these."""
    attacked: list[Attacked | None] = []
    left_out = []
    for record in records:
        try:
            if not limit:
                raise UserError("--limit is 0")
            attacked.append(
                attack_run(
                    record,
                    limit=limit,
                    num_shown=num_pictures,
                    on_progress=lambda done, total, label=record.label: on_progress(label, done, total),
                )
            )
        except UserError as error:
            attacked.append(None)
            left_out.append(f"{record.label}: no attacked pictures, no curve over eps: {error}")
    return attacked, left_out


def _check_folder(folder: Path) -> None:
    """Make the folder (UserError: it can't be)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}; a folder that can be written would be right") from error


def _write(folder: Path, page: str, plots: Sequence[Plot]) -> None:
    """Write all files, after those of an earlier report are gone (UserError: they can't be written)."""
    storage = Storage(folder)
    try:
        for name in _earlier(storage):
            storage.delete(name)
        storage.write_json(CONTENTS, {"files": [PAGE, *(f"{plot.name}.png" for plot in plots)]})
        for plot in plots:
            storage.write(f"{plot.name}.png", plot.png)
        storage.write(PAGE, page.encode())
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}; a folder that can be written would be right") from error


def _earlier(folder: Storage) -> list[str]:
    """Names of the files that an earlier report wrote."""
    with contextlib.suppress(ValueError):
        return [Path(name).name for name in folder.read_json(CONTENTS).get("files", ())]
    return []


def _pass_on(record: RunRecord, files: Sequence[Path]) -> None:
    """Put the files into MLflow's copy of the run; a server that is away costs a line in the log."""
    try:
        log_report(record.run, files)
    except TrackingError as error:
        logger.warning("%s: the report isn't in MLflow: %s", record.label, error)
