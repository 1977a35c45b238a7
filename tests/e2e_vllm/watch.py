"""Takes down how a source looks to a client of kvindexer, and since when its publisher can be reached."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Final, NamedTuple, Self

from e2e_vllm.processes import RunError
from e2e_vllm.servers import Indexer, Vllm

EVERY_S: Final = 0.02
GONE_WITHIN_S: Final = 15.0


class Seen(NamedTuple):
    """A source from a moment on."""

    at: float
    state: str
    sound: bool
    complete: bool
    epoch: int
    why: str
    blocks: int

    @property
    def good(self) -> bool:
        """Whether it is called live, sound and complete."""
        return self.state == "live" and self.sound and self.complete


class Watch:
    """Looks at a source all the time while entered."""

    def __init__(self, indexer: Indexer, server: Vllm) -> None:
        self._indexer = indexer
        self._server = server
        self._stopping = threading.Event()
        self._restarted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._error: BaseException | None = None
        self.reachable_at: float | None = None
        self.seen: list[Seen] = []

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30.0)

    def wait_unreachable(self) -> None:
        """Wait until nobody listens on the publisher's port any more; a killed process takes a moment to go."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while self._reachable():
            if time.monotonic() > deadline:
                raise RunError(f"{self._server.name} can still be reached {GONE_WITHIN_S:g} s after kill -9")
            time.sleep(EVERY_S)

    def restarted(self) -> None:
        """From here on the publisher is waited for."""
        self._restarted.set()

    def wait_recovered(self, epoch: int, limit_s: float) -> float:
        """Wait for a later epoch in good order; returns the moment."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for seen in list(self.seen):
                if seen.epoch > epoch and seen.good:
                    return seen.at
            if self._error is not None:
                raise RunError("the watch has ended") from self._error
            self._server.process.check()
            time.sleep(EVERY_S)
        raise RunError(f"{self._server.instance} did not recover in {limit_s:g} s: {self.seen[-1]}")

    def _run(self) -> None:
        try:
            while not self._stopping.wait(EVERY_S):
                if self.reachable_at is None and self._restarted.is_set() and self._reachable():
                    self.reachable_at = time.monotonic()
                self.look()
        except Exception as error:  # noqa: BLE001 - shown by wait_recovered
            self._error = error

    def _reachable(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._server.events_port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def look(self) -> None:
        """Look once."""
        source: dict[str, Any] = self._indexer.source(self._server.instance)
        now = Seen(
            time.monotonic(),
            source["state"],
            source["sound"],
            source["complete"],
            source["epoch"],
            source["why"],
            source["blocks"]["gpu"],
        )
        if not self.seen or now[1:6] != self.seen[-1][1:6]:
            self.seen.append(now)
