"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arat_dist.evaluation.ledger import Ledger
from arat_dist.storage import Storage

console = Console(stderr=True)
"""Logs and progress: never on stdout, which is for results."""

_LOOK_EVERY_S = 1.0
_SAY_EVERY_S = 10.0
"""Seconds between two lines about an evaluation where there is no terminal."""


class TrainingProgress:
    """Shows the lines of metrics.jsonl as they come; as a context it gives what takes them.

    Args:
        title: what is being trained.
        num_steps: steps of the whole run.
        shown: step up to which an earlier launch printed its lines.
    """

    def __init__(self, title: str, num_steps: int, shown: int = 0):
        self._title, self._num_steps, self._shown = title, num_steps, shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, state="starting workers")

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._bar.start()
        if not console.is_terminal:
            console.print(f"{self._title}: starting workers", highlight=False)
        return self.update

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Show one line."""
        state = describe(line)
        if line["step"] >= self._num_steps:
            state += ", evaluating"
        self._bar.update(self._task, completed=line["step"], state=state)
        if not console.is_terminal and line["step"] > self._shown:
            left_s = line["time_s"] / line["step"] * (self._num_steps - line["step"])
            console.print(
                f"{self._title}: step {line['step']}/{self._num_steps}, {state}, {left_s:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


class EvaluationProgress:
    """Shows how far an evaluation is, as its folder tells; a context, in which a thread looks once a second.

    Args:
        title: what is being evaluated.
        folder: the evaluation's.
    """

    def __init__(self, title: str, folder: Storage):
        self._title, self._ledger = title, Ledger(folder)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, state="starting")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._bar.start()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._bar.stop()

    def _watch(self) -> None:
        pace, said_s = Pace(), time.monotonic()
        while not self._end.wait(_LOOK_EVERY_S):
            try:
                note, num_done = self._ledger.progress()
            except OSError:  # a storage that is out of reach for a moment
                continue
            if not note:
                continue
            share, left_s = pace.look(note, num_done, time.monotonic())
            state = f"{note['stage']}, {note['num_samples']} pictures, batch {num_done}/{note['num_batches']}"
            state += "" if left_s is None else f", {_duration(left_s)} left"
            self._bar.update(self._task, total=1, completed=share, state=state)
            if not console.is_terminal and time.monotonic() - said_s > _SAY_EVERY_S:
                said_s = time.monotonic()
                console.print(f"{self._title}: {state}", highlight=False, soft_wrap=True)


class Pace:
    """How much of an evaluation is done, and how long the rest may take at the pace since the first look.

    What later attacks will cost is reckoned from the pictures that stand now: most often a little too much.
    """

    def __init__(self) -> None:
        self._stage, self._earlier, self._at_first = "", 0.0, None
        self._cost = 0.0

    def look(self, note: Mapping[str, Any], num_done: int, now_s: float) -> tuple[float, float | None]:
        """The share that is done and the seconds left, None while nothing tells.

        Args:
            note: of the stage at work, as the ledger has it.
            num_done: its finished batches.
            now_s: by a clock that never goes back.
        """
        if note["stage"] != self._stage:
            self._stage, self._earlier = note["stage"], self._earlier + self._cost
        self._cost = float(note["num_samples"] * note["cost"])
        done = self._earlier + self._cost * num_done / max(1, note["num_batches"])
        total = self._earlier + self._cost + note["num_samples"] * note["later_cost"]
        if self._at_first is None:
            self._at_first = (now_s, done)
        since_s, before = self._at_first
        pace = (done - before) / max(1e-9, now_s - since_s)
        return done / max(1.0, total), (total - done) / pace if pace > 0 else None


def _duration(seconds: float) -> str:
    """In the largest unit that leaves two digits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words: loss, training accuracies, speed."""
    accuracies = [
        f"{name} {line[f'{name}_accuracy']:.1%}" for name in ("clean", "robust") if f"{name}_accuracy" in line
    ]
    loss = f"loss {line['loss']:.3f}" if "loss" in line else "no step taken"
    return ", ".join([loss, *accuracies, f"{line['images_per_second']:.0f} pictures/s"])


def results_table(title: str, rows: list[tuple[str, dict[str, Any]]]) -> Table:
    """Clean and robust accuracy of several summaries or evaluations, a row each."""
    table = Table(title=title)
    for column in ("", "clean", "robust", "attack", "eps", "pictures"):
        table.add_column(column, justify="left" if column in ("", "attack") else "right")
    for label, row in rows:
        table.add_row(
            label,
            f"{row['clean_accuracy']:.4f}",
            "-" if row["robust_accuracy"] is None else f"{row['robust_accuracy']:.4f}",
            f"{row.get('attack') or row['robust_attack']} {row['norm'] or ''}",
            _radius(row),
            str(row["num_samples"]),
        )
    return table


def evaluation_tables(result: dict[str, Any]) -> list[Table]:
    """What an evaluation found: the accuracies, what each attack left, and the corruptions."""
    tables = [results_table(result["target"], [("", result)])]
    if len(result["attacks"]) > 1:
        table = Table(title="attack by attack")
        for column in ("", "robust after it", "attacked", "s"):
            table.add_column(column, justify="right" if column else "left")
        for each in result["attacks"]:
            row = (f"{each['robust_accuracy']:.4f}", str(each["num_attacked"]), f"{each['wall_s']:.1f}")
            table.add_row(each["name"], *row)
        tables.append(table)
    if figures := result.get("corruptions"):
        severities = sorted({each["severity"] for each in figures})
        table = Table(title="accuracy under common corruptions, by severity")
        for column in ("", *map(str, severities)):
            table.add_column(column, justify="right" if column else "left")
        for name in dict.fromkeys(each["name"] for each in figures):
            table.add_row(name, *(f"{each['accuracy']:.4f}" for each in figures if each["name"] == name))
        tables.append(table)
    return tables


def _radius(row: Mapping[str, Any]) -> str:
    """Eps as it is usually written in its norm."""
    if row["eps"] is None:
        return "-"
    return f"{row['eps'] * 255:.3g}/255" if row["norm"] == "linf" else f"{row['eps']:.4g}"


def step_table(result: dict[str, Any]) -> Table:
    """What `arat bench step` measured."""
    table = Table(
        title=f"{result['model']}, {result['image_size']}x{result['image_size']}, batch {result['batch_size']}, "
        f"PGD-{result['attack_steps']}, {result['precision']}{', compiled' if result['compile'] else ''}, "
        f"{result['threads']} threads"
    )
    for column in ("", "ms", "of the floor", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    floor, peak = result["floor_ms"], result["peak_memory_mb"]
    table.add_row("one forward pass", f"{result['forward_ms']:.1f}", f"{result['forward_ms'] / floor:.3f}", "")
    table.add_row(f"floor: {2 * result['attack_steps'] + 6} forward passes", f"{floor:.1f}", "1.000", "")
    table.add_row("the step", f"{result['step_ms']:.1f}", f"{result['floor_ratio']:.3f}", f"{peak:.0f}")
    for part, milliseconds in result["breakdown_ms"].items():
        table.add_row(f"  {part.replace('_', ' ')}", f"{milliseconds:.1f}", f"{milliseconds / floor:.3f}", "")
    for precision in ("fp32", "bf16"):
        milliseconds = result[f"reference_{precision}_ms"]
        memory = f"{result['reference_peak_memory_mb']:.0f} (no attack)" if precision == "bf16" else ""
        table.add_row(f"plain code in {precision}", f"{milliseconds:.1f}", f"{milliseconds / floor:.3f}", memory)
    return table


def engine_table(result: dict[str, Any]) -> Table:
    """What `arat bench engine` measured."""
    table = Table(
        title=f"{result['model']}, {result['optimizer']}, {result['workers']} workers, global batch "
        f"{result['global_batch_size']}, {result['precision']}: MiB on the rank that holds most"
    )
    for column in ("", "optimizer state", "gradients", "weights", "step ms"):
        table.add_column(column, justify="right" if column else "left")
    for engine in result["engines"]:
        sizes = (max(engine[f"{name}_mb"]) for name in ("optimizer_state", "gradients", "weights"))
        table.add_row(engine["engine"], *(f"{size:.1f}" for size in sizes), f"{engine['step_ms']:.0f}")
    return table


def data_table(result: dict[str, Any]) -> Table:
    """What `arat bench data` measured."""
    from arat_dist.bench.data import LOADERS  # decoders are imported by who measures them

    side = result["image_size"]
    table = Table(
        title=f"{result['pictures']:,} pictures to {side}x{side}, batches of {result['batch_size']}, "
        f"{result['cores']} cores",
        caption=f"first batch of a new process: {result['first_batch_s']:.2f} s; with nothing compiled before "
        f"{result['first_batch_uncached_s']:.2f} s; the step that waits takes {result['step_ms']:.0f} ms",
    )
    for column in ("", "pictures/s", "of torchvision's", "a step waits"):
        table.add_column(column, justify="right" if column else "left")
    rates = result["images_per_second"]
    for name, label in LOADERS.items():
        share = f"{result.get(f'ratio_{name}_torchvision', rates[name] / rates['torchvision']):.2f}"
        table.add_row(label, f"{rates[name]:,.0f}", share, f"{result['wait_fraction'][name]:.1%}")
    return table
