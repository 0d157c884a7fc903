"""Small data, small recipes, and the promise that no process outlives the tests."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import MARK, tiny_overrides, wait_until_gone

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.sources import open_source


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    os.environ[MARK] = uuid.uuid4().hex
    yield
    left = wait_until_gone(90)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    del os.environ[MARK]
    assert left == {}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with train.beton and val.beton of scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "val"):
        write_beton(open_source(f"digits:{split}"), folder / f"{split}.beton")
    return folder


@pytest.fixture
def tiny(digits, tmp_path, monkeypatch) -> dict[str, str]:
    """Overrides of the shipped digits recipe that make it a matter of seconds; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    return tiny_overrides(digits, tmp_path / "runs")
