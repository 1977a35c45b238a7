"""`kvindexer serve` as a process of the tests, on a port that it keeps when it is started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

HOST = "127.0.0.1"


class Served:
    """A service that can be ended and started again; it ends with the tests, too."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        self.port = 0
        self._arguments = ("--set", f"replica={name}", *arguments)
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What it has said so far, in all its lives."""
        return self._log.read_text() if self._log.exists() else ""

    def start(self) -> None:
        """Start it, and wait until it listens."""
        said = len(self.log)
        command = [sys.executable, "-m", "kvindexer", "serve", "--exit-with-stdin", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*command, *self._arguments], stdin=subprocess.PIPE, stderr=log)
        while not (address := self.log[said:].partition(f"serving on http://{HOST}:")[2].partition(" ")[0]):
            assert self._process.poll() is None, self.log[said:]
            time.sleep(0.01)
        self.port = int(address)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process is not None and self._process.poll() is None

    def tell(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.tell(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        assert self._process is not None
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)
