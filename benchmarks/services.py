"""The contenders: how each is started, told of its engines, and stopped.  Only processes started here are stopped.

A new contender is a command line, if it speaks the RFC #1403 routes in Dynamo's dialect.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from http import HTTPStatus
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from benchmarks import process
from benchmarks.client import MODEL, Connection, request_of
from benchmarks.workload import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

START_S: Final = 30.0
READY_S: Final = 60.0
STOP_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A service that can be started."""

    name: str
    python: str
    arguments: tuple[str, ...]
    version: str
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that it is started with besides ours."""

    def command(self, port: int) -> list[str]:
        """Command line of the service."""
        return [self.python, *self.arguments, "--port", str(port)]


def _version(python: str, distribution: str, module: str) -> str | None:
    """Version of a distribution as this interpreter sees it; None if its module can't be found."""
    probe = (
        "import importlib.util as u, importlib.metadata as m, sys\n"
        f"sys.exit(1) if u.find_spec({module!r}) is None else print(m.version({distribution!r}))"
    )
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    except OSError:  # no such interpreter
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def kvindexer(python: str, extra: Sequence[str]) -> Contender | None:
    """Find kvindexer; None if this interpreter has none."""
    version = _version(python, "kvindexer", "kvindexer.__main__")
    arguments = ("-m", "kvindexer", "serve", *extra)
    return Contender(name="kvindexer", python=python, arguments=arguments, version=version) if version else None


def dynamo(python: str, extra: Sequence[str]) -> Contender | None:
    """NVIDIA Dynamo's standalone indexer; None if this interpreter has none."""
    version = _version(python, "ai-dynamo-runtime", "dynamo.indexer")
    arguments = ("-m", "dynamo.indexer", *extra)
    return Contender(name="Dynamo", python=python, arguments=arguments, version=version) if version else None


class Service:
    """A started contender."""

    def __init__(self, contender: Contender) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.name = contender.name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        quiet = {**os.environ, "DYN_LOG": "warn", **dict(contender.environment)}
        command = contender.command(self.port)
        self.started = time.monotonic()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=quiet)

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with Connection(self.port) as connection:
                    connection.ask(b"GET /workers HTTP/1.1\r\nHost: localhost\r\n\r\n")
            except OSError:
                time.sleep(0.05)
            else:
                time.sleep(0.3)
                return
        tail = self.log()[-2000:]
        self.stop()
        message = f"{self.name} did not start:\n{tail}"
        raise RuntimeError(message)

    def await_ready(self) -> float:
        """Return when /ready says so: seconds since the process was started."""
        request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
        deadline = self.started + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with Connection(self.port) as connection:
                    while connection.ask(request) and connection.status != HTTPStatus.OK:
                        time.sleep(0.02)
                    return time.monotonic() - self.started
            except OSError:
                time.sleep(0.005)
        message = f"{self.name} did not get ready:\n{self.log()[-2000:]}"
        raise RuntimeError(message)

    def register(self, endpoints: Sequence[str], replays: Sequence[str] = ()) -> None:
        """Make the engines known, one instance each, ids from 1."""
        with Connection(self.port) as connection:
            for engine, (endpoint, replay) in enumerate(zip_longest(endpoints, replays)):
                body: dict[str, Any] = {
                    "instance_id": engine + 1,
                    "endpoint": endpoint,
                    "model_name": MODEL,
                    "block_size": BLOCK_SIZE,
                    "dp_rank": 0,
                }
                if replay is not None:
                    body["replay_endpoint"] = replay
                answer = connection.ask(request_of("/register", msgspec.json.encode(body)))
                if connection.status not in {200, 201}:
                    message = f"{self.name} refused engine {engine}: {connection.status} {answer[:300]!r}"
                    raise RuntimeError(message)

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        return process.cpu_s(self._process.pid)

    def worked_s(self) -> float:
        """The same, finer, of threads that still run."""
        return process.worked_s(self._process.pid)

    def rss_mb(self) -> float:
        """Resident memory now."""
        return process.rss_mb(self._process.pid)

    def peak_mb(self) -> float:
        """Most memory ever resident."""
        return process.peak_mb(self._process.pid)

    def log(self) -> str:
        """What the service printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        """End the service at once."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the service at once, but in good order."""
        self._process.send_signal(signal.SIGINT)  # at SIGTERM kvindexer would take its leave for some seconds
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()
