"""Machines for the tests of failures, and one line on each failure at the end of the run."""

import os
import secrets
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from driver import TWO, Driver, Outcome
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


@contextmanager
def machines_with_digits(hidden: Path) -> Iterator[Machines]:
    """A head without CPUs, digits on the shared storage; the other machines see nothing of the tests' own folder."""
    with Machines(hidden=[hidden]) as machines:
        for split in ("train", "val"):
            write_beton(open_source(f"digits:{split}"), machines.storage / f"{split}.beton")
        yield machines


@pytest.fixture
def machines(tmp_path_factory) -> Iterator[Machines]:
    with machines_with_digits(tmp_path_factory.getbasetemp()) as machines:
        yield machines


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Outcome:
    """What the run of the tests that compare comes to where nothing happens to it."""
    with machines_with_digits(tmp_path_factory.getbasetemp()) as machines:
        for _ in range(2):
            machines.add(1)
        driver = Driver(machines, "calm", TWO)
        try:
            driver.summary()
            return driver.outcome()
        finally:
            driver.end()
