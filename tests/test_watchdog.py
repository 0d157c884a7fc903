"""The step watchdog on real processes: each kind of hang ends with stacks and SIGKILL, signs of life keep it away."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arat_dist.storage import Storage
from arat_dist.watchdog import Watchdog

RANK = """
import os, re, signal, sys, threading, time
from arat_dist.storage import Storage
from arat_dist.watchdog import Watchdog

def sleep_in_a_thread():
    threading.Event().wait()

def wait_for_itself():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def hold_the_gil():
    re.match(r"(a|a)*b", "a" * 60)

def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)
    say("went on")
    time.sleep(600)

def beat_for_long():
    for _ in range(30):
        time.sleep(0.1)
        watchdog.beat()

def fork_and_wait():
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)

def fill_stderr_and_wait():
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(65536))
    except BlockingIOError:
        os.set_blocking(2, True)
    wait_for_itself()

def say(word):
    print(word, flush=True)

if os.path.isdir(sys.argv[1]):
    held = open(os.path.join(sys.argv[1], "held"), "w")
threading.Thread(target=sleep_in_a_thread, daemon=True).start()
limits = dict(start_timeout_s=float(sys.argv[2]), step_timeout_s=float(sys.argv[3]))
with Watchdog(Storage(sys.argv[1]), "rank3", **limits) as watchdog:
    say(watchdog._watcher.pid)
    if sys.argv[4] == "after a step":
        watchdog.beat()
    globals()[sys.argv[5]]()
say("well")
"""


@contextmanager
def rank(
    folder: Path | str, does: str, *, start_s: float = 600, step_s: float = 1, begun: bool = True
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process under a watchdog, and the pid of what watches it; ended with the context."""
    arguments = [str(folder), str(start_s), str(step_s), "after a step" if begun else "in the first step", does]
    with subprocess.Popen(
        [sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        watcher = int(process.stdout.readline())
        try:
            yield process, watcher
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; a minute is never needed."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stacks_in(folder: Path) -> str:
    """The one file of stacks in a run's folder."""
    (file,) = (folder / "stacks").iterdir()
    assert re.fullmatch(r"rank3-\d{8}T\d{6}Z\.txt", file.name)
    return file.read_text()


@pytest.mark.parametrize(
    ("does", "state"),
    [
        ("wait_for_itself", "sleeping"),
        ("hold_the_gil", "running"),
        ("stop_itself", "stopped by a signal"),
    ],
)
@pytest.mark.parametrize("begun", [True, False], ids=["after a step", "in the first step"])
def test_a_rank_that_hangs_is_killed_and_its_stacks_are_kept(tmp_path, does, state, begun):
    limits = {"start_s": 600, "step_s": 1} if begun else {"start_s": 1, "step_s": 600}
    with rank(tmp_path, does, begun=begun, **limits) as (process, watcher):
        out, err = process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert process.returncode == -signal.SIGKILL
    assert "well" not in out
    stacks = stacks_in(tmp_path)
    assert f"is {state}" in stacks
    assert f"in {does}" in stacks, "the function that hung"
    assert "in sleep_in_a_thread" in stacks, "the other thread"
    assert stacks in err
    assert f"rank3: no sign of life for 1 s; process {process.pid} was killed" in err


def test_a_rank_that_is_stopped_from_outside_in_python_code_is_killed(tmp_path):
    with rank(tmp_path, "beat_for_long", start_s=2, step_s=2) as (process, watcher):
        os.kill(process.pid, signal.SIGSTOP)
        process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert process.returncode == -signal.SIGKILL
    assert "in beat_for_long" in stacks_in(tmp_path)


def test_a_rank_that_gives_signs_of_life_lives(tmp_path):
    with rank(tmp_path, "beat_for_long", step_s=2) as (process, watcher):
        out, err = process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert (process.returncode, out, err) == (0, "well\n", "")
    assert not (tmp_path / "stacks").exists()


def test_who_watches_goes_when_its_rank_is_killed(tmp_path):
    with rank(tmp_path, "wait_for_itself", step_s=600) as (process, watcher):
        assert is_alive(watcher)
        process.kill()
        process.wait()
        wait_until(lambda: not is_alive(watcher))


def test_who_watches_goes_when_its_rank_is_killed_and_left_a_forked_child(tmp_path):
    with rank(tmp_path, "fork_and_wait", step_s=600) as (process, watcher):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 2)
        (forked,) = {int(pid) for pid in children.read_text().split()} - {watcher}
        process.kill()
        try:
            wait_until(lambda: not is_alive(watcher))
        finally:
            os.kill(forked, signal.SIGKILL)


def test_who_watches_is_out_of_the_terminals_reach_and_keeps_no_file_open(tmp_path):
    with rank(tmp_path, "wait_for_itself", step_s=600) as (process, watcher):
        assert os.getsid(watcher) == watcher != os.getsid(process.pid)
        opened = {os.readlink(fd) for fd in Path(f"/proc/{watcher}/fd").iterdir()}
        assert str(tmp_path / "held") in {os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert str(tmp_path / "held") not in opened


def test_a_storage_that_is_down_saves_nobody():
    with rank("http://127.0.0.1:9/runs", "wait_for_itself") as (process, watcher):
        _, err = process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert process.returncode == -signal.SIGKILL
    assert "in wait_for_itself" in err
    assert "http://127.0.0.1:9/runs/stacks/rank3-" in err


def test_two_watchdogs_one_after_the_other_leave_nothing_behind(tmp_path):
    opened = []
    for name in ("first", "second"):
        with Watchdog(Storage(tmp_path), name, start_timeout_s=600, step_timeout_s=600) as watchdog:
            watchdog.beat()
            watcher = watchdog._watcher.pid
            assert is_alive(watcher)
        assert not is_alive(watcher)
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[0] == opened[1]


def test_a_full_pipe_saves_nobody(tmp_path):
    with rank(tmp_path, "fill_stderr_and_wait") as (process, watcher):
        process.wait(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert process.returncode == -signal.SIGKILL
    assert "in wait_for_itself" in stacks_in(tmp_path)
