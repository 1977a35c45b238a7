"""What can go wrong when the service is asked; each error has `code`, `message` and `hint`.

ClientError
├── UnreachableError         nothing listens there, or the connection broke
├── TimedOutError            no whole answer in `timeout_s`
├── BadAnswerError           an answer that is none of kvindexer's, or one that is too large
└── RefusedError             the service said no: `status`, and its own code, message and hint
    ├── InvalidRequestError      400, 409, 413, 422 and the like: asking again is of no use
    ├── NotFoundError            404: no such model, instance or source
    └── UnavailableError         5xx: not now

No error holds a piece of a request: prompts stay where they are.
"""

from __future__ import annotations

from kvindexer.errors import KvIndexerError


class ClientError(KvIndexerError):
    """Base of the client's errors."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        self.code = code
        self.message = message
        self.hint = hint
        super().__init__(f"{message} ({code})" + (f"; {hint}" if hint else ""))


class UnreachableError(ClientError):
    """No connection."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__("unreachable", f"no answer from {url}: {why}", "is the service running there?")


class TimedOutError(ClientError):
    """No whole answer in time."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__("timed_out", f"no answer from {url} in {timeout_s:g} s", "try again, or raise timeout_s")


class BadAnswerError(ClientError):
    """Something answered that is not this service, or another version of it."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__("bad_answer", f"{url}: {why}", "is this kvindexer, in a version that fits?")


class RefusedError(ClientError):
    """The service has understood, and does not do it."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        self.status = status
        super().__init__(code, message, hint)


class InvalidRequestError(RefusedError):
    """The request can't be met as it is."""


class NotFoundError(RefusedError):
    """What it is about is not there."""


class UnavailableError(RefusedError):
    """It could be met at another time."""
