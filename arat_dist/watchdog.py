"""A step watchdog: a rank that gives no sign of life has its stacks dumped and is killed, so that it is restarted.

A process that is stopped, or whose GIL is held by C code, can't watch itself, so a small process beside it does. It
runs this file alone, without site-packages, and loads the storage's driver only when there are stacks to write.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arat_dist.storage import Storage

# USR1 is Ray Tune's, USR2 that of Ray's dashboard, and Slurm scripts use both; PROF belongs to profilers. Of the
# real-time ones glibc has 32 and 33, gRPC had SIGRTMIN+6, Valgrind has SIGRTMAX.
DUMP_SIGNAL = signal.SIGRTMIN + 11

STACKS = "stacks"
"""Folder of a run with what is written about ranks that hung."""

_TICK_S = 0.25
_DUMP_AT = 0.9
"""Share of the limit after which stacks are dumped: ranks that hang together have all done so when one is killed."""
_DUMP_STOPPED_AT = 0.95
"""The same of a stopped rank, which goes on for it. Those that wait for it may then go on too, so they come first."""
_DUMP_S = 5.0
_WRITE_S = 15.0
_KILL_S = 5.0
_SAY_S = 2.0
_BEATS, _LIMIT_MS = 0, 1
_BYTES = 16
_STATES = {"T": "stopped by a signal", "D": "waiting for a disk or a device", "R": "running", "S": "sleeping"}


class Watchdog:
    """Kills this process when too much time passes between two signs of life; a context, one at a time.

    At nine tenths of the limit the stacks of all threads go to stderr and to stacks/NAME-TIME.txt; at the limit the
    process gets SIGKILL. Time in which the whole machine stood still doesn't count. Linux only.

    Args:
        folder: the run's.
        name: of this process in messages, such as rank0.
        start_timeout_s: limit up to the first sign of life, and where nets are compiled anew, in seconds.
        step_timeout_s: limit between two later ones, in seconds.
    """

    def __init__(self, folder: Storage, name: str, *, start_timeout_s: float, step_timeout_s: float):
        self._uri, self._name = (folder / STACKS).uri, name
        self._start_limit_ms, self._step_limit_ms = int(start_timeout_s * 1000), int(step_timeout_s * 1000)

    def __enter__(self) -> Watchdog:
        # Shared with the watcher: the number of signs of life, and the limit that holds.
        memory_fd = os.memfd_create("watchdog")
        os.truncate(memory_fd, _BYTES)
        self._shared = _map(memory_fd)
        self._shared[_LIMIT_MS] = self._start_limit_ms
        pidfd = os.pidfd_open(os.getpid())  # unlike a number it never comes to mean another process
        fds = (pidfd, memory_fd, _stacks_fd())
        self._watcher = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", __file__, *map(str, fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C in a terminal reaches all of its foreground group
        )
        assert self._watcher.stdin is not None
        with self._watcher.stdin as given:
            what = {"uri": self._uri, "name": self._name, "pid": os.getpid(), "path": sys.path}
            given.write(json.dumps(what).encode())
        os.close(pidfd)
        os.close(memory_fd)
        return self

    def beat(self, *, compiles: bool = False) -> None:
        """Give a sign of life: after a step, or a batch of an evaluation. Takes well under a microsecond.

        Args:
            compiles: whether nets are compiled anew before the next one, which may take as long as the first one.
        """
        # In this order: the watcher must not hold the time of the first step against the limit of a later one.
        self._shared[_BEATS] += 1
        self._shared[_LIMIT_MS] = max(self._start_limit_ms, self._step_limit_ms) if compiles else self._step_limit_ms

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.kill()
        self._watcher.wait()


@cache
def _stacks_fd() -> int:
    """Where this process writes its stacks to, for good: without the handler, a late signal would end it."""
    fd = os.memfd_create("stacks")
    faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True)  # its handler needs no GIL
    return fd


def _map(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, _BYTES)).cast("q")


class _Watcher:
    """The process beside the rank.

    Args:
        pidfd: the rank.
        memory_fd: what it shares.
        stacks_fd: where its handler writes stacks to.
        uri: folder for the stacks.
        name: of the rank.
        pid: of the rank, for messages.
        path: the rank's sys.path.
    """

    def __init__(self, pidfd: int, memory_fd: int, stacks_fd: int, *, uri: str, name: str, pid: int, path: list[str]):
        self._pidfd, self._stacks_fd, self._shared = pidfd, stacks_fd, _map(memory_fd)
        self._uri, self._name, self._pid, self._path = uri, name, pid, path
        self._rank = select.poll()
        self._rank.register(pidfd, select.POLLIN)

    def watch(self) -> None:
        """Return when the rank has ended, by itself or by our hand."""
        beats, silent_s, dumped, before = -1, 0.0, False, time.monotonic()
        while not self._ends_within(_TICK_S):
            now = time.monotonic()
            # A machine that was paused as a whole didn't hang: who watches had no more time than the rank.
            silent_s += min(now - before, 2 * _TICK_S)
            before = now
            limit_s = self._shared[_LIMIT_MS] / 1000  # before the signs of life: see `beat`
            if beats != self._shared[_BEATS]:
                beats, silent_s, dumped = self._shared[_BEATS], 0.0, False
            if silent_s >= limit_s:
                if not dumped:
                    self._dump(silent_s)
                self._kill(limit_s)
                return
            if dumped or silent_s < _DUMP_AT * limit_s:
                continue
            is_stopped = self._state() == _STATES["T"]
            if not is_stopped or silent_s >= _DUMP_STOPPED_AT * limit_s:
                dumped = True
                self._dump(silent_s)
                if is_stopped:
                    # It had to go on for a moment: a sign of life that it gave then is none.
                    beats = self._shared[_BEATS]

    def _ends_within(self, seconds: float) -> bool:
        return bool(self._rank.poll(seconds * 1000))

    def _state(self) -> str:
        """What the rank is doing, in the kernel's view."""
        try:
            letter = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"
        return _STATES.get(letter, f"in state {letter}")

    def _dump(self, silent_s: float) -> None:
        """Have the rank write its stacks, and pass them on; a stopped rank goes on for no longer than that takes."""
        state, begin = self._state(), os.fstat(self._stacks_fd).st_size
        self._send(DUMP_SIGNAL)
        self._send(signal.SIGCONT)
        size, until = begin, time.monotonic() + _DUMP_S
        while time.monotonic() < until and not self._ends_within(0.1):
            last, size = size, os.fstat(self._stacks_fd).st_size
            if begin < last == size:
                break
        if state == _STATES["T"]:
            self._send(signal.SIGSTOP)
        stacks = os.pread(self._stacks_fd, size - begin, begin).decode(errors="replace") or "(none came)\n"
        text = f"{self._name}: no sign of life for {silent_s:.0f} s; process {self._pid} is {state}:\n{stacks}"
        _within(_SAY_S, _say, text)
        _within(_WRITE_S, self._write, text)

    def _write(self, text: str) -> None:
        """Write the stacks into the run's folder, wherever that is."""
        file = f"{self._name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
        try:
            if "://" not in self._uri:  # at once: when another rank is killed, Ray ends this one and its children
                Path(self._uri).mkdir(parents=True, exist_ok=True)
                (Path(self._uri) / file).write_text(text)
                return
            sys.path[:] = self._path
            from arat_dist.storage import Storage

            Storage(self._uri).write(file, text.encode())
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            _say(f"{self._name}: {self._uri}/{file}: {type(error).__name__}: {error}\n")

    def _kill(self, limit_s: float) -> None:
        self._send(signal.SIGKILL)
        ended = self._ends_within(_KILL_S)
        what = "was killed" if ended else "can't be killed: the kernel holds it, or it is PID 1"
        _within(_SAY_S, _say, f"{self._name}: no sign of life for {limit_s:g} s; process {self._pid} {what}\n")

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended since
            signal.pidfd_send_signal(self._pidfd, number)


def _within(seconds: float, work: Callable[[str], None], text: str) -> None:
    """Call it, but don't wait for long: a full pipe or a storage that is down must not save a rank."""
    thread = threading.Thread(target=work, args=(text,), daemon=True)
    thread.start()
    thread.join(seconds)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        sys.stderr.write(text)
        sys.stderr.flush()


if __name__ == "__main__":
    _Watcher(*map(int, sys.argv[1:]), **json.load(sys.stdin)).watch()
    os._exit(0)  # a thread may still wait for the storage
