"""Child processes of the demo, ended when the demo ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import Final, Self

from kvindexer.commands.failure import CommandError

STOP_WITHIN_S: Final = 10.0
TAIL_BYTES: Final = 2000


def kvindexer(*arguments: str) -> tuple[str, ...]:
    """Return the command line of this very program that ends when its standard input does."""
    command, *others = arguments
    return (sys.executable, "-m", "kvindexer", command, "--exit-with-stdin", *others)


class Child:
    """One command as a process, in a session of its own so that a Ctrl-C reaches the demo alone.

    Its standard input is a pipe that nobody writes to: it closes when the demo dies, even by SIGKILL.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._output = TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - programs of our choice
            self._command,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it and forget what it said."""
        self.stop()
        self._output.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def check(self) -> None:
        """Raise CommandError if the process has ended, with its last words."""
        if (code := self._process.poll()) is not None:
            self._output.seek(max(0, self._output.seek(0, 2) - TAIL_BYTES))
            words = self._output.read().decode(errors="replace").strip()
            raise CommandError(f"{self.name} ended with exit code {code}", words.replace("\n", "\n  "))

    def revive(self) -> None:
        """Start it again if it has ended."""
        if self._process.poll() is not None:
            self.stop()
            self._process = self._start()

    def stop(self) -> None:
        """End it: politely, and after a while by force.  SIGINT, for SIGTERM has a service take leave of others."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
