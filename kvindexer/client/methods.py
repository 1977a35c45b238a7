"""The methods that both clients have: each route of `client.calls`, sent by the client that it is called on.

Called on a Client a method returns the answer, on an AsyncClient a coroutine of it; on neither, the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from kvindexer.client import calls
from kvindexer.client.calls import Call

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


class Method(Generic[P, T]):
    """A route as a method."""

    def __init__(self, make: Callable[P, Call[T]]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Call[T]]: ...
    @overload
    def __get__(self, client: Sender, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncSender, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Callable[P, Any]:
        """Bind it."""
        if client is None:
            return self._make
        make, send = self._make, client.send

        @wraps(make)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return send(make(*args, **kwargs))

        return method


class Methods:
    """What a client can do."""

    match = Method(calls.match)
    match_batch = Method(calls.match_batch)
    keys = Method(calls.keys)
    routed = Method(calls.routed)
    feedback = Method(calls.feedback)
    locate = Method(calls.locate)
    offload_plan = Method(calls.offload_plan)
    heat_prefixes = Method(calls.heat_prefixes)
    heat_single = Method(calls.heat_single)
    heat_prewarm = Method(calls.heat_prewarm)
    sources = Method(calls.sources)
    ready = Method(calls.ready)
    register = Method(calls.register)
    unregister = Method(calls.unregister)
