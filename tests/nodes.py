"""Several machines on this one, each with its own disk, network and name, joined to one Ray cluster.

A machine is a network namespace on a bridge, and a mount namespace in which one folder, the disk, is its own. Nothing
but the storage folder is shared with the driver's machine: what the tests write elsewhere isn't there, so a path or an
address that works by accident on one host fails. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_OBJECT_STORE_BYTES = 80 * 2**20
_libc = ctypes.CDLL(None, use_errno=True)

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 10,
}
"""Ray's settings for how soon a machine counts as lost, and how soon a lost machine's processes end: shortened."""


@dataclass
class Machine:
    """One of the machines.

    Attributes:
        name: its host name, and that of its network namespace.
        ip: its address on the bridge.
        link: the bridge's end of its cable.
        num_cpus: what Ray may use.
        node: Ray's handle, while it is up.
    """

    name: str
    ip: str
    link: str
    num_cpus: int
    node: Any = field(default=None, repr=False)

    @property
    def node_id(self) -> str:
        """Ray's id of its node."""
        return self.node.node_id

    def processes(self) -> dict[int, str]:
        """Command lines by pid of the live processes in its network."""
        pids = _run("ip", "netns", "pids", self.name).split()
        found = {}
        for pid in pids:
            with suppress(OSError):
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: line for pid, line in found.items() if line}


class Machines:
    """A Ray cluster whose head, without CPUs for the work, is on the driver's machine.

    Args:
        hidden: folders of the driver's machine that the others don't see.

    Attributes:
        storage: the folder that all share.
        disk: a path where each machine, the driver's too, has a disk of its own.
    """

    def __init__(self, hidden: Sequence[Path] = ()):
        self._folder = Path(tempfile.mkdtemp(prefix="arat-", dir="/tmp"))  # short: sockets lie in it
        self._tag = self._folder.name.removeprefix("arat-")
        self._hidden = hidden
        self._bridge = f"ab{self._tag}"
        self._subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._machines: list[Machine] = []
        self._cluster: Any = None
        self.storage, self.disk = self._folder / "storage", self._folder / "disk"

    def __enter__(self) -> Machines:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Of the Ray cluster, for cluster.address."""
        return self._cluster.address

    def add(self, num_cpus: int = 1) -> Machine:
        """Start a machine and have it join the cluster."""
        number = len(self._machines) + 1
        machine = Machine(
            f"arat-{self._tag}-{number}", f"{self._subnet}.{number + 1}", f"av{self._tag}{number}", num_cpus
        )
        self._machines.append(machine)
        _run("ip", "netns", "add", machine.name)
        _run("ip", "link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
        _run("ip", "link", "set", machine.link, "master", self._bridge, "up")
        _run("ip", "-n", machine.name, "addr", "add", f"{machine.ip}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", machine.name, "link", "set", device, "up")
        _in_thread(lambda: self._boot(machine))
        return machine

    def kill(self, machine: Machine) -> None:
        """End a machine's processes without grace, all at once."""
        self._kill_processes(machine)
        self._cluster.remove_node(machine.node, allow_graceful=False)
        machine.node = None

    def unplug(self, machine: Machine) -> None:
        """Take a machine off the network; its processes go on."""
        _run("ip", "link", "set", machine.link, "down")

    def plug_in(self, machine: Machine) -> None:
        """Put it back."""
        _run("ip", "link", "set", machine.link, "up")

    def drain(self, machine: Machine, seconds: int) -> None:
        """Tell Ray that a machine will go after so many seconds, as clouds do before they take one back."""
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
        from ray.core.generated import autoscaler_pb2

        reasons: Any = autoscaler_pb2
        reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.address).drain_node(
            machine.node_id, reason, "a test", int((time.time() + seconds) * 1000)
        )
        assert accepted, why

    def close(self) -> None:
        """End everything that was started and remove everything that was made."""
        for machine in self._machines:
            if machine.node is not None:
                with suppress(Exception):
                    self.kill(machine)
            with suppress(subprocess.CalledProcessError):
                self._kill_processes(machine)
            for command in (("ip", "link", "del", machine.link), ("ip", "netns", "del", machine.name)):
                with suppress(subprocess.CalledProcessError):
                    _run(*command)
        if self._cluster is not None:
            self._cluster.shutdown()
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", self._bridge)
        deadline = time.monotonic() + 30
        while self._folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.2)  # what is about to end writes its last lines of log
        assert not self._folder.exists(), f"{self._folder} can't be removed"

    def _kill_processes(self, machine: Machine) -> None:
        for pid in machine.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        """The bridge, the driver's disk and Ray's head."""
        if os.geteuid() != 0:
            raise PermissionError("several machines on this one: needs root (network and mount namespaces)")
        self.storage.mkdir()
        self.disk.mkdir()
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._subnet}.1/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        from ray.cluster_utils import Cluster

        head = {
            "node_ip_address": f"{self._subnet}.1",
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": _free_port(),  # a Ray beside this one may have the usual one
            "object_store_memory": _OBJECT_STORE_BYTES,
            "temp_dir": str(self.disk / "ray"),
            "_system_config": HEALTH,
        }
        # At exit: the hooks for that can be set by the main thread alone, and `close` does it.
        self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)

    def _boot(self, machine: Machine) -> None:
        """Enter the machine with the calling thread, whose children stay in it, and start Ray's node there."""
        own = self._folder / machine.name
        (own / "disk").mkdir(parents=True)
        (own / "empty").mkdir()
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{machine.ip} {machine.name}\n")
        with Path(f"/run/netns/{machine.name}").open() as network:
            _check(_libc.setns(network.fileno(), _CLONE_NEWNET), "setns")
        _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS), "unshare")
        _check(_libc.sethostname(machine.name.encode(), len(machine.name)), "sethostname")
        _mount(None, "/", _MS_REC | _MS_PRIVATE)
        _mount(own / "disk", self.disk, _MS_BIND)
        _mount(own / "hosts", "/etc/hosts", _MS_BIND)
        for folder in self._hidden:
            _mount(own / "empty", folder, _MS_BIND)
        machine.node = self._cluster.add_node(
            node_ip_address=machine.ip,
            num_cpus=machine.num_cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=str(self.disk / "ray"),
        )


def _in_thread(work: Callable[[], None]) -> None:
    """Call it in a thread of its own, which enters namespaces that this one stays out of."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=call, name="machine")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _mount(source: str | Path | None, target: str | Path, flags: int) -> None:
    name = None if source is None else os.fsencode(source)
    _check(_libc.mount(name, os.fsencode(target), None, ctypes.c_ulong(flags), None), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)} (root in a machine of its own is needed)")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
