"""What a search costs beside its trials' training: its time against that of its trials trained one by one.

    arat demo                                  (writes the digits)
    python benchmarks/search.py --storage /tmp/search --standalone 5

A trial's training time is its workers': from the first step to the last, the evaluations after each epoch and, of one
that finished, the last one. What else a standalone `arat train` of the same recipe takes is its start-up (and its end).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ARAT = str(Path(sys.executable).with_name("arat"))


def main() -> None:
    """Run the search, then its best trial alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--search", default="search/arat_gamma_eps")
    parser.add_argument("--storage", type=Path, required=True, help="an empty folder")
    parser.add_argument("--standalone", type=int, default=5, help="times that a trial's recipe is trained alone (5)")
    args = parser.parse_args()
    command = ["tune", args.recipe, "--search", args.search, "--name", "search", f"--cluster.storage={args.storage}"]
    seconds = timed(command)
    summary = json.loads((args.storage / "search/summary.json").read_text())
    trials = sorted((args.storage / "search/trials").glob("[0-9]*"))
    training_s = {trial.name: trained(trial) for trial in trials}
    start_up_s = []
    for number in range(args.standalone):
        options = ["--name", f"alone-{number}", f"--cluster.storage={args.storage}"]
        alone_s = timed(["train", f"{args.storage}/search/best.yaml", *options])
        start_up_s.append(alone_s - trained(args.storage / f"alone-{number}"))
    one_by_one_s = sum(training_s.values()) + len(trials) * median(start_up_s)
    print(f"trials: {summary['trials']}")
    print(f"training of each: {', '.join(f'{each:.1f}' for each in training_s.values())} s")
    print(f"start-up of `arat train` alone: {', '.join(f'{each:.1f}' for each in sorted(start_up_s))} s")
    ratio = seconds / one_by_one_s
    print(f"the search: {seconds:.1f} s; its trials one by one: {one_by_one_s:.1f} s; ratio {ratio:.3f}")
    beside_s = (seconds - sum(training_s.values())) / len(trials)
    print(f"beside the training, a trial of the search costs {beside_s:.1f} s")


def timed(arguments: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([ARAT, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def trained(run: Path) -> float:
    """Seconds that a run's workers trained and evaluated."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    summary = run / "summary.json"
    evaluation_s = summary.stat().st_mtime - (run / "metrics.jsonl").stat().st_mtime if summary.exists() else 0
    return last["time_s"] + evaluation_s


if __name__ == "__main__":
    main()
