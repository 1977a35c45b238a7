"""The methods that both clients have: each route of `client.calls`, sent by the client that it is called on.

Called on a Client a method returns the answer, on an AsyncClient a coroutine of it; on neither, the call itself.
`changes` returns an iterator or an asynchronous iterator.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from kvindexer.client import calls
from kvindexer.client.calls import Call
from kvindexer.client.changes import Change
from kvindexer.client.following import AsyncChanges, Changes

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")


class Sender(Protocol):
    """Sends a call and waits."""

    def send(self, call: Call[U], /) -> U:
        """Send it."""


class AsyncSender(Protocol):
    """Sends a call."""

    def send(self, call: Call[U], /) -> Coroutine[Any, Any, U]:
        """Send it."""


class _Route:
    """A function that makes a call, looked up on a client."""

    _how = "send"
    """The client's method that takes the call."""

    def __init__(self, make: Callable[..., Call[Any]]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __get__(self, client: Any, owner: type) -> Callable[..., Any]:
        """Bind it."""
        if client is None:
            return self._make
        make, take = self._make, getattr(client, self._how)

        @wraps(make)
        def method(*args: Any, **kwargs: Any) -> Any:
            return take(make(*args, **kwargs))

        return method


class Method(_Route, Generic[P, T]):
    """A route as a method."""

    def __init__(self, make: Callable[P, Call[T]]) -> None:
        super().__init__(make)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Call[T]]: ...
    @overload
    def __get__(self, client: Sender, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncSender, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Callable[..., Any]:
        """Bind it."""
        return super().__get__(client, owner)


class Follower(Protocol):
    """Follows a stream."""

    def follow(self, call: Call[Change], /) -> Changes:
        """Follow it."""


class AsyncFollower(Protocol):
    """Follows a stream."""

    def follow(self, call: Call[Change], /) -> AsyncChanges:
        """Follow it."""


class Followed(_Route, Generic[P]):
    """A stream as a method."""

    _how = "follow"

    def __init__(self, make: Callable[P, Call[Change]]) -> None:
        super().__init__(make)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Call[Change]]: ...
    @overload
    def __get__(self, client: Follower, owner: type) -> Callable[P, Changes]: ...
    @overload
    def __get__(self, client: AsyncFollower, owner: type) -> Callable[P, AsyncChanges]: ...
    def __get__(self, client: Any, owner: type) -> Callable[..., Any]:
        """Bind it."""
        return super().__get__(client, owner)


class Methods:
    """What a client can do."""

    match = Method(calls.match)
    match_batch = Method(calls.match_batch)
    explain = Method(calls.explain)
    keys = Method(calls.keys)
    routed = Method(calls.routed)
    feedback = Method(calls.feedback)
    locate = Method(calls.locate)
    offload_plan = Method(calls.offload_plan)
    changes = Followed(calls.changes)
    tiers = Method(calls.tiers)
    heat_prefixes = Method(calls.heat_prefixes)
    heat_single = Method(calls.heat_single)
    heat_prewarm = Method(calls.heat_prewarm)
    sources = Method(calls.sources)
    health = Method(calls.health)
    ready = Method(calls.ready)
    register = Method(calls.register)
    unregister = Method(calls.unregister)
