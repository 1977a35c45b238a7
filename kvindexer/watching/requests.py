"""The one line of a request, written when it is answered: always if that was slow or went wrong, otherwise if asked.

    request method=POST route=/v1/match status=200 duration_ms=1.204 prompts=1 tokens=2048 hit_tokens=1536

Lines about problems are bounded: a service that is overloaded should not drown in them.  How many were left out
stands in the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Final

from kvindexer.settings.watching import Watching
from kvindexer.watching.logs import tell
from kvindexer.watching.work import Work

MAX_PROBLEMS_PER_S: Final = 10
STREAMS: Final = frozenset({"/v1/changes"})
"""Answers that last as long as somebody listens; no time is too long for them."""
FAULT: Final = 500

_log = logging.getLogger(__name__)


class RequestLog:
    """Writes the lines."""

    def __init__(self, settings: Watching, clock: Callable[[], float] = monotonic) -> None:
        self._slow_s = settings.slow_request_s
        self._ordinary = logging.INFO if settings.log_requests == "all" else logging.DEBUG
        self._clock = clock
        self._second = 0.0
        self._in_second = 0
        self._left_out = 0

    def answered(
        self, method: str, status: int, seconds: float | None, *, work: Work, caller: str | None, trace: str | None
    ) -> None:
        """A request was answered.  `seconds`: None if its body was never complete."""
        slow = seconds is not None and seconds >= self._slow_s and work.route not in STREAMS
        level = logging.WARNING if slow or status >= FAULT else self._ordinary
        if not _log.isEnabledFor(level) or (level == logging.WARNING and not self._may_write()):
            return
        tell(
            _log,
            level,
            "request",
            method=method,
            route=work.route,
            status=status,
            duration_ms=None if seconds is None else round(1000 * seconds, 3),
            slow=slow or None,
            prompts=work.prompts or None,
            tokens=work.tokens if work.prompts else None,
            hit_tokens=work.hit_tokens if work.prompts else None,
            caller=caller,
            trace=trace,
            left_out=self._take_left_out() if level == logging.WARNING else None,
        )

    def _may_write(self) -> bool:
        now = self._clock()
        if now - self._second >= 1:
            self._second, self._in_second = now, 0
        self._in_second += 1
        if self._in_second > MAX_PROBLEMS_PER_S:
            self._left_out += 1
            return False
        return True

    def _take_left_out(self) -> int | None:
        left_out, self._left_out = self._left_out, 0
        return left_out or None
