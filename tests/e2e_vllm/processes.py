"""Processes of the run: each a session of its own, ended by its id however the run ends.

Beside each stands a guard: a shell that waits on a pipe from us and kills the session when the pipe closes, which it
does even if we are killed.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

STOP_WITHIN_S: Final = 15.0
TAIL_BYTES: Final = 3000
PORTS: Final = range(20_000, 30_000)
"""Below those that the system gives to outgoing connections, so that a port is still free after a restart."""


class RunError(Exception):
    """The run can't go on; says nothing about predictions."""


class Process:
    """One command with its descendants."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self.started_at = time.monotonic()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'cat; kill -s KILL -- "-$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise RunError if it has ended, with its last words."""
        if (code := self._process.poll()) is not None:
            raise RunError(f"{self.name} ended with exit code {code}\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its output."""
        return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        self._guard.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_WITHIN_S)
        self._guard.wait(STOP_WITHIN_S)
        if self._guard.stdin is not None:
            self._guard.stdin.close()

    def stop(self) -> None:
        """End it politely, and after a while by force."""
        if self._process.returncode is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_WITHIN_S)
        self.kill()


def free_ports(count: int) -> list[int]:
    """Choose ports of 127.0.0.1 that nobody listens on."""
    chosen: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise RunError(f"there are no {count} free ports")
