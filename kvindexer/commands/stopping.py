"""Ends of a command: a signal, or the death of the process that started it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from types import FrameType

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """While entered, signals don't interrupt: they end `wait`, at once and for good.

    A SimpleQueue, because its `put` may interrupt its own `get`: an Event set by a handler could find its lock held.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signals: SimpleQueue[int] = SimpleQueue()
        self._deadline: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, seconds: float | None) -> None:
        """End that long from now, too; None: only when told to."""
        self._deadline = None if seconds is None else monotonic() + seconds

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until the time is over or it is time to stop; returns whether it is."""
        left_s = None if self._deadline is None else max(0.0, self._deadline - monotonic())
        longest = min((span for span in (timeout_s, left_s) if span is not None), default=None)
        if not self.requested:
            try:
                self._signals.get(timeout=longest)
            except Empty:
                self.requested = left_s is not None and longest == left_s
        return self.requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is given
        self.requested = True
        self._signals.put(number)


def exit_with_stdin() -> None:
    """Send ourselves SIGINT when standard input ends, so that no child outlives a parent that was killed."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="standard input", daemon=True).start()
