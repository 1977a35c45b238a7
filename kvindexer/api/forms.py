"""The two forms in which bodies travel: JSON, and msgpack where a route takes it.

A body is msgpack if `Content-Type` says so, otherwise JSON, whatever it says: curl's default is fine.  An answer is
msgpack if `Accept` names it, before JSON if it names both.  The two are independent.  Errors are always JSON.

In msgpack, bytes are binary: what is base64 text in JSON (`tokens_b64`, `keys_b64`) is sent as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import msgspec


class Form(NamedTuple):
    """One way of writing values as bytes."""

    name: str
    content_type: str
    encode: Callable[[Any], bytes]


JSON: Final = Form("JSON", "application/json", msgspec.json.Encoder().encode)
MSGPACK: Final = Form("msgpack", "application/msgpack", msgspec.msgpack.Encoder().encode)
FORMS: Final = (JSON, MSGPACK)

_MSGPACK: Final = (b"application/msgpack", b"application/x-msgpack", b"application/vnd.msgpack")
_JSON: Final = b"application/json"


class Call(NamedTuple):
    """A request of a route that takes both forms."""

    body: bytes
    form: Form = JSON
    """Of the body."""
    answer: Form = JSON
    """Of the answer, unless it is an error."""


def call_of(body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Call:
    """A body, and the forms that the headers of its request ask for."""
    given = answer = JSON
    for name, value in headers:
        if name == b"content-type":
            if value.partition(b";")[0].strip().lower() in _MSGPACK:
                given = MSGPACK
        elif name == b"accept" and b"msgpack" in value.lower():
            answer = _accepted(value)
    return Call(body, given, answer)


def _accepted(value: bytes) -> Form:
    for named in value.lower().split(b","):
        kind = named.partition(b";")[0].strip()
        if kind in _MSGPACK:
            return MSGPACK
        if kind == _JSON:
            return JSON
    return JSON
