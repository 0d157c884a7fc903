"""`arat submit`: a verb run as a Ray job, in a cluster that is reached through its dashboard's address."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from arat_dist.config import LBGATConfig, Recipe
from arat_dist.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from arat_dist.search.search import Search

RECIPE_FILE = "recipe.yaml"
SEARCH = "search.yaml"

_CONNECT_S = 10.0
_RETRY_S = 5.0
_AGENT_S = 60.0
"""How long a cluster may take from its dashboard's first answer until it takes jobs."""
_NUM_RETRIES = 60


class JobError(Exception):
    """The job didn't end well, or is no longer followed.

    Args:
        message: one line.
        status: the exit status that stands for it.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class JobCommand:
    """What a job runs.

    Attributes:
        arguments: of `arat`.
        files: by name, in the working directory of the job.
        stop_wait_s: time between SIGTERM and SIGKILL when the job is stopped; Ray's own is 3 s.
    """

    arguments: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    stop_wait_s: int = 60

    @property
    def entrypoint(self) -> str:
        """The line that Ray gives to a shell, whose place `arat` takes: it is to get the signals itself."""
        return shlex.join(["exec", "arat", *self.arguments])


def train_command(recipe: Recipe, name: str) -> JobCommand:
    """The training of a resolved recipe, which goes along as a file, in the cluster that the job runs in.

    Raises:
        UserError: a path that means nothing on another machine.
    """
    return JobCommand(["train", RECIPE_FILE, "--name", name], {RECIPE_FILE: _for_job(recipe)}, _stop_wait_s(recipe))


def tune_command(search: Search) -> JobCommand:
    """A search over a resolved recipe; both go along as files.

    Raises:
        UserError: a path that means nothing on another machine.
    """
    for uri in search.config.warm_start:
        _check_path("warm_start", uri)
    settings = yaml.safe_dump(search.config.model_dump(mode="json"), sort_keys=False)
    arguments = ["tune", RECIPE_FILE, "--search", SEARCH, "--name", search.run.name]
    files = {RECIPE_FILE: _for_job(search.home), SEARCH: settings}
    return JobCommand(arguments, files, _stop_wait_s(search.home))


def _for_job(recipe: Recipe) -> str:
    """The recipe as YAML for a job in a cluster, which is the one to train in (UserError)."""
    for key, path in _paths(recipe):
        if path is not None:
            _check_path(key, path)
    cluster = recipe.cluster.model_copy(update={"address": recipe.cluster.address or "auto"})
    return recipe.model_copy(update={"cluster": cluster}).to_yaml()


def _check_path(key: str, path: str) -> None:
    if "://" not in path and not Path(path).is_absolute():
        or_uri = " or a URI" if key in ("cluster.storage", "warm_start") else ""
        raise UserError(
            f"{key}: {path}: a job has a working directory of its own, which goes with it; an absolute path{or_uri} "
            "that the cluster's machines reach would be right"
        )


def _stop_wait_s(recipe: Recipe) -> int:
    """A step that is under way has to end, and a checkpoint to be written."""
    return int(recipe.cluster.step_timeout_s)


def _paths(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    yield "cluster.storage", recipe.cluster.storage
    yield "data.train", recipe.data.train
    yield "data.val", recipe.data.val
    yield "data.stage_to", recipe.data.stage_to
    yield "model.checkpoint", recipe.model.checkpoint
    if isinstance(recipe.objective, LBGATConfig) and recipe.objective.teacher is not None:
        yield "objective.teacher.checkpoint", recipe.objective.teacher.checkpoint


class Jobs:
    """A cluster's jobs.

    Args:
        address: the dashboard's URL.

    Raises:
        UserError: nothing answers there, or it doesn't take the token.
    """

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        # Ray puts these above what it is told.
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        # Read when Ray is imported. The token is in RAY_AUTH_TOKEN, in RAY_AUTH_TOKEN_PATH's file or ~/.ray/auth_token.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _check_reachable(self._address)
        with _refusals(self._address):
            from ray.job_submission import JobSubmissionClient

            _quieten()
            self._client: JobSubmissionClient = JobSubmissionClient(self._address)

    def start(self, command: JobCommand) -> str:
        """Send a job off; returns its id."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(command.stop_wait_s)}}
        with tempfile.TemporaryDirectory() as folder, _refusals(self._address):
            for name, text in command.files.items():
                (Path(folder) / name).write_text(text)
            if command.files:
                environment["working_dir"] = folder
            deadline = time.monotonic() + _AGENT_S
            while True:
                try:
                    return self._client.submit_job(entrypoint=command.entrypoint, runtime_env=environment)
                except RuntimeError as error:
                    # A cluster that has just started: its dashboard answers before it can take a job.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(_RETRY_S)

    def follow(self, job: str) -> dict[str, Any]:
        """Write a job's log to stderr until it ends; returns the JSON object that it printed last, if any.

        Raises:
            JobError: it failed or was stopped, with its exit status; or who called doesn't want to wait (Ctrl-C).
        """
        log = _Log()
        try:
            details = asyncio.run(self._follow(job, log))
        except KeyboardInterrupt:
            ray = f"--address {self._address} {job}"
            raise JobError(
                f"{job} goes on; `ray job logs --follow {ray}` shows it, `ray job stop {ray}` ends it with a checkpoint"
            ) from None
        if details.status == "SUCCEEDED":
            return log.result()
        ending = "was stopped" if details.status == "STOPPED" else "failed"
        if details.driver_exit_code is None and details.status == "FAILED":
            ending += f": {(details.message or '').strip().rpartition(chr(10))[2]}"
        raise JobError(f"{job} {ending}", details.driver_exit_code or 1)

    async def _follow(self, job: str, log: _Log) -> JobDetails:
        """Pass the log on, through lost connections; each new one begins with the first line again."""
        from aiohttp import ClientError

        retries = 0
        while True:
            log.rewind()
            try:
                async for lines in self._client.tail_job_logs(job):
                    retries = 0
                    log.add(lines)
                details = self._client.get_job_info(job)
                if details.status.is_terminal():
                    return details
            except (RuntimeError, OSError, ClientError) as error:
                retries += 1
                if retries > _NUM_RETRIES:
                    raise JobError(f"{job} goes on, but {self._address} doesn't answer: {error}") from error
            await asyncio.sleep(_RETRY_S)


class _Log:
    """A job's log as it comes in pieces, on its way to stderr."""

    def __init__(self):
        self._seen = self._at = 0
        self._last_lines = ""

    def rewind(self) -> None:
        """It comes from its beginning again: what was shown is not shown again."""
        self._at = 0

    def add(self, lines: str) -> None:
        new = lines[max(0, self._seen - self._at) :]
        self._at += len(lines)
        self._seen = max(self._seen, self._at)
        sys.stderr.write(new)
        sys.stderr.flush()
        self._last_lines = (self._last_lines + new)[-(2**20) :]

    def result(self) -> dict[str, Any]:
        """The last line that is a JSON object; empty if none is. What libraries say at their end may follow it."""
        for line in reversed(self._last_lines.splitlines()):
            if line.startswith("{") and line.endswith("}"):
                try:
                    return json.loads(line)
                except json.JSONDecodeError:
                    continue
        return {}


def _check_reachable(address: str) -> None:
    """Refuse what is no URL or where nothing listens, soon: Ray's own attempt has no time-out (UserError)."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address: {address}: the URL of the cluster's dashboard, http://HOST:8265, would be right")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--address: {address}: {getattr(error, 'strerror', None) or error}; the URL of the cluster's dashboard, "
            "http://HOST:8265, would be right"
        ) from error


@contextmanager
def _refusals(address: str) -> Iterator[None]:
    """What a dashboard, or whatever else listens there, refuses, as one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        what = "not the cluster's" if "invalid" in error.message else "missing"
        raise UserError(
            f"RAY_AUTH_TOKEN: {what}: {address} wants its own token, in this variable or in ~/.ray/auth_token"
        ) from None
    except (RuntimeError, OSError, requests.RequestException) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"--address: {address}: {first_line}; a Ray dashboard would be right") from error


def _quieten() -> None:
    """Keep to warnings: Ray's client tells of each upload and each closed connection."""
    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.ERROR)
