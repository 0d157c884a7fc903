"""Machines for the tests of failures, and one line on each failure at the end of the run."""

import os
import secrets
import signal
import uuid
from collections.abc import Iterator

import pytest
from nodes import Machines
from small import MARK, wait_until_gone

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.sources import open_source


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    os.environ[MARK] = uuid.uuid4().hex
    # Read by Ray when it is imported: who joins needs the token.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONHASHSEED": "0"}
    yield
    left = wait_until_gone(90)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture
def machines(tmp_path_factory) -> Iterator[Machines]:
    """A head without CPUs, digits on the shared storage; the other machines see nothing of the tests' own folder."""
    with Machines(hidden=[tmp_path_factory.getbasetemp()]) as machines:
        for split in ("train", "val"):
            write_beton(open_source(f"digits:{split}"), machines.storage / f"{split}.beton")
        yield machines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a failure: its name, whether it passed, and what was noted of it."""
    terminalreporter.section("failures")
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if outcome == "passed" and report.when != "call":
                continue
            notes = "; ".join(f"{key} {value}" for key, value in report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {outcome} {notes}".rstrip())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A failure that was skipped wasn't done."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.getreports("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
