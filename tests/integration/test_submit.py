"""`arat submit` against a Ray cluster of its own: a training sent to it, what it refuses, and how a job is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small import ARAT, tiny_overrides

from arat_dist.errors import UserError
from launcher.cli import main
from launcher.submit import JobCommand, Jobs

CLUSTER = """
import sys, ray
context = ray.init("local", num_cpus=3, include_dashboard=True, object_store_memory=2**27, log_to_driver=False)
print(context.dashboard_url, flush=True)
sys.stdin.read()
"""
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster on this machine's loopback, in processes of its own; the URL of its dashboard."""
    environment = os.environ | {
        "PATH": f"{Path(ARAT).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://{process.stdout.readline().strip()}"
        finally:
            process.communicate(timeout=60)


def submit(address: str, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    # Ray reads an address from here and would prefer it.
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9", "HOME": "/nonexistent"}
    environment.pop("RAY_AUTH_TOKEN", None)
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    return subprocess.run(
        [ARAT, "submit", "--address", address, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def held(address: str, what: str, but: str) -> list[dict[str, Any]]:
    """What a cluster still has of something, those in one state aside."""
    command = [str(Path(ARAT).with_name("ray")), "list", what, "--address", address, "--format", "json"]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        [*command, "--filter", f"state!={but}"], env=environment, capture_output=True, text=True, check=True
    )
    found = [] if done.stdout == "No resource in the cluster\n" else json.loads(done.stdout)
    # Ray Train's own, one a cluster, without a CPU: it stays for the next training.
    return [each for each in found if each.get("class_name") != "_AutoscalingCoordinatorActor"]


@pytest.fixture
def recipe(digits, tmp_path, monkeypatch) -> Path:
    """A recipe file on this machine alone, based on one that ships with the package."""
    monkeypatch.chdir(tmp_path)
    tree: dict = {"base": "digits"}
    overrides = tiny_overrides(digits, tmp_path / "runs") | {"cluster.workers": "2"}
    for key, value in overrides.items():
        section, *rest = key.split(".")
        leaf = tree.setdefault(section, {})
        for part in rest[:-1]:
            leaf = leaf.setdefault(part, {})
        leaf[rest[-1]] = yaml.safe_load(value)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "mine.yaml"


def test_a_training_is_sent_to_a_cluster_and_its_summary_comes_back(cluster, recipe):
    done = submit(cluster, "--json", "--", "train", "mine.yaml", "--train.seed", "3")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["name"], summary["steps"], summary["world_size"]) == ("mine", 6, 2)
    assert json.loads((recipe.parent / "runs/mine/summary.json").read_text()) == summary
    run = yaml.safe_load((recipe.parent / "runs/mine/recipe.yaml").read_text())
    assert (run["train"]["seed"], run["cluster"]["address"]) == (3, "auto"), "in the cluster, not in one of its own"
    assert "step 6/6" in done.stderr
    assert TOKEN not in done.stderr

    again = submit(cluster, "--no-wait", "--", "train", "mine.yaml", "--train.seed", "3", "--json")
    job = json.loads(again.stdout)["job"]
    assert job.startswith("raysubmit_")

    # What the job refuses is refused here with the same status.
    refused = submit(cluster, "--", "train", "mine.yaml", "--train.seed", "4")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "arat: --name: mine: the run of this name has another recipe" in refused.stderr


@pytest.mark.parametrize(
    ("token", "line"), [(None, "RAY_AUTH_TOKEN: missing: "), ("f" * 64, "RAY_AUTH_TOKEN: not the cluster's: ")]
)
def test_without_the_token_nothing_starts(cluster, recipe, token, line):
    refused = submit(cluster, "--", "train", "mine.yaml", token=token)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"arat: {line}{cluster} wants its own token")
    assert refused.stderr.count("\n") == 1
    assert not (recipe.parent / "runs").exists()


def test_a_stopped_job_gets_sigterm_and_the_time_to_answer_it(cluster, tmp_path):
    """Ray's own 3 s are no time for a checkpoint, so the job brings its own limit."""
    code = (
        "import signal, time\n"
        "def end(*_):\n"
        "    time.sleep(6)\n"
        f"    open({str(tmp_path / 'checkpoint')!r}, 'w').close()\n"
        "    raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "slow.py").write_text(code)
    script = (
        "import sys\n"
        "from launcher.submit import JobCommand, JobError, Jobs\n"
        "class Slow(JobCommand):\n"
        f"    entrypoint = 'exec {sys.executable} {tmp_path}/slow.py'\n"
        "jobs = Jobs(sys.argv[1])\n"
        "job = jobs.start(Slow([], {}, 60))\n"
        "print(job, flush=True)\n"
        "try:\n"
        "    jobs.follow(job)\n"
        "except JobError as error:\n"
        "    print(error, error.status)\n"
    )
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, "-c", script, cluster], env=environment, stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        job = follower.stdout.readline().strip()
        while not (tmp_path / "ready").exists():
            time.sleep(0.1)
        ray = str(Path(ARAT).with_name("ray"))
        environment["RAY_AUTH_MODE"] = "token"
        subprocess.run([ray, "job", "stop", "--no-wait", "--address", cluster, job], env=environment, check=True)
        out, _ = follower.communicate(timeout=120)
    assert out == f"{job} was stopped 1\n"
    assert (tmp_path / "checkpoint").exists()


def test_a_search_is_sent_to_a_cluster_and_its_front_comes_back(cluster, recipe):
    space = {"optim.lr": {"type": "choice", "values": [0.1, 0.05]}}
    settings = {"space": space, "searcher": "grid", "epochs": 1, "scheduler": "none"}
    (recipe.parent / "two.yaml").write_text(json.dumps(settings))
    search = ("tune", "mine.yaml", "--search", "two.yaml")
    done = submit(cluster, "--json", "--", *search)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["name"] == "two"
    assert summary["trials"] == {"finished": 2, "pruned": 0, "failed": 0}
    assert json.loads((recipe.parent / "runs/two/summary.json").read_text()) == summary

    # The cluster goes on, and has all of its room again.
    deadline = time.monotonic() + 60
    while left := [*held(cluster, "placement-groups", "REMOVED"), *held(cluster, "actors", "DEAD")]:
        assert time.monotonic() < deadline, left
        time.sleep(1)

    refused = submit(cluster, "--", *search, "--name", "large", "--workers", "9")
    assert refused.returncode == 2
    assert "cluster.workers: 9: of 1 CPU each: the cluster has 3 CPU; at most 3 would be right" in refused.stderr
    refused = submit(cluster, "--", *search, "--cluster.storage", "runs")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "cluster.storage: runs: a job has a working directory of its own" in refused.stderr


def test_ctrl_c_leaves_the_job_and_says_how_to_find_it(cluster, recipe):
    environment = os.environ | {"RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen(
        [ARAT, "submit", "--address", cluster, "--", "train", "mine.yaml", "--max-steps", "12"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stderr is not None
        while "step 2/" not in (line := follower.stderr.readline()):
            assert line, "it ended"
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=60)
    assert follower.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("arat: raysubmit_")
    assert f"ray job stop --address {cluster} raysubmit_" in last
    while not (recipe.parent / "runs/mine/summary.json").exists():
        time.sleep(0.2)


def test_a_job_is_followed_through_every_kind_of_lost_connection(monkeypatch, capsys):
    """A dashboard that restarts, behind a proxy or not; each time the log comes from its beginning."""
    import aiohttp
    import requests
    from ray.job_submission import JobStatus

    losses = [aiohttp.ServerDisconnectedError(), aiohttp.ClientError("502"), RuntimeError("closed"), OSError("reset")]
    states = [requests.ConnectionError("reset"), "RUNNING", "SUCCEEDED"]

    class Client:
        async def tail_job_logs(self, job: str) -> Any:
            yield "one\n"
            if losses:
                raise losses.pop()
            yield "two\n"

        def get_job_info(self, job: str) -> Any:
            if isinstance(state := states.pop(0), Exception):
                raise state
            return SimpleNamespace(status=JobStatus(state))

    monkeypatch.setattr("launcher.submit._RETRY_S", 0)
    jobs: Any = Jobs.__new__(Jobs)
    jobs._client, jobs._address = Client(), "http://here"
    assert jobs.follow("job") == {}
    assert capsys.readouterr().err == "one\ntwo\n"
    assert (losses, states) == ([], [])


def test_a_cluster_that_has_just_started_is_asked_again(monkeypatch):
    answers: list[Any] = [RuntimeError("500: No available agent to submit job"), "raysubmit_1", RuntimeError("500: no")]

    class Client:
        def submit_job(self, **_: Any) -> str:
            if isinstance(answer := answers.pop(0), Exception):
                raise answer
            return answer

    monkeypatch.setattr("launcher.submit._RETRY_S", 0)
    jobs: Any = Jobs.__new__(Jobs)
    jobs._client, jobs._address = Client(), "http://here"
    assert jobs.start(JobCommand(["train", "x"])) == "raysubmit_1"
    with pytest.raises(UserError, match="--address: http://here: 500: no; a Ray dashboard would be right"):
        jobs.start(JobCommand(["train", "x"]))
    assert answers == []


# Refused before anything is sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("http://127.0.0.1:9", "--address: http://127.0.0.1:9: Connection refused; the URL of the cluster's dashboard"),
        ("127.0.0.1:6379", "--address: 127.0.0.1:6379: the URL of the cluster's dashboard, http://HOST:8265, would be"),
        ("http://nowhere.invalid:8265", "--address: http://nowhere.invalid:8265: "),
    ],
)
def test_an_address_that_nobody_answers_is_refused_in_one_line(address, line, recipe):
    refused = submit(address, "--", "train", "mine.yaml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"arat: {line}")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "mine.yaml", "--train.sed", "1"], "train.sed: unknown key; did you mean train.seed?"),
        (["train", "mine.yaml", "--cluster.storage", "runs"], "cluster.storage: runs: a job has a working directory"),
        (["train", "mine.yaml", "--data.val", "val.beton"], "data.val: val.beton: a job has a working directory"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["submit", "--address", "http://127.0.0.1:9", "--", "demo"], "--: submit: a verb that works"),
        (["export", "runs/mine", "out", "--train.seed", "1"], "--train.seed: unknown argument"),
    ],
)
def test_a_mistake_in_the_command_is_refused_here(arguments, line, recipe, capsys):
    assert main(["submit", "--address", "http://127.0.0.1:9", "--", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
