"""All parts as one readable table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .supervise import PartResult

Line = Mapping[str, Any]


def table(about: Mapping[str, Any], parts: Sequence[PartResult]) -> str:
    """What was measured and checked, in at most some hundred lines."""
    text = ["", "  ".join(f"{key} {value}" for key, value in about.items() if value is not None)]
    for part in parts:
        counts = ", ".join(f"{len(lines)} {word}" for word, lines in _counted(part))
        text += ["", f"{part.name}: {part.status.upper()}  {part.seconds:.0f} of {part.limit_s:.0f} s  {counts}"]
        text += [f"  FAILED {line['case']}: {line.get('message', '')}" for line in part.of_status("failed")]
        text += [f"  timed out: {line['case']}: {line['message']}" for line in part.of_status("timed out")]
        if missing := part.of_status("no time"):
            text.append(f"  no time for: {', '.join(line['case'] for line in missing)}")
        text += [f"  {line}" for line in _FORMATS.get(part.name, _nothing)(part)]
    return "\n".join(text)


def _counted(part: PartResult) -> list[tuple[str, list[dict[str, Any]]]]:
    words = {"ok": "right", "failed": "wrong", "skipped": "left out", "timed out": "cut off", "no time": "not reached"}
    return [(word, lines) for status, word in words.items() if (lines := part.of_status(status))]


def _nothing(_part: PartResult) -> list[str]:
    return []


def _smoke(part: PartResult) -> list[str]:
    """The largest errors by precision, and what the runs say."""
    text = []
    for precision in ("fp32", "bf16", "fp16"):
        lines = [line for line in part.of_status("ok") if f" {precision} " in line["case"] and "loss_error" in line]
        if lines:
            worst = {key: max(line[key] for line in lines) for key in lines[0] if key.endswith("_error")}
            said = ", ".join(f"{key.replace('_', ' ')} {value:.2g}" for key, value in worst.items())
            text.append(f"{precision}, {len(lines)} kinds of steps, at most: {said}")
    others = [line for line in part.of_status("ok") if "loss_error" not in line and line["case"] != "machine"]
    return text + [f"{line['case']}: {_values(line)}" for line in others]


def _step(part: PartResult) -> list[str]:
    """One row a kind of step, and one for each plain step."""
    ok = {line["case"]: line for line in part.of_status("ok")}
    rows = []
    for name, line in ok.items():
        if "step_ms" in line:
            kernels = ok.get(f"{name} kernels", {})
            rows.append(
                [
                    *(name, _number(line["step_ms"], 2), _number(line["images_per_second"], 0)),
                    *(_number(line["forward_ms"], 3), _number(line["floor_ratio"], 2)),
                    *(_number(line["tflops"], 1), _share(line["matrix_share"]), _number(line.get("peak_mb"), 0)),
                    *(_number(kernels.get("kernels"), 0), _number(kernels.get("launches"), 0)),
                    _share(kernels.get("busy")),
                ]
            )
    head = ["step", "ms", "images/s", "F ms", "x (2K+6)F", "TFLOP/s", "of matmul", "MiB", "kernels", "launches", "busy"]
    text = _aligned([head, *rows]) if rows else []
    plain = [
        [name, _number(line["plain_ms"], 2), line["own_mode"], _number(line["own_ms"], 2), _number(line["speedup"], 2)]
        for name, line in ok.items()
        if "plain_ms" in line
    ]
    if plain:
        text += ["", *_aligned([["plain code", "ms", "in turn with", "ms", "times faster"], *plain])]
    if "matmul" in ok:
        line = ok["matmul"]
        text += ["", f"bf16 matrix product of {line['side']}^3: {line['tflops']:.1f} TFLOP/s"]
    return text


def _feed(part: PartResult) -> list[str]:
    rows = [
        [
            *(line["case"], _number(line["images_per_second"], 0), line["eater"]),
            *(_number(line["eaten_per_second"], 0), _keeps_up(line["keeps_up"])),
        ]
        for line in part.of_status("ok")
        if "keeps_up" in line
    ]
    return _aligned([["loader", "images/s", "fastest step of", "images/s", "keeps up"], *rows]) if rows else []


def _keeps_up(share: float | None) -> str:
    if share is None:
        return "-"
    return f"yes, {share:.1f} times" if share >= 1 else f"NO, {share:.0%} of it"


def _train(part: PartResult) -> list[str]:
    return [f"{line['case']}: {_values(line)}" for line in part.of_status("ok") if line["case"] != "machine"]


_FORMATS = {"smoke": _smoke, "step": _step, "feed": _feed, "train": _train}


def _values(line: Line) -> str:
    values = {key.replace("_", " "): value for key, value in line.items() if key not in ("case", "status", "seconds")}
    said = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key} {text}" for key, text in said.items())


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, the first to the left and the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *cells]))
    return aligned
