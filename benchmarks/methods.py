"""Train every method and every row of ARAT's ablation on one recipe, and print a table of clean and robust accuracy.

    .venv/bin/python benchmarks/methods.py recipes/digits.yaml --seeds 0 1 2 -- --track.mlflow false

With `--minutes M` every row trains for about M minutes instead of the recipe's epochs: 40 steps tell its speed first.
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
from typing import Any

from arat_dist.data.manifest import load_manifest
from arat_dist.recipe import load_recipe

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
    "arat, SWA": ["--train.swa_start_epoch", "{late}", "--train.swa_every", "10"],
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
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""By the number of values: how many standard errors a 95 % interval of their mean reaches."""


def main() -> None:
    """Train what isn't trained yet, row by row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--minutes", type=float, help="training time of a row; default: the recipe's epochs")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args, extra = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    recipe = Path(args.recipe)
    epochs = dict.fromkeys(args.rows, load_recipe(recipe).train.epochs)
    if args.minutes:
        epochs = {row: affordable_epochs(recipe, row, args.minutes, extra) for row in args.rows}
    for seed in args.seeds:
        for row in args.rows:
            train(recipe, row, str(seed), epochs[row], [*extra, "--train.seed", str(seed)])
    print(table(recipe, args.rows, args.seeds))


def affordable_epochs(recipe: Path, row: str, minutes: float, extra: list[str]) -> int:
    """Epochs that the row does in so many minutes, at least one."""
    short = ["--max-steps", "40", "--train.swa_start_epoch", "null", "--eval.attack", "none"]
    train(recipe, row, "probe", 100, [*extra, *short])
    run = STORAGE / run_name(recipe, row, "probe")
    speed = json.loads((run / "summary.json").read_text())["train_images_per_second"]
    num_samples = load_manifest(load_recipe(run / "recipe.yaml").data.train).num_samples
    return max(1, round(minutes * 60 * speed / num_samples))


def train(recipe: Path, row: str, label: str, epochs: int, extra: list[str]) -> None:
    """Train one cell; its failure is printed and leaves a gap in the table."""
    name = run_name(recipe, row, label)
    options = [option.format(late=epochs * 2 // 3) for option in ROWS[row]]
    command = [Path(sys.executable).with_name("arat"), "train", recipe, "--json", "--name", name]
    command += ["--cluster.storage", STORAGE, "--train.epochs", epochs, *options, *extra]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def run_name(recipe: Path, row: str, label: str) -> str:
    """A plain folder name."""
    return f"{recipe.stem}-{row.replace(', ', '-').replace(' ', '-')}-{label}"


def table(recipe: Path, rows: list[str], seeds: list[int]) -> str:
    """Means over the seeds with their 95 % intervals and ranges (smallest to largest), a line a method."""
    lines = [
        "| method | seeds | epochs | training, s | clean | range | robust | range |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        files = [STORAGE / run_name(recipe, row, str(seed)) / "summary.json" for seed in seeds]
        found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        seconds = statistics.median(each["samples_seen"] / each["train_images_per_second"] for each in found)
        cells = [row, str(len(found)), str(found[0]["epochs"]), f"{seconds:.0f}"]
        for key in ("clean_accuracy", "robust_accuracy"):
            values = [summary[key] for summary in found]
            cells += [mean_with_interval(values), f"{min(values):.4f} to {max(values):.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_with_interval(values: list[float]) -> str:
    """The mean and half the width of its 95 % interval, by Student's t; a single value has none."""
    mean = f"{statistics.mean(values):.4f}"
    if len(values) not in STUDENT_T:
        return mean
    return f"{mean} ± {STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
