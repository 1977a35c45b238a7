"""Giving way: what can wait asks first whether anybody has just come to ask something.

Everything runs on one event loop, and a request takes more than one turn of it: its bytes are read at the end of one,
it is answered in the next.  Work that is cut into pieces of a fraction of a millisecond, but goes on in every turn,
would hold it up by several of them.

    turn     n            n + 1             n + 2
    work     a piece      gives way         the next piece
    query    is read      is answered       (has its answer)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 0.002
"""What gives way to requests that never end goes on all the same."""


class Lull:
    """Turns of one event loop in which no request is on its way."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._arrivals = 0
        self._queue = asyncio.Lock()
        """Several that wait get a turn each: what they do would add up otherwise."""

    def disturb(self) -> None:
        """Bytes of a request are here."""
        self._arrivals += 1

    async def wait(self) -> float:
        """Go on in a turn of its own, before which nothing has arrived for a whole turn; or when patience ends.

        Returns for how many seconds others had the loop: whoever must keep up does more at once where that is long.
        """
        async with self._queue:
            before, since = self._arrivals, self._clock()
            await asyncio.sleep(0)
            while self._arrivals != before and self._clock() - since < self._patience_s:
                before = self._arrivals
                await asyncio.sleep(0)
            return self._clock() - since
