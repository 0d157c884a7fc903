"""Servers of their own for a test: PostgreSQL, MLflow, and one that is no good. All on loopback, all ended with it."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2

PATIENCE_S = 90


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process that a test started and to all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=PATIENCE_S)
    process.wait(PATIENCE_S)


class Postgres:
    """A PostgreSQL cluster in a folder of its own, as a user that isn't root, which it refuses."""

    def __init__(self) -> None:
        self.port = free_port()
        self.uri = f"postgresql+psycopg2://arat@127.0.0.1:{self.port}/postgres"
        self._bin = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self._as: dict[str, Any] = {}
        # Not below pytest's folder, which is its user's alone.
        self.folder = Path(tempfile.mkdtemp(prefix="arat-postgres-"))
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        options = ["--auth=trust", "--username=arat", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._call("initdb", f"--pgdata={self.folder}/data", *options)
        self.start()

    def _call(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [self._bin / program, *options], cwd=self.folder, capture_output=True, text=True, check=False, **self._as
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", "data", "-k", self.folder, "-h", "127.0.0.1", "-p", str(self.port)],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self._as,
            )
        wait_for(self._answers, "PostgreSQL never came up")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log()
        with contextlib.suppress(psycopg2.OperationalError):
            self.query("SELECT 1")
            return True
        return False

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def query(self, sql: str) -> list[tuple]:
        """Ask the database itself, not MLflow."""
        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="arat", dbname="postgres")
        with contextlib.closing(connection), connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def kill(self) -> None:
        kill_tree(self._process)

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()
        shutil.rmtree(self.folder)


class MLflowServer:
    """`mlflow server`, on the same port each time it is started."""

    def __init__(self, store: str, folder: Path):
        self._store, self._folder, self.port = store, folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self._store, "--default-artifact-root", str(self._folder)]
        # Job execution would start further servers beside it.
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "mlflow-server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers, "MLflow never came up")

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "mlflow-server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to the server and its worker."""
        kill_tree(self._process)


@contextlib.contextmanager
def object_store(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server with one bucket, by moto; gives the environment in which AWS' clients use it."""
    port = free_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [Path(sys.executable).with_name("moto_server"), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "s3.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def has_bucket() -> bool:
        assert process.poll() is None, (folder / "s3.log").read_text()
        request = urllib.request.Request(f"{env['AWS_ENDPOINT_URL']}/{bucket}", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_for(has_bucket, "the object store never came up")
        yield env
    finally:
        kill_tree(process)


@contextlib.contextmanager
def bad_server(answer: bytes | None) -> Iterator[str]:
    """URI of a server that gives every request the same answer, or takes it and never answers (None)."""
    held: list[socket.socket] = []

    def serve(server: socket.socket) -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            held.append(peer)
            if answer is not None:
                with contextlib.suppress(OSError):
                    peer.recv(65536)
                    peer.sendall(answer)
                    peer.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    for peer in held:
        peer.close()
