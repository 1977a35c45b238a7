"""What one request did, counted while it is answered, for the line and the span that tell of it.

A request is answered in a task of its own, so its `Work` hangs on the task's context: whoever counts a query finds it
without being handed it, and what other requests do meanwhile is theirs.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

RECEIVED_AT: Final = "kvindexer.received_at"
"""Key in an ASGI scope: when the body was complete."""
TRACE: Final = "kvindexer.trace"
"""Key in an ASGI scope: the id of the trace that shows the request, if there is one."""


class Work:
    """Figures of one request."""

    __slots__ = ("hit_tokens", "prompts", "route", "tokens")

    def __init__(self) -> None:
        self.route = "other"
        """One of our paths, when it has been answered."""
        self.prompts = 0
        """Prompts that were looked up."""
        self.tokens = 0
        """Their tokens."""
        self.hit_tokens = 0
        """Tokens of them that the best instance holds."""


_WORK: ContextVar[Work | None] = ContextVar("kvindexer_work", default=None)

present = _WORK.get
"""The work of the request that is being answered; None outside of one."""


def begin() -> Work:
    """A request begins."""
    work = Work()
    _WORK.set(work)
    return work
