"""What one request did, counted while it is answered, for the line and the span that tell of it.

A request is answered in a task of its own, so its `Work` hangs on the task's context: whoever counts a query finds it
without being handed it, and what other requests do meanwhile is theirs.
"""

from __future__ import annotations

from contextvars import ContextVar


class Work:
    """Figures of one request."""

    __slots__ = ("hit_tokens", "prompts", "tokens", "trace")

    def __init__(self) -> None:
        self.prompts = 0
        """Prompts that were looked up."""
        self.tokens = 0
        """Their tokens."""
        self.hit_tokens = 0
        """Tokens of them that the best instance holds."""
        self.trace = ""
        """The trace that shows the request, if there is one."""


_WORK: ContextVar[Work | None] = ContextVar("kvindexer_work", default=None)

present = _WORK.get
"""The work of the request that is being answered; None outside of one."""


def begin() -> Work:
    """A request begins."""
    work = Work()
    _WORK.set(work)
    return work
