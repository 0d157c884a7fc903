"""A process that takes itself to have a GPU, for all tests of this folder."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import pytest
from fake_driver import compile_driver, load_driver
from fake_gpu import called, what_is_wrong


@pytest.fixture(scope="session")
def on_fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function that is defined in a test module, with arguments, there; the tests are skipped if it can't be.

    Starting torch takes seconds: one process serves for all.
    """
    try:
        driver = compile_driver(tmp_path_factory.mktemp("driver"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the driver's stand-in can't be compiled: {error}")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(load_driver, driver).result()  # before anything that imports torch
            reason = pool.submit(what_is_wrong).result()
        except (OSError, BrokenProcessPool) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            pytest.skip(f"torch can't be made to believe in a GPU: {reason}")
        yield lambda function, *args, **kwargs: pool.submit(called, function, *args, **kwargs).result()
