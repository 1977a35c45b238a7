"""Where a follower of changes stands: behind which message of each source.

As text: msgpack, packed with zlib, in URL-safe base64.  The text is opaque to its owner and holds no hashes, tokens
or salts; one that comes from outside is taken for anything and read within bounds.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_TEXT: Final = 512 * 1024
"""Longest position as text; some thousand sources fit."""
_MAX_BYTES: Final = 8 * 1024 * 1024
_DIGEST_BYTES: Final = 4

_Count = Annotated[int, Meta(ge=0)]


class Mark(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Behind which message of one source."""

    epoch: _Count
    next: _Count
    """The seq behind the last message that was told."""
    digest: bytes
    """Of that last message, shortened: seqs and epochs of two lives may be equal, their messages are not."""
    generation: _Count
    """Of the log's content of the source."""
    exact: bool
    """The content was that of every replica which is sure of it."""


class Position(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Behind which message of each source, as told by one log."""

    log: str
    marks: dict[str, Mark]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Position).decode


def mark_digest(digest: bytes) -> bytes:
    """A digest as marks carry it."""
    return digest[:_DIGEST_BYTES]


def written(position: Position) -> str:
    """The position as text."""
    return base64.urlsafe_b64encode(zlib.compress(_encode(position), 1)).decode().rstrip("=")


def read_position(text: str) -> Position:
    """Raise ValueError unless it is the text of a position."""
    if len(text) > MAX_TEXT:
        raise ValueError("too long")
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        unpacking = zlib.decompressobj()
        plain = unpacking.decompress(packed, _MAX_BYTES)
        if not unpacking.eof:
            raise ValueError("cut off, or too long")
        return _decode(plain)
    except (binascii.Error, zlib.error, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(f"no position: {type(error).__name__}") from None
