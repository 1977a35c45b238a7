"""Every request passes a door: whose is it, may it come in here, and does this caller ask too often.

    headers, certificate ─► Guard ─► Identity ─► Door of the path (`access.doors`) ─► Rates ─► inside

What is refused here is refused before its body is looked at.  Nothing that was presented is logged or sent back.
"""

from __future__ import annotations

from collections.abc import Awaitable
from math import ceil
from time import monotonic
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from kvindexer.access.doors import DOORS, Door
from kvindexer.access.errors import ForbiddenError, UnauthenticatedError, UndecidedError
from kvindexer.access.guard import Guard
from kvindexer.access.identity import ANONYMOUS, Grant, Identity, enter
from kvindexer.access.rates import Rates, network_of
from kvindexer.api.body import read_off
from kvindexer.api.errors import CLOSE, RefusedError
from kvindexer.api.limits import PROBES, RETRY_AFTER_S
from kvindexer.errors import RequestError

CERTIFICATE: Final = "kvindexer.certificate"
"""Key in the scope: what TLS knows of the client's certificate (`api.connection`)."""

_CHALLENGE: Final = (b"www-authenticate", b'Bearer realm="kvindexer"')
_WRONG: Final = (b"www-authenticate", b'Bearer realm="kvindexer", error="invalid_token"')


class Doors:
    """Middleware; without a guard everybody may do everything, without rates as often as he likes."""

    def __init__(
        self, app: ASGIApp, guard: Guard | None, rates: Rates | None, *, max_body_bytes: int, receive_timeout_s: float
    ) -> None:
        self._app = app
        self._guard = guard
        self._rates = rates
        self._max_body_bytes = max_body_bytes
        self._receive_timeout_s = receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or raise RequestError."""
        if scope["type"] != "http":
            raise RuntimeError("only HTTP has doors")
        try:
            identified = self._pass(scope)
            if identified is not None:
                await identified
        except RequestError:
            await read_off(scope, receive, self._max_body_bytes, self._receive_timeout_s)
            raise
        await self._app(scope, receive, send)

    def _pass(self, scope: Scope) -> Awaitable[None] | None:
        """Look at the request; awaitable if somebody has to be asked who it is from.  Raises RequestError."""
        path = scope["path"]
        if self._guard is None:
            self._count(path, scope, None)
            return None
        door = DOORS.get(path)
        if door is not None and door.role is None:
            enter(self._guard.glance(_authorization(scope), scope.get(CERTIFICATE)))
            return None
        try:
            found = self._guard.identify(_authorization(scope), scope.get(CERTIFICATE))
        except RequestError as error:
            raise self._unidentified(path, scope, error) from None
        if not isinstance(found, Identity):
            return self._pass_later(found, path, scope)
        self._pass_as(found, path, scope)
        return None

    async def _pass_later(self, found: Awaitable[Identity], path: str, scope: Scope) -> None:
        try:
            identity = await found
        except RequestError as error:
            raise self._unidentified(path, scope, error) from None
        self._pass_as(identity, path, scope)

    def _pass_as(self, identity: Identity, path: str, scope: Scope) -> None:
        enter(identity)
        if self._rates is not None:
            self._count(path, scope, identity)
        _open(DOORS.get(path), identity)

    def _unidentified(self, path: str, scope: Scope, error: RequestError) -> RefusedError:
        """What is said to somebody who is not known; guessing costs as much as asking.  Raises RefusedError."""
        enter(ANONYMOUS)  # asyncio may have handed the context of an earlier request down to this one
        self._count(path, scope, None)
        return _refused(error)

    def _count(self, path: str, scope: Scope, identity: Identity | None) -> None:
        if self._rates is None or path in PROBES:
            return
        client = scope.get("client")
        name = f"= {identity.name}" if identity is not None else network_of(client[0]) if client else ""
        wait_s = self._rates.take(name, monotonic())
        if wait_s:
            raise RefusedError(
                RequestError(
                    "too_many_requests",
                    "this caller asks more often than it may",
                    "ask less often, or raise max_requests_per_s",
                    status=429,
                ),
                (b"retry-after", b"%d" % ceil(wait_s)),
                CLOSE,
            )


def _authorization(scope: Scope) -> bytes | None:
    found: bytes | None = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            if found is not None:  # a proxy may have looked at the other one
                raise _refused(UnauthenticatedError("there are several Authorization headers", "send one"))
            found = value
    return found


def _open(door: Door | None, identity: Identity) -> None:
    """Raise RequestError if this door is shut to the caller."""
    if door is None:
        raise RefusedError(RequestError("not_found", "no such route", "see /docs for the routes", status=404), CLOSE)
    grant = identity.grant
    if door.role not in grant.roles and not grant.may(door.role):
        has = ", ".join(sorted(grant.roles)) or "none"
        raise _refused(ForbiddenError("no_role", f"this needs the role {door.role}", f"the caller's roles: {has}"))
    if door.shows != "own" and _shuts(door, grant):
        raise _refused(
            ForbiddenError(
                "not_scoped",
                f"the answers of this route show blocks of {door.shows}",
                "it needs a caller that is not bound to one",
            )
        )


def _shuts(door: Door, grant: Grant) -> bool:
    return grant.cache_salt is not None or (door.shows == "every tenant" and grant.tenant is not None)


def _refused(error: RequestError) -> RefusedError:
    headers: list[tuple[bytes, bytes]] = [CLOSE]
    if isinstance(error, UnauthenticatedError):
        headers.append(_WRONG if error.presented else _CHALLENGE)
    elif isinstance(error, UndecidedError):
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    return RefusedError(error, *headers)
