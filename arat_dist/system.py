"""What a machine is doing while it trains: processor, memory, disk, network, GPUs."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

GPUS = 8
"""GPUs of a machine that are measured; further ones are left out."""

NAMES = (
    "cpu_percent",
    "load_1min",
    "memory_gib",
    "memory_percent",
    "disk_free_gib",
    "network_sent_mib_per_s",
    "network_received_mib_per_s",
    *(f"gpu{index}_{name}" for index in range(GPUS) for name in ("percent", "memory_gib")),
)
"""The same for every machine, so that one tensor takes them all; what a machine can't tell is NaN."""

GIB, MIB = 2**30, 2**20


class SystemMetrics:
    """Measures one machine, whatever else runs on it; in a container, the machine around it.

    Rates and the processor's use are means since the last sample. A sample takes less than a millisecond without GPUs.

    Args:
        folder: on the disk whose free space is told; need not exist yet.
    """

    def __init__(self, folder: str | Path = "."):
        path = Path(folder).absolute()
        self._folder = next(each for each in (path, *path.parents) if each.is_dir())
        self._nvml = _nvml()
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._time, self._sent, self._received = _traffic()

    def sample(self) -> dict[str, float]:
        """Values by name, as in `NAMES`: percent of all cores, GiB, MiB/s; NaN where there is no GPU to ask."""
        memory = psutil.virtual_memory()
        before = self._time, self._sent, self._received
        self._time, self._sent, self._received = _traffic()
        seconds = max(self._time - before[0], 1e-6)
        return {
            "cpu_percent": psutil.cpu_percent(),
            "load_1min": os.getloadavg()[0],
            "memory_gib": (memory.total - memory.available) / GIB,
            "memory_percent": memory.percent,
            "disk_free_gib": shutil.disk_usage(self._folder).free / GIB,
            "network_sent_mib_per_s": (self._sent - before[1]) / MIB / seconds,
            "network_received_mib_per_s": (self._received - before[2]) / MIB / seconds,
            **_gpus(self._nvml),
        }


def slots(num_nodes: int, node: int, sample: dict[str, float] | None) -> Tensor:
    """One machine's sample at its place among zeros: summed over the ranks, they are the samples of all.

    Args:
        num_nodes: number of machines.
        node: 0-based index of this rank's machine.
        sample: of the machine; None on all of its ranks but one.

    Returns:
        float64 [num_nodes, len(NAMES)].
    """
    joined = torch.zeros(num_nodes, len(NAMES), dtype=torch.float64)
    if sample is not None:
        joined[node] = torch.tensor([sample[name] for name in NAMES], dtype=torch.float64)
    return joined


def flat(joined: Tensor) -> dict[str, float]:
    """Summed slots [num_nodes, len(NAMES)] as system/node0/cpu_percent and so on, without what no machine has."""
    return {
        f"system/node{node}/{name}": round(value, 3)
        for node, values in enumerate(joined.tolist())
        for name, value in zip(NAMES, values, strict=True)
        if not math.isnan(value)
    }


def _traffic() -> tuple[float, int, int]:
    """Time in seconds, bytes sent and received so far by all interfaces but the loopback."""
    counters = [count for name, count in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return time.perf_counter(), sum(each.bytes_sent for each in counters), sum(each.bytes_recv for each in counters)


def _nvml() -> Any:
    """NVML's Python module, ready for use; None where it or a driver is missing."""
    try:
        nvml = importlib.import_module("pynvml")  # of nvidia-ml-py
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - whatever a driver lacks, there is training to do
        return None
    return nvml


def _gpus(nvml: Any) -> dict[str, float]:
    """Use in percent and memory in use of the machine's GPUs, whoever uses them; not yet run on one.

    NVML and not torch, which would put a context of some hundred MiB on every GPU that it asks. What NVML refuses, as
    it does for slices of a GPU and in some containers, is NaN: a figure for people never ends a run.
    """
    values = {name: math.nan for name in NAMES if name.startswith("gpu")}
    count = _asked(lambda: nvml.nvmlDeviceGetCount()) if nvml else 0
    for index in range(0 if math.isnan(count) else min(int(count), GPUS)):

        def handle(index: int = index) -> Any:
            return nvml.nvmlDeviceGetHandleByIndex(index)

        values[f"gpu{index}_percent"] = _asked(lambda: nvml.nvmlDeviceGetUtilizationRates(handle()).gpu)
        values[f"gpu{index}_memory_gib"] = _asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle()).used / GIB)
    return values


def _asked(ask: Callable[[], float]) -> float:
    """NVML's answer; NaN where it has none."""
    try:
        return float(ask())
    except Exception:  # noqa: BLE001 - its errors are a class each, of a module that may be missing
        return math.nan
