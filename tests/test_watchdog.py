"""The step watchdog on real processes: each kind of hang ends with stacks and SIGKILL, signs of life keep it away."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arat_dist.storage import Storage
from arat_dist.watchdog import _BEATS, _LIMIT_MS, _TICK_S, Watchdog, _Watcher

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

def compile():
    watchdog.beat(compiles=True)
    time.sleep(3)

def beat_for_long():
    say("beats")
    for _ in range(70):
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
        watcher = int(line_of(process))
        try:
            yield process, watcher
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line of its output and nothing behind it: `communicate` doesn't see what a stream has read ahead."""
    assert process.stdout is not None
    with open(process.stdout.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        return unbuffered.readline().decode()


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
    # Longer than ten looks, so that there is one between nine tenths of it and its end.
    with rank(tmp_path, "beat_for_long", start_s=5, step_s=5) as (process, watcher):
        assert line_of(process) == "beats\n"
        time.sleep(0.3)  # within the loop
        os.kill(process.pid, signal.SIGSTOP)
        process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert process.returncode == -signal.SIGKILL
    assert "in beat_for_long" in stacks_in(tmp_path)


def test_a_rank_that_gives_signs_of_life_lives(tmp_path):
    with rank(tmp_path, "beat_for_long", step_s=5) as (process, watcher):
        out, err = process.communicate(timeout=60)
        wait_until(lambda: not is_alive(watcher))
    assert (process.returncode, out, err) == (0, "beats\nwell\n", "")
    assert not (tmp_path / "stacks").exists()


def test_a_rank_that_compiles_anew_has_the_time_of_a_start(tmp_path):
    with rank(tmp_path, "compile", start_s=600, step_s=1) as (process, _):
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "well\n", "")


def test_a_sign_of_life_is_counted_before_the_limit_of_the_next_one_holds(tmp_path):
    """Else the time of a long first step could be held against the limit of a later one."""
    written: list[int] = []

    class Shared(list):
        def __setitem__(self, at: Any, value: Any) -> None:
            written.append(at)
            super().__setitem__(at, value)

    dog = Watchdog(Storage(tmp_path), "rank0", start_timeout_s=1800, step_timeout_s=600)
    dog._shared = Shared([0, 1_800_000])  # pyright: ignore[reportAttributeAccessIssue]
    dog.beat()
    assert (written, list(dog._shared)) == ([_BEATS, _LIMIT_MS], [1, 600_000])
    dog.beat(compiles=True)
    assert list(dog._shared) == [2, 1_800_000]


class Script(_Watcher):
    """Watches a rank that does what is written, on a clock of its own.

    Args:
        limit_s: the limit.
        looks: for each look at the rank, the seconds since the one before, and whether it gave a sign of life.
    """

    does, beats_when_it_goes_on = "sleeping", 0

    def __init__(self, limit_s: float, looks: Sequence[tuple[float, bool]], monkeypatch: pytest.MonkeyPatch):
        self.now, self.done = 0.0, []
        self._looks, self._shared = iter(looks), [0, int(limit_s * 1000)]  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr("arat_dist.watchdog.time.monotonic", lambda: self.now)
        self.watch()

    def _ends_within(self, seconds: float) -> bool:
        passed, beats = next(self._looks, (None, False))
        self.now += passed or 0
        self._shared[_BEATS] += beats
        return passed is None

    def _state(self) -> str:
        return self.does

    def _dump(self, silent_s: float) -> None:
        self.done.append(("dump", silent_s))
        self._shared[_BEATS] += self.beats_when_it_goes_on

    def _kill(self, limit_s: float) -> None:
        self.done.append(("kill", limit_s))


def test_a_pause_of_the_whole_machine_is_no_silence_of_the_rank(monkeypatch):
    look, pause, sign = (_TICK_S, False), (3600.0, False), (_TICK_S, True)
    assert Script(4, [sign, *[look] * 3, pause, *[look] * 8, sign], monkeypatch).done == []
    assert [what for what, _ in Script(4, [sign, *[look] * 16], monkeypatch).done] == ["dump", "kill"]


def test_who_hangs_again_has_its_stacks_dumped_again(monkeypatch):
    look, sign = (_TICK_S, False), (_TICK_S, True)
    done = Script(4, [sign, *[look] * 15, sign, *[look] * 16], monkeypatch).done
    assert done == [("dump", 3.75), ("dump", 3.75), ("kill", 4.0)]


def test_a_stopped_rank_that_goes_on_for_its_stacks_alone_gives_no_sign_of_life(monkeypatch):
    """And those that wait for it have had their stacks dumped before, for they may go on with it."""
    looks = [(_TICK_S, True), *[(_TICK_S, False)] * 33]
    monkeypatch.setattr(Script, "beats_when_it_goes_on", 1)
    assert Script(8, looks, monkeypatch).done == [("dump", 7.25)]
    monkeypatch.setattr(Script, "does", "stopped by a signal")
    assert Script(8, looks, monkeypatch).done == [("dump", 7.75), ("kill", 8)]


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
