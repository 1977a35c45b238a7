"""Objects of an answer, joined from pieces that were encoded before.

A piece is some fields of an object, encoded, without what makes them an object:

    JSON       {                   "a":1   ,   "b":2   }               [ object , object ]
    msgpack    map of 2            a 1         b 2             list of 2   object   object
               before              piece between piece after
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from kvindexer.api.forms import JSON, Form

MAX_PIECE: Final = 15
"""Most fields of a piece: with more, msgpack has another head."""

_MAP: Final = b"\xde"
_LIST: Final = b"\xdd"
"""Heads of msgpack, followed by the number of items in two and in four bytes."""


class Joiner:
    """Joins pieces to objects of so many fields, in one form."""

    def __init__(self, form: Form, fields: int) -> None:
        self._is_json = form is JSON
        before, self.between, after = (b"{", b",", b"}") if self._is_json else (_MAP + fields.to_bytes(2), b"", b"")
        self._before, self._after = before, after
        self._next = after + self.between + before

    def objects(self, objects: Sequence[bytes]) -> msgspec.Raw:
        """A list of objects; each is its pieces, joined by `between`."""
        head, tail = (b"[", b"]") if self._is_json else (_LIST + len(objects).to_bytes(4), b"")
        if not objects:
            return msgspec.Raw(head + tail)
        *rest, last = objects
        rest.append(last + self._after + tail)
        rest[0] = head + self._before + rest[0]
        return msgspec.Raw(self._next.join(rest))  # the long part is copied once


def piece(form: Form, fields: msgspec.Struct) -> bytes:
    """The fields of a struct of at most `MAX_PIECE`, encoded."""
    if len(fields.__struct_fields__) > MAX_PIECE:
        raise ValueError("too many fields for a piece")
    encoded = form.encode(fields)
    return encoded[1:-1] if form is JSON else encoded[1:]


def fields_of(kinds: Iterable[type[msgspec.Struct]]) -> int:
    """How many fields objects have that are made of these structs."""
    return sum(len(kind.__struct_fields__) for kind in kinds)
