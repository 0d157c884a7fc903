"""One trained run for all of the report's tests."""

from pathlib import Path

import pytest
import torch
from report_runs import trained_run
from toys import Sets

from arat_dist.run import Run


@pytest.fixture(scope="session")
def trained(sets: Sets, tmp_path_factory) -> Run:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return trained_run(sets, Path(tmp_path_factory.mktemp("trained")))
