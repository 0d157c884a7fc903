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
