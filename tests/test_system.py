"""System metrics: each figure against the kernel's own files, and the layout of many machines in one tensor."""

import math
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arat_dist.system import GPUS, NAMES, SystemMetrics, flat, slots

pytestmark = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="compares with Linux's /proc")


def meminfo() -> dict[str, int]:
    """KiB by name."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def ticks() -> tuple[int, int]:
    """Idle and all ticks of all cores since the start."""
    values = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return values[3] + values[4], sum(values)


def traffic() -> tuple[int, int]:
    """Bytes sent and received by all interfaces but the loopback."""
    rows = [line.replace(":", " ").split() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    rows = [row for row in rows if row[0] != "lo"]
    return sum(int(row[9]) for row in rows), sum(int(row[1]) for row in rows)


def test_memory_disk_and_load_are_the_kernels(tmp_path):
    sample = SystemMetrics(tmp_path / "not" / "yet").sample()
    assert tuple(sample) == NAMES
    kib = meminfo()
    used = kib["MemTotal"] - kib["MemAvailable"]
    assert sample["memory_gib"] == pytest.approx(used / 2**20, abs=1)
    assert sample["memory_percent"] == pytest.approx(100 * used / kib["MemTotal"], abs=5)
    disk = os.statvfs(tmp_path)
    assert sample["disk_free_gib"] == pytest.approx(disk.f_bavail * disk.f_frsize / 2**30, abs=2)
    assert sample["load_1min"] == pytest.approx(float(Path("/proc/loadavg").read_text().split()[0]), abs=1)


def test_the_processors_use_is_that_since_the_last_sample():
    metrics = SystemMetrics()
    before = ticks()
    metrics.sample()
    while ticks()[1] - before[1] < 100:  # a second of one core
        sum(range(10_000))
    percent = metrics.sample()["cpu_percent"]
    idle, total = (after - first for after, first in zip(ticks(), before, strict=True))
    assert percent == pytest.approx(100 * (1 - idle / total), abs=25)
    assert percent > 0


def test_traffic_is_bytes_a_second_without_the_loopback(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("arat_dist.system.time.perf_counter", lambda: next(clock))
    before = traffic()
    metrics = SystemMetrics()
    # A hundred MB to ourselves are no traffic of the machine.
    receiver, sender = socket.socketpair()
    server = socket.create_server(("127.0.0.1", 0))
    with receiver, sender, server, socket.create_connection(server.getsockname()) as out:
        peer, _ = server.accept()
        with peer:
            for _ in range(1000):
                out.sendall(bytes(100_000))
                got = 0
                while got < 100_000:
                    got += len(peer.recv(100_000))
    sample = metrics.sample()
    sent, received = (after - first for after, first in zip(traffic(), before, strict=True))
    assert 0 <= sample["network_sent_mib_per_s"] <= sent / 2**20 / 4
    assert 0 <= sample["network_received_mib_per_s"] <= received / 2**20 / 4


def test_rates_are_of_the_time_between_two_samples(monkeypatch):
    counts = iter([(0, 0), (3 * 2**20, 2**20), (5 * 2**20, 2**20)])
    clock = iter([10.0, 12.0, 13.0])

    def counters(pernic: bool) -> dict[str, SimpleNamespace]:
        sent, received = next(counts)
        each = SimpleNamespace(bytes_sent=sent / 2, bytes_recv=received / 2)
        return {"eth0": each, "eth1": each, "lo": SimpleNamespace(bytes_sent=10**12, bytes_recv=10**12)}

    monkeypatch.setattr("arat_dist.system.psutil.net_io_counters", counters)
    monkeypatch.setattr("arat_dist.system.time.perf_counter", lambda: next(clock))
    metrics = SystemMetrics()
    rates = [metrics.sample() for _ in range(2)]
    assert [each["network_sent_mib_per_s"] for each in rates] == [1.5, 2]
    assert [each["network_received_mib_per_s"] for each in rates] == [0.5, 0]


class TwoGPUs:
    """NVML's Python module as nvidia-ml-py has it, of a machine with two GPUs."""

    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetUtilizationRates = staticmethod(lambda handle: SimpleNamespace(gpu=50 + handle))
    nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: SimpleNamespace(used=(handle + 1) * 2**30))


def test_gpus_are_told_by_nvml_and_missing_ones_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", TwoGPUs)
    sample = SystemMetrics().sample()
    gpus = {name: value for name, value in sample.items() if name.startswith("gpu") and not math.isnan(value)}
    assert gpus == {"gpu0_percent": 50, "gpu0_memory_gib": 1, "gpu1_percent": 51, "gpu1_memory_gib": 2}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    without = SystemMetrics().sample()
    assert sum(math.isnan(value) for value in without.values()) == 2 * GPUS


def test_the_samples_of_all_machines_fit_into_one_sum():
    samples = [{name: float(100 * node + i) for i, name in enumerate(NAMES)} for node in range(3)]
    samples[1]["gpu7_percent"] = math.nan
    # Two ranks a machine, of which the first contributes.
    joined = torch.stack([slots(3, node, sample) for node in range(3) for sample in (samples[node], None)]).sum(0)
    assert joined.shape == (3, len(NAMES))
    keys = flat(joined)
    expected = {f"system/node{node}/{name}": value for node in range(3) for name, value in samples[node].items()}
    del expected["system/node1/gpu7_percent"]
    assert keys == expected
    assert keys["system/node2/cpu_percent"] == 200


class NVMLError(Exception):
    """Stands for pynvml's, which may be missing here."""


def refuse(*_: object) -> None:
    raise NVMLError("Not Supported")


def test_what_nvml_refuses_is_left_out_and_ends_nothing(monkeypatch):
    """Slices of a GPU tell no utilization, a GPU that fell off its bus nothing, some containers not even a count."""

    def handle(index: int) -> int:
        return refuse() if index == 1 else index  # pyright: ignore[reportReturnType]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetUtilizationRates=lambda index: refuse() if index == 0 else SimpleNamespace(gpu=40),
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=(index + 1) * 2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sample = SystemMetrics().sample()
    told = {name: value for name, value in sample.items() if name.startswith("gpu") and not math.isnan(value)}
    assert told == {"gpu0_memory_gib": 1.0, "gpu2_percent": 40.0, "gpu2_memory_gib": 3.0}
    nvml.nvmlDeviceGetCount = refuse
    assert all(math.isnan(value) for name, value in SystemMetrics().sample().items() if name.startswith("gpu"))
    nvml.nvmlInit = refuse
    assert all(math.isnan(value) for name, value in SystemMetrics().sample().items() if name.startswith("gpu"))
