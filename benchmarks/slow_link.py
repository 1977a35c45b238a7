"""A network that can be made slow, in a process of its own: here it would slow down the client that measures.

The child is `python -m benchmarks.slow_link <port>`; it prints the port on which it listens, and takes one delay a
line, in seconds for each direction.  It answers each by a line, when it holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from benchmarks.redis import give_way
from kvindexer.testing.proxy import FaultProxy, LinkFaults

if TYPE_CHECKING:
    from collections.abc import Iterator


class SlowLink:
    """A way to a local port."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "benchmarks.slow_link", str(port)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.port = int(self._read())

    def _read(self) -> str:
        line = self._child.stdout.readline() if self._child.stdout else ""
        if not line:
            raise RuntimeError("the slow link has died")
        return line

    def _tell(self, delay_s: float) -> None:
        if self._child.stdin:
            self._child.stdin.write(f"{delay_s}\n")
        self._read()

    @contextmanager
    def slow(self, delay_s: float) -> Iterator[None]:
        """Delay everything by so many seconds in each direction."""
        self._tell(delay_s)
        yield
        self._tell(0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()


def main() -> None:
    """Be the link, one that takes no core away from the service."""
    with FaultProxy("127.0.0.1", int(sys.argv[1])) as proxy:
        give_way(os.getpid())
        print(proxy.port, flush=True)
        for line in sys.stdin:
            proxy.faults = LinkFaults(latency_s=float(line))
            print(flush=True)


if __name__ == "__main__":
    main()
