"""A small HTTP client for the commands: JSON in and out, finite waits, errors as sentences.

It never uses a proxy: the service is spoken to directly.
"""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from kvindexer.commands.failure import CommandError

TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024

_OPENER = build_opener(ProxyHandler({}))


class UnreachableError(CommandError):
    """Nothing answers there."""


def call(url: str, path: str, body: object = None, *, timeout_s: float = TIMEOUT_S) -> Any:
    """GET, or POST if there is a body; returns the decoded answer, raises CommandError for anything else."""
    check_url(url)
    data = None if body is None else json.dumps(body).encode()
    request = Request(url.rstrip("/") + path, data, {"content-type": "application/json"})  # noqa: S310 - checked
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read(MAX_ANSWER_BYTES))
    except HTTPError as error:
        with error:
            raise _refused(error.code, error.read(MAX_ANSWER_BYTES)) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(
            f"no answer from {url}: {reason}", "is the service running there? kvindexer serve"
        ) from None
    except ValueError:
        raise CommandError(f"{url}{path} answered something that is no JSON", "is this kvindexer?") from None


def check_url(url: str) -> None:
    """Refuse what can't be the address of the service."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() for character in url):
        raise CommandError(f"{url!r} is no address of a service", "expected http://host:port", exit_code=2)


def _refused(status: int, content: bytes) -> CommandError:
    """Make an error of the service's one error shape."""
    try:
        error = json.loads(content)["error"]
        return CommandError(f"{error['message']} ({error['code']}, {status})", str(error.get("hint") or ""))
    except (ValueError, LookupError, TypeError):
        return CommandError(f"the service answered {status}")
