"""CPU time of the host for a training step on next to no pixels, of two checkouts in alternation.

    git worktree add /tmp/before COMMIT
    python benchmarks/host_time.py /tmp/before . --rounds 61

It is what a GPU waits for where steps are not captured. CPU seconds of one thread, so that other work counts little.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "cifar_resnet18 K=10": {"model": ("cifar_resnet18", {"channels": [8, 8, 8, 8]}), "side": 8, "steps": 10},
    "vit_tiny_patch16_224 K=2": {
        "model": ("vit_tiny_patch16_224", {"depth": 12, "embed_dim": 48}),
        "side": 32,
        "steps": 2,
        "split_norm": "layer",
        "optim": "adamw",
    },
}


def main() -> None:
    """Print the medians of both checkouts and of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.before.resolve())
        return
    command = [sys.executable, "-P", __file__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    trees = [subprocess.Popen([*command, str(tree), ".", "--serve"], **pipes) for tree in (args.before, args.after)]
    for case in CASES:
        times: list[list[float]] = [[], []]
        for i in range(args.rounds):
            for which in (0, 1) if i % 2 else (1, 0):
                times[which].append(ask(trees[which], case))
        before, after = map(statistics.median, times)
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        print(f"{case}: {before:.1f} ms before, {after:.1f} ms after, median ratio {ratio:.3f}", flush=True)
    for process in trees:
        process.communicate()


def ask(process: subprocess.Popen[str], case: str) -> float:
    """Milliseconds of one step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{case}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def serve(tree: Path) -> None:
    """Take the step of each case that is asked for, with the code of a checkout."""
    sys.path.insert(0, str(tree))
    import torch

    from arat_dist.bench.step import FusedStep, synthetic_batch
    from arat_dist.recipe import parse_recipe

    torch.set_num_threads(1)
    steps = {}
    for case, about in CASES.items():
        name, arguments = about["model"]
        recipe = parse_recipe(
            {
                "data": {"train": "none", "val": "none", "num_classes": 10, "image_size": about["side"]},
                "model": {"name": name, "args": arguments},
                "objective": {"name": "arat", "split_norm": about.get("split_norm", "batch")},
                "attack": {"eps": "8/255", "steps": about["steps"], "norm_stats": "batch"},
                "optim": {"name": about.get("optim", "sgd")},
                "train": {"epochs": 1, "global_batch_size": 2, "precision": "bf16"},
            },
            [],
        )
        step, batch = FusedStep(recipe, torch.device("cpu")), synthetic_batch(recipe, torch.device("cpu"))
        for _ in range(3):
            step(batch)
        steps[case] = step, batch
    for line in sys.stdin:
        step, batch = steps[line.strip()]
        began = time.process_time()
        step(batch)
        print(1000 * (time.process_time() - began), flush=True)


if __name__ == "__main__":
    main()
