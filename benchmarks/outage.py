"""Pictures a second of a training whose MLflow server is up, is killed in mid-run, or was never there.

python benchmarks/outage.py [--rounds 5] [--steps 150]

The training runs in this very process (--workers 0), where the mirror's thread costs most; a line is logged every
second step. The four states take turns; the first round warms up and isn't counted, nor are a run's first 20 steps.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.sources import open_source
from arat_dist.recipe import load_recipe
from arat_dist.run import Run
from launcher.fit import fit

FIRST = 20
KILL_AT = 30


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """`mlflow server` on sqlite, once it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--default-artifact-root", str(folder)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process
        except OSError:
            time.sleep(0.2)


def speed(recipe: Any, storage: str, name: str, server: subprocess.Popen | None) -> float:
    """Pictures a second of one run; a server that is given is killed in it."""

    def kill(line: dict[str, Any]) -> None:
        if server and line["step"] >= KILL_AT and server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    summary = fit(recipe, name, kill)
    lines = [line for line in Run(storage, name).metrics() if line["step"] >= FIRST]
    images = (lines[-1]["step"] - lines[0]["step"]) * summary["samples_seen"] / summary["steps"]
    return images / (lines[-1]["time_s"] - lines[0]["time_s"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rates: dict[str, list[float]] = {"no mirror": [], "up": [], "killed": [], "never there": []}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            write_beton(open_source(f"digits:{split}"), Path(folder) / f"{split}.beton")
        server = start_server(Path(folder), port)
        try:
            for turn in range(args.rounds + 1):
                for state, found in rates.items():
                    if server.poll() is not None:
                        server = start_server(Path(folder), port)
                    keys = {
                        "data.train": f"{folder}/train.beton",
                        "data.val": f"{folder}/val.beton",
                        "train.max_steps": args.steps,
                        "train.log_every": 2,
                        "eval.limit": 10,
                        "cluster.workers": 0,
                        "cluster.storage": f"{folder}/runs",
                        "track.mlflow": state != "no mirror",
                        "track.uri": "http://127.0.0.1:9" if state == "never there" else f"http://127.0.0.1:{port}",
                    }
                    victim = server if state == "killed" else None
                    name = f"{state.replace(' ', '-')}-{turn}"
                    found.append(speed(load_recipe("digits", list(keys.items())), f"{folder}/runs", name, victim))
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    base = rates["no mirror"][1:]
    for state, found in rates.items():
        ratios = [rate / other for rate, other in zip(found[1:], base, strict=True)]
        print(
            f"{state:12} {statistics.median(found[1:]):8.1f} pictures/s, of no mirror: median "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
