"""A run that is killed or interrupted goes on, and ends as if nothing had happened."""

import json
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mlflow.tracking import MlflowClient
from small import ARAT, LINGERING, Recovery, as_options, tiny_overrides, wait_until_gone

from arat_dist.run import Run

NUM_STEPS = 120
"""Seconds of work: workers go on for a moment when their driver is killed, and must not come to the end."""


@pytest.fixture(scope="module")
def command(digits, tmp_path_factory) -> list[str]:
    storage = tmp_path_factory.mktemp("resume")
    overrides = tiny_overrides(digits, storage) | {
        "cluster.workers": "2",
        "attack.steps": "4",
        "train.epochs": "3",
        "train.max_steps": str(NUM_STEPS),
        "train.checkpoint_every": "5",
        "train.keep_checkpoints": "99",
        "train.ema_decay": "0.9",
        "track.mlflow": "true",
    }
    return [ARAT, "train", "digits", "--json", *as_options(overrides), "--name"]


def storage_of(command: list[str]) -> Path:
    return Path(next(option for option in command if "cluster.storage" in option).partition("=")[2])


def whole_checkpoints(command: list[str], name: str) -> set[Path]:
    return set((storage_of(command) / name / "checkpoints").glob("step_*/manifest.json"))


def stop_after_a_checkpoint(command: list[str], name: str, how: signal.Signals) -> tuple[int, str]:
    """Start the command, send the signal once it has written a checkpoint; exit status and stderr."""
    before = whole_checkpoints(command, name)
    log = storage_of(command) / f"{name}-{how.name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, name],
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            # Tests that were started in the background inherit a SIGINT that is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 180
        while whole_checkpoints(command, name) <= before:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(how)
        process.communicate(timeout=60)
    assert wait_until_gone(60, but=LINGERING) == {}, f"left by {how.name}"
    return process.returncode, log.read_text()


def to_the_end(command: list[str], name: str) -> dict:
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(command) -> dict:
    return to_the_end(command, "calm")


@pytest.fixture(scope="module")
def recoveries(command) -> dict[str, Recovery]:
    """From the start of the command that goes on after each signal."""
    run = Run(str(storage_of(command)), "troubled")
    return {name: Recovery(run.num_attempts) for name in ("SIGKILL", "SIGINT", "SIGTERM")}


@pytest.fixture(scope="module")
def troubled(command, recoveries) -> dict:
    """The driver is killed outright, the next one interrupted, the third told to stop, the fourth comes to the end."""
    status, _ = stop_after_a_checkpoint(command, "troubled", signal.SIGKILL)
    assert status == -signal.SIGKILL
    recoveries["SIGKILL"].begin()
    status, err = stop_after_a_checkpoint(command, "troubled", signal.SIGINT)
    assert status == 1, err
    assert err.splitlines()[-1] == "arat: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in err
    recoveries["SIGINT"].begin()
    status, err = stop_after_a_checkpoint(command, "troubled", signal.SIGTERM)
    check_stopped(command, status, err)
    recoveries["SIGTERM"].begin()
    return to_the_end(command, "troubled")


def check_stopped(command: list[str], status: int, err: str, name: str = "troubled") -> None:
    """One line says at which step it stopped, and there is its checkpoint."""
    assert status == 1, err
    last = re.fullmatch(r"arat: stopped at step (\d+); the same command goes on", err.splitlines()[-1])
    assert last, err
    assert "Traceback" not in err
    newest = max(whole_checkpoints(command, name))
    assert newest.parent.name == f"step_{int(last[1]):08d}"


def check_weights(file: str, command: list[str]) -> None:
    """The same bit for bit."""
    calm, rough = (
        safetensors.torch.load_file(storage_of(command) / name / f"checkpoints/step_{NUM_STEPS:08d}" / file)
        for name in ("calm", "troubled")
    )
    assert calm.keys() == rough.keys() != set()
    assert [key for key in calm if not torch.equal(calm[key], rough[key])] == []


def test_sigterm_stops_the_work_in_this_process_too(command):
    alone = [*command[:-1], "--workers=0", "--train.checkpoint_every=40", "--name"]
    status, err = stop_after_a_checkpoint(alone, "alone", signal.SIGTERM)
    check_stopped(command, status, err, "alone")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.failure(f"the driver gets {how}"))
        for how in ("SIGKILL", "SIGINT", "SIGTERM")
    ],
)
def test_it_went_on_and_ended_as_one_that_was_left_alone(
    how, command, troubled, uninterrupted, recoveries, record_property
):
    """At the same step with the same losses and the same weights; how exactly, the next tests say."""
    steps = [attempt["step"] for attempt in lines(storage_of(command) / "troubled/attempts.jsonl")]
    assert steps[1 + [*recoveries].index(how)] >= 5
    assert (troubled["steps"], troubled["losses"]) == (NUM_STEPS, uninterrupted["losses"])
    for file in ("model.safetensors", "ema.safetensors"):
        check_weights(file, command)
    recoveries[how].note(record_property, detected=False)


def test_it_went_on_rather_than_started_anew(command, troubled):
    steps = [attempt["step"] for attempt in lines(storage_of(command) / "troubled/attempts.jsonl")]
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert steps[-1] < NUM_STEPS
    assert len(steps) == 4
    assert troubled["restarts"] == 3


def test_it_has_seen_as_much(troubled, uninterrupted):
    for key in ("steps", "samples_seen", "world_size", "clean_accuracy", "robust_accuracy", "losses", "recipe_sha256"):
        assert troubled[key] == uninterrupted[key], key
    assert troubled["steps"] == NUM_STEPS


def test_every_line_of_metrics_is_there_once_with_the_same_values(command, troubled, uninterrupted):
    calm, rough = (lines(storage_of(command) / name / "metrics.jsonl") for name in ("calm", "troubled"))
    # Checkpoints are amid the lines: what a line is about survives a stop within it.
    assert [line["step"] for line in rough] == list(range(2, NUM_STEPS + 1, 2))
    assert [line["loss"] for line in rough] == [line["loss"] for line in calm]
    times = [line["time_s"] for line in rough]
    assert times == sorted(times)


def test_mlflow_has_one_run_with_each_step_once(command, troubled):
    client = MlflowClient(troubled["mlflow_tracking_uri"])
    (experiment,) = [each for each in client.search_experiments() if each.name == "arat"]
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "troubled"]
    assert [run.info.run_id for run in runs] == [troubled["mlflow_run_id"]]
    assert runs[0].info.status == "FINISHED"
    about = json.loads((storage_of(command) / f"troubled/checkpoints/step_{NUM_STEPS:08d}/about.json").read_text())
    assert about["mlflow"]["run_id"] == troubled["mlflow_run_id"]
    history = client.get_metric_history(troubled["mlflow_run_id"], "loss")
    expected = [(line["step"], line["loss"]) for line in lines(storage_of(command) / "troubled/metrics.jsonl")]
    assert sorted((metric.step, metric.value) for metric in history) == expected
