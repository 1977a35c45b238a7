"""Bearer tokens that a Kubernetes API server confirms: TokenReview, with an audience.

    token ─► remembered? ─► plainly expired or for others? ─► under way already? ─► POST tokenreviews ─► user, groups

Invariant: nobody comes in without a confirmation that is younger than `cache_s`.  An API server that is away, too
slow or refuses us lets nobody in: that is told as our trouble (503), a token that it refuses as the caller's (401).
Only digests of tokens are remembered, so many at most; refusals are remembered shortly.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import msgspec

from kvindexer.access.errors import ForbiddenError, UnauthenticatedError, UndecidedError
from kvindexer.access.identity import Grant, Identity
from kvindexer.access.kept import Kept, Trouble
from kvindexer.errors import RequestError, SettingsError

_log = logging.getLogger(__name__)

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
REFUSED_S: Final = 10.0
"""For so long a refusal is remembered: a token that is created anew, or a role that is given, works soon."""
MAX_UNDER_WAY: Final = 32
"""Tokens that are asked about at once; a flood of made-up ones must not become one at the API server."""
_JWT_PARTS: Final = 3
_CREATED: Final = (200, 201)


class _User(msgspec.Struct):
    username: str = ""
    groups: list[str] | None = None


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User | None = None
    audiences: list[str] | None = None
    error: str = ""


class _Review(msgspec.Struct):
    status: _Status


class _Claims(msgspec.Struct):
    exp: float | None = None
    aud: list[str] | str | None = None


_read_review = msgspec.json.Decoder(_Review).decode
_read_claims = msgspec.json.Decoder(_Claims).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewSettings:
    """Where to ask, and for how long an answer is good."""

    url: str
    audience: str
    grants: Mapping[str, Grant]
    token_file: Path
    ca_file: Path
    timeout_s: float
    cache_s: float
    max_tokens: int


class _Remembered(NamedTuple):
    answer: Identity | RequestError
    until: float


class Reviews:
    """Asks, and remembers."""

    def __init__(self, settings: ReviewSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError for files that can't be used."""
        self._settings = settings
        self._clock = clock
        self._known: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[Identity]] = {}
        self._http: httpx.AsyncClient | None = None
        self._trust: ssl.SSLContext | None = None
        self.own_token = Kept("auth_kubernetes_token_file", [settings.token_file], lambda: _text(settings.token_file))
        self.authorities = Kept("auth_kubernetes_ca_file", [settings.ca_file], lambda: _trusting(settings))
        self.problem: Trouble | None = None

    def __len__(self) -> int:
        """How many tokens are remembered."""
        return len(self._known)

    def remembered(self, digest: bytes) -> Identity | None:
        """What is known of a token without asking.  Raises RequestError if it was refused a moment ago."""
        known = self._known.get(digest)
        if known is None or self._clock() >= known.until:
            return None
        if isinstance(known.answer, RequestError):
            raise known.answer.with_traceback(None)  # else it would grow with every raise
        return known.answer

    async def confirmed(self, token: bytes, digest: bytes) -> Identity:
        """Whose token this is; who comes with the same one meanwhile waits for one answer.  Raises RequestError."""
        task = self._under_way.get(digest)
        if task is None:
            lasts_s = _lasts_s(token, self._settings.audience)
            if len(self._under_way) >= MAX_UNDER_WAY:
                raise UndecidedError(f"{MAX_UNDER_WAY} tokens are being confirmed already")
            task = asyncio.create_task(self._review(token, digest, lasts_s), name="kvindexer-token-review")
            self._under_way[digest] = task
            task.add_done_callback(lambda _: self._under_way.pop(digest, None))
            task.add_done_callback(_look_at)
        return await asyncio.shield(task)

    def forget(self) -> None:
        """Ask anew about everybody."""
        self._known.clear()

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    async def _review(self, token: bytes, digest: bytes, lasts_s: float | None) -> Identity:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status = await self._ask(token)
        except UndecidedError as error:
            self._trouble(error.message, error.hint)
            raise
        except TimeoutError:
            message = f"the Kubernetes API server had no answer within {self._settings.timeout_s:g} s"
            self._trouble(message, "is it reachable (NetworkPolicy)?  setting auth_kubernetes_timeout_s")
            raise UndecidedError(message) from None
        self.problem = None
        answer: Identity | RequestError
        try:
            answer = _identity(status, self._settings)
        except RequestError as error:
            self._remember(digest, error, REFUSED_S)
            raise
        cache_s = self._settings.cache_s
        self._remember(digest, answer, cache_s if lasts_s is None else min(cache_s, lasts_s))
        return answer

    async def _ask(self, token: bytes) -> _Status:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token.decode("latin-1"), "audiences": [self._settings.audience]},
        }
        try:
            response = await self._client().post(
                self._settings.url.rstrip("/") + PATH,
                content=msgspec.json.encode(body),
                headers={"authorization": f"Bearer {self.own_token.value}", "content-type": "application/json"},
            )
        except (httpx.HTTPError, OSError) as error:
            raise UndecidedError(f"the Kubernetes API server can't be reached ({type(error).__name__})") from None
        match response.status_code:
            case status if status in _CREATED:
                pass
            case 401:
                raise UndecidedError(
                    "the Kubernetes API server refuses our own token", "see auth_kubernetes_token_file"
                )
            case 403:
                raise UndecidedError(
                    "we may not ask the Kubernetes API server about tokens",
                    "its service account needs `create` on tokenreviews.authentication.k8s.io",
                )
            case status:
                raise UndecidedError(f"the Kubernetes API server answered {status}")
        try:
            return _read_review(response.content).status
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise UndecidedError("the Kubernetes API server's answer is no TokenReview") from None

    def _client(self) -> httpx.AsyncClient:
        """Of the present authorities, and our present token."""
        self.own_token.look()
        self.authorities.look()
        if self._http is None or self._trust is not self.authorities.value:
            self._trust = self.authorities.value
            # one that was there before ends with its last answer
            self._http = httpx.AsyncClient(verify=self._trust, trust_env=False, timeout=self._settings.timeout_s)
        return self._http

    def _remember(self, digest: bytes, answer: Identity | RequestError, for_s: float) -> None:
        self._known.pop(digest, None)
        self._known[digest] = _Remembered(answer, self._clock() + for_s)
        if len(self._known) > self._settings.max_tokens:
            self._known.popitem(last=False)

    def _trouble(self, message: str, hint: str) -> None:
        if self.problem is None or self.problem.message != message:
            _log.error("%s; %s.  Nobody new is let in meanwhile", message, hint)
        self.problem = Trouble("token_review_failed", message, hint)


def _identity(status: _Status, settings: ReviewSettings) -> Identity:
    """Whom a review has confirmed, and what that allows.  Raises RequestError."""
    if not status.authenticated or status.user is None or not status.user.username:
        raise UnauthenticatedError(
            "Kubernetes does not accept the token", "it may have expired, or its pod or service account is gone"
        )
    if settings.audience not in (status.audiences or ()):
        raise _for_others(settings.audience)
    user = status.user.username
    return Identity(user, granted(user, status.user.groups or (), settings.grants))


def granted(user: str, groups: Collection[str], grants: Mapping[str, Grant]) -> Grant:
    """What a user may do: what is said of him, or of all of his groups together.  Raises ForbiddenError."""
    if user in grants:
        return grants[user]
    found = [grants[group] for group in dict.fromkeys(groups) if group in grants]
    if not found:
        raise ForbiddenError("no_role", f"{user[:200]} has no role here", "give it one in auth_kubernetes_roles")
    first = found[0]
    if any((grant.tenant, grant.cache_salt) != (first.tenant, first.cache_salt) for grant in found):
        raise ForbiddenError(
            "no_role",
            f"the groups of {user[:200]} belong to several tenants",
            "give the user its own entry in auth_kubernetes_roles",
        )
    roles = frozenset(role for grant in found for role in grant.roles)
    return Grant(roles, first.tenant, first.cache_salt)


def _lasts_s(token: bytes, audience: str) -> float | None:
    """How long a token says that it is good for; None: it says nothing.  Raises UnauthenticatedError.

    What it says is not proved, so it can only lead to a refusal.
    """
    parts = token.split(b".")
    if len(parts) != _JWT_PARTS:
        return None
    try:
        claims = _read_claims(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    named = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    if named is not None and audience not in named:
        raise _for_others(audience)
    if claims.exp is None:
        return None
    lasts_s = claims.exp - time.time()
    if lasts_s <= 0:
        raise UnauthenticatedError("the token has expired", "ask for a new one, or let the kubelet renew it")
    return lasts_s


def _for_others(audience: str) -> UnauthenticatedError:
    return UnauthenticatedError(
        "the token is for another audience", f"ask for one whose audience is {audience} (a projected volume can)"
    )


def _look_at(task: asyncio.Task[Any]) -> None:
    """Of a task whose callers have all gone nobody would take the exception."""
    if not task.cancelled():
        task.exception()


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        expected = f"a readable file with a token ({getattr(error, 'strerror', None) or 'no text'})"
        raise SettingsError("auth_kubernetes_token_file", str(path), expected) from None
    if not text or not text.isprintable():
        raise SettingsError("auth_kubernetes_token_file", str(path), "a file with one token")
    return text


def _trusting(settings: ReviewSettings) -> ssl.SSLContext:
    """Whom to believe that it is the API server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.url.startswith("https://"):
        try:
            context.load_verify_locations(settings.ca_file)
        except (OSError, ssl.SSLError) as error:
            expected = f"a readable PEM file of certificates ({getattr(error, 'strerror', None) or 'no PEM'})"
            raise SettingsError("auth_kubernetes_ca_file", str(settings.ca_file), expected) from None
    return context
