"""Train every method and every row of ARAT's ablation on one recipe, and print a table of clean and robust accuracy.

    .venv/bin/python benchmarks/methods.py recipes/digits.yaml --seeds 0 1 2 -- --track.mlflow false

Runs lie in runs/methods; finished ones are not trained again, unfinished ones go on. What follows `--` goes to
`arat train` of every row. Rows: see `ROWS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROWS: dict[str, list[str]] = {
    "standard": ["--objective.name", "standard"],
    "at": ["--objective.name", "at"],
    "trades": ["--objective.name", "trades"],
    "mart": ["--objective.name", "mart"],
    "lbgat": ["--objective.name", "lbgat"],
    "lbgat, beta 6": ["--objective.name", "lbgat", "--objective.beta", "6"],
    "arrest": ["--objective.name", "arrest"],
    "arat": [],
    "arat, EMA": ["--train.ema_decay", "0.98"],
    "arat, SWA": ["--train.swa_start_epoch", "8", "--train.swa_every", "10"],
    "arat, no stop-gradient": ["--objective.stop_gradient", "false"],
    "arat, no predictor": ["--objective.predictor", "false"],
    "arat, no split norm": ["--objective.split_norm", "none"],
    "arat, fixed balance": ["--objective.balance", "fixed"],
    "arat, symmetric": ["--objective.symmetric", "true"],
    "arat, mse": ["--objective.distance", "mse"],
    "arat, none of these": [
        *("--objective.stop_gradient", "false", "--objective.predictor", "false"),
        *("--objective.split_norm", "none", "--objective.balance", "fixed"),
    ],
}
STORAGE = Path("runs/methods")


def main() -> None:
    """Train what isn't trained yet, row by row, and print the table so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args, extra = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    for seed in args.seeds:
        for row in args.rows:
            train(args.recipe, row, seed, extra)
    print(table(Path(args.recipe).stem, args.rows, args.seeds))


def train(recipe: str, row: str, seed: int, extra: list[str]) -> None:
    """Train one cell; its failure is printed and leaves a gap in the table."""
    name = run_name(Path(recipe).stem, row, seed)
    command = [Path(sys.executable).with_name("arat"), "train", recipe, "--json", "--name", name]
    command += ["--cluster.storage", STORAGE, "--train.seed", seed, *ROWS[row], *extra]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def run_name(recipe: str, row: str, seed: int) -> str:
    """A plain folder name."""
    return f"{recipe}-{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def table(recipe: str, rows: list[str], seeds: list[int]) -> str:
    """Mean and spread (largest minus smallest) over the seeds, a line a method."""
    lines = ["| method | clean | spread | robust | spread | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        files = [STORAGE / run_name(recipe, row, seed) / "summary.json" for seed in seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        cells = [row if len(found) == len(seeds) else f"{row} ({len(found)} seeds)"]
        for key in ("clean_accuracy", "robust_accuracy"):
            values = [summary[key] for summary in found]
            cells += [f"{statistics.mean(values):.4f}", f"{max(values) - min(values):.4f}"]
        cells.append(f"{statistics.median(summary['wall_s'] for summary in found):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
