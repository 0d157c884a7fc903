"""Is the product right on this machine's GPU, and how fast is it? One command, nine minutes, one table.

    python benchmarks/gpu.py --minutes 9 --out OUT

Four parts, each in a process of its own with a share of the time: smoke (is it right), step (how long a training step
takes), feed (do the loaders keep up), train (CIFAR-10 for the time that is left). Every case is written to
OUT/PART.jsonl as soon as it is done; OUT/gpu.json has all of them in the end, OUT/gpu.log what the parts printed.
docs/gpu.md explains the table. Exit status: 0 if every case that ran was right, 1 if one was not, 2 if there is no GPU.

`--device cpu --small` runs all parts shrunk, to see that the command itself works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout whose package isn't installed

from gpu_parts.journal import Journal, read_lines  # noqa: E402
from gpu_parts.supervise import PartResult, run_part  # noqa: E402
from gpu_parts.table import table  # noqa: E402

SHARES = {"smoke": 100, "step": 210, "feed": 50, "train": 180}
"""Of the time, in the order of the parts; the last part has what the others leave."""
SMALL_SHARES = {"smoke": 200, "step": 140, "feed": 80, "train": 120}
"""Where all must come to its end."""
_LEFT_FOR_OTHERS_S = 4.0
"""Of the whole time, for the start and the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; the exit status."""
    args = parse(arguments)
    if args.child:
        run_child(args)
        return 0
    began = time.monotonic()
    if args.device == "cuda" and (reason := no_gpu()):
        print(f"--device cuda: no GPU can be used: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="arat-gpu-"))
    try:
        results = run_parts(args, scratch, began)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    about = read_about(args)
    print(table(about, results))
    return int(any(is_wrong(part, small=args.small) for part in results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, paths in full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder for what is measured")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--part", action="append", choices=list(SHARES), help="this part alone; may be given again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="shrink everything: does the command work?")
    parser.add_argument("--data", type=Path, help="cifar10.tar.xz; default: $ARAT_SAMPLE_DATA's, or the digits")
    for hidden, kind in (("--child", str), ("--scratch", Path), ("--seconds", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: {args.data}: no such file")
    args.out = args.out.resolve()
    args.data = args.data and args.data.resolve()
    return args


def no_gpu() -> str | None:
    """Why torch can use no GPU here; None where it can."""
    import torch

    if torch.cuda.is_available():
        return None
    from arat_dist.devices import why_no_gpu  # takes seconds

    return why_no_gpu()


def run_parts(args: argparse.Namespace, scratch: Path, began: float) -> list[PartResult]:
    """The parts, one after the other; OUT/gpu.json is written anew behind each."""
    names = [name for name in SHARES if args.part is None or name in args.part]
    shares = SMALL_SHARES if args.small else SHARES
    whole_s, until = 60 * args.minutes, began + 60 * args.minutes - _LEFT_FOR_OTHERS_S
    log, results = args.out / "gpu.log", []
    log.unlink(missing_ok=True)
    for name in SHARES:
        (args.out / f"{name}.jsonl").unlink(missing_ok=True)
    for name in names:
        left = max(1.0, until - time.monotonic())
        share = shares[name] / sum(shares[each] for each in names)
        seconds = left if name == names[-1] else min(left, whole_s * share)
        journal = args.out / f"{name}.jsonl"
        results.append(run_part(name, _Command(args, name, scratch), journal, log, seconds, _show(name, began)))
        write_results(args, results)
    return results


class _Command:
    """What runs a part in a process of its own."""

    def __init__(self, args: argparse.Namespace, name: str, scratch: Path):
        self._command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--scratch", str(scratch)]
        self._command += ["--device", args.device, "--out", str(args.out), *(["--small"] if args.small else [])]
        self._command += ["--data", str(args.data)] if args.data else []

    def __call__(self, seconds: float) -> list[str]:
        return [*self._command, "--seconds", f"{seconds:.1f}"]


def _show(part: str, began: float) -> Any:
    def show(line: dict[str, Any]) -> None:
        if line["status"] == "no time":
            return
        seconds = f"{line['seconds']:.1f} s" if "seconds" in line else ""
        news = f"{time.monotonic() - began:6.1f} s  {part}  {line['case']}: {line['status']} {seconds}"
        print(news, line.get("message", ""), file=sys.stderr, flush=True)

    return show


def is_wrong(part: PartResult, *, small: bool) -> bool:
    """Whether a part fails the command: time that ran out does so only where all is shrunk."""
    return part.status == "failed" or (small and part.status == "timed out")


def write_results(args: argparse.Namespace, results: list[PartResult]) -> None:
    """OUT/gpu.json, whole or as it was."""
    parts = {
        part.name: {"status": part.status, "seconds": part.seconds, "limit_s": part.limit_s, "cases": part.cases}
        for part in results
    }
    temp = args.out / "gpu.json.tmp"
    temp.write_text(json.dumps({**read_about(args), "small": args.small, "parts": parts}, indent=1) + "\n")
    temp.replace(args.out / "gpu.json")


def read_about(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, as the first part that could say it has it; and when, and which commit."""
    lines = [line for name in SHARES for line in read_lines(args.out / f"{name}.jsonl")]
    machine = next((line for line in lines if line["case"] == "machine" and line["status"] == "ok"), {})
    return {
        **{key: machine.get(key) for key in ("card", "memory_gb", "driver", "torch", "cores")},
        "python": sys.version.split()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with a "+" behind it where files differ; None where that can't be known."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


# In a part's own process --------------------------------------------------------------------------------------------


def run_child(args: argparse.Namespace) -> None:
    """One part, in this process."""
    began = time.monotonic()
    import gc
    from functools import partial

    import torch
    from gpu_parts.pictures import find_cifar
    from gpu_parts.settings import Settings

    args.data = None if args.small else find_cifar(args.data)
    settings = Settings.of(args)
    if args.device == "cpu":
        torch.set_num_threads(1 if args.small else len(os.sched_getaffinity(0)))
        if args.small:
            # Machine code takes a CPU minutes; this traces and cuts the graphs alike, and runs them as they are.
            torch.compile = partial(torch.compile, backend="aot_eager")

    def clean() -> None:
        gc.collect()  # a moment: what is imported is frozen
        if args.device == "cuda":
            torch.cuda.empty_cache()

    def is_usable() -> bool:
        # A capture or a kernel that failed may leave torch's allocator or generators broken: a new process is safe.
        return args.device != "cuda"

    part = importlib.import_module(f"gpu_parts.{args.child}")
    gc.freeze()
    seconds = args.seconds - (time.monotonic() - began)
    journal = Journal(args.out / f"{args.child}.jsonl", seconds, clean=clean, is_usable=is_usable)
    journal.run("machine", partial(machine, args.device))
    part.run(settings, journal)


def machine(device: str) -> dict[str, Any]:
    """What this runs on."""
    import torch

    from arat_dist.devices import device_name

    about: dict[str, Any] = {"card": device_name(torch.device(device)), "cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        about["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        about["driver"] = driver()
    return about | {"torch": torch.__version__}


def driver() -> str | None:
    """The driver's version as nvidia-smi has it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
