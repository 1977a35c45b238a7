"""A list of objects that an API server keeps, as we need it: read it, then hear of its changes.

    list()            all objects, and the version of the list
    watch(version)    what has changed since, until the server ends it, which it does from time to time

Invariant: whatever goes wrong comes out as a `ClusterError`, whose reason is one of these words.

    ended          the watch is over, as they all are some day; go on from the last version
    cut            the connection broke; go on from the last version
    expired        the version is too old (410); read the list anew
    unreachable, timeout, tls                  no answer
    unauthorized, forbidden, not_found, bad_request, refused, server_error    an answer: 401, 403, 404, 400, 4xx, 5xx
    credentials    the token or a certificate can't be read
    unreadable     an answer that is none of an API server
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from kvindexer.errors import KvIndexerError
from kvindexer.events.discovery.pods import Metadata


class Kept(Protocol):
    """An object of an API server."""

    @property
    def metadata(self) -> Metadata:
        """Who it is, and which version of it."""


Object = TypeVar("Object", bound=Kept)

Reason = Literal[
    "ended", "cut", "expired", "unreachable", "timeout", "tls", "unauthorized", "forbidden", "not_found",
    "bad_request", "refused", "server_error", "credentials", "unreadable",
]  # fmt: skip


class ClusterError(KvIndexerError):
    """The API server could not be asked, or refused; `reason` is one of the words above."""

    def __init__(self, reason: Reason, message: str, hint: str = "") -> None:
        self.reason: Reason = reason
        self.message = message
        self.hint = hint
        super().__init__(f"{reason}: {message}")


class Listed(NamedTuple, Generic[Object]):
    """A list as it was."""

    objects: Sequence[Object]
    version: str


class Event(NamedTuple, Generic[Object]):
    """A change, or (BOOKMARK) only a version that a later watch can begin at."""

    kind: str
    object: Object


class Collection(Protocol[Object]):
    """One list of an API server."""

    async def list(self) -> Listed[Object]:
        """All objects.  Raises ClusterError."""

    def watch(self, version: str) -> AsyncIterator[Event[Object]]:
        """What has changed since.  Raises ClusterError, at the end too."""
