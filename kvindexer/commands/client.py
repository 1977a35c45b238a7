"""A small HTTP client for the commands: JSON in and out, finite waits, errors as sentences.

It never uses a proxy: the service is spoken to directly.
"""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

from kvindexer.commands.failure import CommandError
from kvindexer.errors import without_user

if TYPE_CHECKING:
    from argparse import Namespace

WAY_IN: Final = ("token_file", "ca_file", "cert_file", "key_file")
"""The options that `way_in` reads."""
TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
_PIECE_BYTES: Final = 64 * 1024


class UnreachableError(CommandError):
    """Nothing answers there."""


class UntrustedError(UnreachableError):
    """Somebody answers there whose certificate proves nothing to us; asking again is of no use."""


class _NoRedirect(HTTPRedirectHandler):
    """The service sends nobody elsewhere, and a token is meant for it alone."""

    def redirect_request(self, *_: object) -> None:
        return None


def _opener(tls: ssl.SSLContext | None) -> OpenerDirector:
    handlers = [HTTPSHandler(context=tls)] if tls is not None else []
    return build_opener(ProxyHandler({}), _NoRedirect(), *handlers)


@dataclass(frozen=True)
class WayIn:
    """What a service that is not open to everybody wants to see, and how it proves who it is."""

    token: str = field(default="", repr=False)
    opener: OpenerDirector = field(default_factory=lambda: _opener(None), repr=False)


OPEN: Final = WayIn()
"""To a service that asks nobody."""


class Answer(NamedTuple):
    """What came back, whatever the status."""

    status: int
    body: bytes


def way_in(options: Namespace) -> WayIn:
    """Read the files that the flags name.  Raises CommandError."""
    tls = None
    if options.ca_file or options.cert_file:
        try:
            tls = ssl.create_default_context(cafile=options.ca_file)
            if options.cert_file:
                tls.load_cert_chain(options.cert_file, options.key_file, password=lambda: "")
        except (OSError, ValueError) as error:
            named = ", ".join(str(file) for file in (options.ca_file, options.cert_file, options.key_file) if file)
            why = getattr(error, "strerror", None) or "no PEM files that belong together"
            raise CommandError(f"{named}: {why}", exit_code=2) from None
    return WayIn(_token_in(options.token_file) if options.token_file else "", _opener(tls))


def way_in_flags(options: Namespace) -> list[str]:
    """The same flags for another command."""
    named = {name: getattr(options, name) for name in WAY_IN}
    return [word for name, file in named.items() if file for word in (f"--{name.replace('_', '-')}", str(file))]


def _token_in(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise CommandError(f"{file}: {why}", "--token-file: a file with nothing but a token", exit_code=2) from None
    if not token or any(not character.isprintable() or character.isspace() for character in token):
        raise CommandError(f"{file} is no token", "--token-file: a file with nothing but a token", exit_code=2)
    return token


def call(
    url: str,
    path: str,
    body: object = None,
    *,
    timeout_s: float = TIMEOUT_S,
    max_bytes: int = MAX_ANSWER_BYTES,
    way: WayIn = OPEN,
) -> Any:
    """GET, or POST if there is a body; returns the decoded answer, raises CommandError for anything else."""
    data = None if body is None else json.dumps(body).encode()
    answer = exchange(url, path, data, timeout_s=timeout_s, max_bytes=max_bytes, way=way)
    if not 200 <= answer.status < 300:  # noqa: PLR2004 - HTTP's classes
        raise _refused(answer.status, answer.body, way)
    try:
        return json.loads(answer.body)
    except ValueError:
        raise CommandError(f"{url}{path} answered something that is no JSON", "is this kvindexer?") from None


def exchange(
    url: str,
    path: str,
    data: bytes | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    max_bytes: int = MAX_ANSWER_BYTES,
    way: WayIn = OPEN,
) -> Answer:
    """Ask, and read the answer as far as it is no longer than it may be.  Raises CommandError."""
    check_url(url)
    headers = {"content-type": "application/json"}
    if way.token:
        headers["authorization"] = f"Bearer {way.token}"
    request = Request(url.rstrip("/") + path, data, headers)  # noqa: S310 - checked
    until = time.monotonic() + timeout_s
    try:
        try:
            with way.opener.open(request, timeout=timeout_s) as answer:
                return Answer(answer.status, _read(answer, max_bytes, until))
        except HTTPError as error:
            with error:
                return Answer(error.code, error.read(max_bytes))
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"{without_user(url)} is not trusted: {reason.verify_message}"
            raise UntrustedError(
                why, "--ca-file: who vouches for it, if that is nobody whom everybody trusts"
            ) from None
        raise UnreachableError(
            f"no answer from {without_user(url)}: {reason}", "is the service running there? kvindexer serve"
        ) from None


def _read(answer: HTTPResponse, max_bytes: int, until: float) -> bytes:
    """The whole body; a service that dribbles is not waited for."""
    pieces = bytearray()
    while piece := answer.read1(_PIECE_BYTES):
        pieces += piece
        if len(pieces) > max_bytes:
            raise CommandError(f"the answer is longer than {max_bytes} bytes")
        if time.monotonic() > until:
            raise TimeoutError("it takes too long")
    return bytes(pieces)


def check_url(url: str) -> None:
    """Refuse what can't be the address of the service."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() for character in url):
        raise CommandError(
            f"{without_user(url)!r} is no address of a service", "expected http://host:port", exit_code=2
        )


def _refused(status: int, content: bytes, way: WayIn) -> CommandError:
    """Make an error of the service's one error shape."""
    try:
        error = json.loads(content)["error"]
        hint = str(error.get("hint") or "")
        if status == 401 and way is not OPEN:  # noqa: PLR2004 - HTTP's; who asks as OPEN has no such flags
            hint += " (--token-file, --cert-file)"
        return CommandError(f"{error['message']} ({error['code']}, {status})", hint)
    except (ValueError, LookupError, TypeError):
        return CommandError(f"the service answered {status}")
