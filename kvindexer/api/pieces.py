"""Objects of an answer, joined from pieces that were encoded before.

A piece is some fields of an object, encoded, without what makes them an object:

    JSON       {                   "a":1   ,   "b":2   }               [ object , object ]
    msgpack    map of 2            a 1         b 2             list of 2   object   object
               before              piece between piece after
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from kvindexer.api.forms import JSON, Form

MAX_PIECE: Final = 15
"""Most fields of a piece: with more, msgpack has another head."""

_MAP: Final = b"\xde"
_LIST: Final = b"\xdd"
"""Heads of msgpack, followed by the number of items in two and in four bytes."""


class Joiner:
    """Joins pieces to a list of objects of so many fields, in one form.

    Pieces carry what stands between them: the first one of an object by `first`, every other one but the second by
    `further`.  So a whole list is joined at once, and its bytes are copied once.
    """

    def __init__(self, form: Form, fields: int) -> None:
        self._is_json = form is JSON
        self._before, self._between = (b"},{", b",") if self._is_json else (_MAP + fields.to_bytes(2), b"")

    def first(self, fields: bytes) -> bytes:
        """The piece that begins an object, behind another object and before the next piece."""
        return self._before + fields + self._between

    def further(self, fields: bytes) -> bytes:
        """A piece that stands behind others."""
        return self._between + fields

    def objects(self, pieces: list[bytes], count: int) -> msgspec.Raw:
        """So many objects; the pieces of one behind those of the other."""
        if not self._is_json:
            return msgspec.Raw(b"".join((_LIST + count.to_bytes(4), *pieces)))
        if not pieces:
            return msgspec.Raw(b"[]")
        pieces[0] = b"[" + pieces[0][2:]  # no object stands before it
        pieces.append(b"}]")
        return msgspec.Raw(b"".join(pieces))


def piece(form: Form, fields: msgspec.Struct) -> bytes:
    """The fields of a struct of at most `MAX_PIECE`, encoded."""
    if len(fields.__struct_fields__) > MAX_PIECE:
        raise ValueError("too many fields for a piece")
    encoded = form.encode(fields)
    return encoded[1:-1] if form is JSON else encoded[1:]


def fields_of(kinds: Iterable[type[msgspec.Struct]]) -> int:
    """How many fields objects have that are made of these structs."""
    return sum(len(kind.__struct_fields__) for kind in kinds)
