"""Who is at the door: from a request's credentials to an identity.

    Authorization: Bearer ─► a token of the file ─► else one that Kubernetes confirms ─► else 401
    no header             ─► the name in the client's certificate, if it has one     ─► else 401

Credentials that are presented count: a wrong token is refused, whatever certificate comes with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from kvindexer.access import certificates
from kvindexer.access.errors import ForbiddenError, UnauthenticatedError
from kvindexer.access.identity import ANONYMOUS, Grant, Identity
from kvindexer.access.kept import Kept, Trouble
from kvindexer.access.reviews import Reviews, ReviewSettings
from kvindexer.access.tokens import LONGEST, Tokens, digest_of, look_up, read_tokens
from kvindexer.errors import SettingsError
from kvindexer.settings import Settings

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between looks at files that may have changed."""
_BEARER: Final = b"bearer "


class Reread(Protocol):
    """Something that is read again when it changes."""

    problem: Trouble | None

    def look(self) -> None:
        """Read it again if it has changed."""

    def reload(self) -> None:
        """Read it again.  Raises SettingsError if it is not usable."""


class Guard:
    """All ways in of a service."""

    def __init__(
        self,
        tokens: Kept[Tokens] | None = None,
        reviews: Reviews | None = None,
        grants: Mapping[str, Grant] | None = None,
    ) -> None:
        self._tokens = tokens
        self._reviews = reviews
        self._grants = grants or {}
        bearer = [
            *(["a token of the tokens file"] if tokens is not None else []),
            *(["a Kubernetes token"] if reviews is not None else []),
        ]
        self._ways = " or ".join([*bearer, *(["a client certificate"] if self._grants else [])])
        self._bearer = bool(bearer)

    def identify(
        self, authorization: bytes | None, certificate: Mapping[str, Any] | None
    ) -> Identity | Awaitable[Identity]:
        """Who presents these; awaitable if Kubernetes has to be asked.  Raises RequestError."""
        if authorization is None:
            if certificate and self._grants:
                return certificates.identity_of(certificates.names_in(certificate), self._grants)
            raise UnauthenticatedError("who is asking?", f"present {self._ways}", presented=False)
        token, digest = self._token(authorization)
        known = self._known(digest)
        if known is not None:
            return known
        if self._reviews is None:
            raise self._unknown()
        return self._reviews.confirmed(token, digest)

    def glance(self, authorization: bytes | None, certificate: Mapping[str, Any] | None) -> Identity:
        """Who presents these, as far as that is known without asking anybody; else nobody in particular."""
        try:
            if authorization is None:
                return certificates.identity_of(certificates.names_in(certificate), self._grants)
            return self._known(self._token(authorization)[1]) or ANONYMOUS
        except (UnauthenticatedError, ForbiddenError):
            return ANONYMOUS

    def _known(self, digest: bytes) -> Identity | None:
        if self._tokens is not None:
            known = look_up(self._tokens.value, digest, time.time())
            if known is not None:
                return known
        return None if self._reviews is None else self._reviews.remembered(digest)

    def _token(self, authorization: bytes) -> tuple[bytes, bytes]:
        if not self._bearer or authorization[: len(_BEARER)].lower() != _BEARER:
            raise UnauthenticatedError("the Authorization header is of no kind that we know", f"present {self._ways}")
        token = authorization[len(_BEARER) :].strip()
        if len(token) > LONGEST:
            raise self._unknown()
        return token, digest_of(token)

    def _unknown(self) -> UnauthenticatedError:
        return UnauthenticatedError("the token is not known", f"present {self._ways}")

    # Files that change

    def rereads(self) -> list[Reread]:
        """Everything that is read again when it changes."""
        found: list[Reread] = [] if self._tokens is None else [self._tokens]
        return found if self._reviews is None else [*found, self._reviews.own_token, self._reviews.authorities]

    def forget(self) -> None:
        """Ask anew about everybody."""
        if self._reviews is not None:
            self._reviews.forget()

    def problems(self) -> list[Trouble]:
        """What is not as it should be; those who were let in before still are."""
        found = [each.problem for each in self.rereads()]
        if self._reviews is not None:
            found.append(self._reviews.problem)
        return [problem for problem in found if problem is not None]

    async def close(self) -> None:
        """Ask nobody any more."""
        if self._reviews is not None:
            await self._reviews.close()


def open_guard(settings: Settings, environ: Mapping[str, str] = os.environ) -> Guard | None:
    """The guard that the settings ask for; None: everybody may do everything.  Raises SettingsError."""
    if not settings.closed:
        return None
    path = settings.auth_tokens_file
    tokens = None if path is None else Kept("auth_tokens_file", [path], lambda: read_tokens(path), secret=[path])
    reviews = Reviews(_review_settings(settings, environ)) if settings.auth_kubernetes_audience else None
    return Guard(tokens, reviews, settings.auth_certificates)


def _review_settings(settings: Settings, environ: Mapping[str, str]) -> ReviewSettings:
    url = settings.auth_kubernetes_api
    if not url:
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise SettingsError("auth_kubernetes_api", url, "an address: this is no pod of Kubernetes, which has one")
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return ReviewSettings(
        url=url,
        audience=settings.auth_kubernetes_audience,
        grants=settings.auth_kubernetes_roles,
        token_file=settings.auth_kubernetes_token_file,
        ca_file=settings.auth_kubernetes_ca_file,
        timeout_s=settings.auth_kubernetes_timeout_s,
        cache_s=settings.auth_kubernetes_cache_s,
        max_tokens=settings.auth_kubernetes_cache_tokens,
    )


def reload_all(rereads: Sequence[Reread]) -> None:
    """Read all of them again.  Raises the SettingsError of the first that is not usable, when all were tried."""
    first: SettingsError | None = None
    for each in rereads:
        try:
            each.reload()
        except SettingsError as error:
            first = first or error
    if first is not None:
        raise first


async def watch(rereads: Sequence[Reread], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Look at files that may have changed, until cancelled."""
    while True:
        await sleep(LOOK_S)
        for each in rereads:
            try:
                each.look()
            except Exception:  # noqa: BLE001 - the others must go on being looked at; it is logged
                _log.exception("a file could not be read again")
