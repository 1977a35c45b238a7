r"""What GET /v1/changes tells: bytes of server-sent events become typed events.  No I/O here.

    b"event: blocks\ndata: {...}\n\n"  ─►  Told(BlocksEvent(...), None)

Comments, `retry`, and events of names that a newer service has added are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from kvindexer.client.errors import BadAnswerError

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024


class Place(msgspec.Struct, frozen=True):
    """Where a block lies now."""

    rank: int = 0
    tier: str = ""
    group: int = 0


class StoredBlock(msgspec.Struct, frozen=True):
    """A block that is held, with all places of the source where it lies now; `key` None: not known yet."""

    hash: int
    key: int | None
    places: list[Place]
    block_size: int | None = None
    """None: that of the source."""


class ResetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Forget what was told of the source, its content follows."""

    source: str
    instance: str | None = None
    store: str | None = None
    epoch: int
    seq: int | None
    model: str
    block_size: int
    offload_blocks_per_chunk: int
    readers: list[str] | None = None


class BlocksEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What these hashes of the source are now, whatever was told of them before."""

    source: str
    instance: str | None = None
    store: str | None = None
    epoch: int
    seq: int | None
    stored: list[StoredBlock]
    removed: list[int]
    rest: int | None = None
    """After a reset: hashes still to come."""


class GoneEvent(msgspec.Struct, frozen=True):
    """The source is not registered any more; forget what was told of it."""

    source: str


class PositionEvent(msgspec.Struct, frozen=True):
    """Everything up to here was told: `position` of the stream is where to go on."""

    sources: int


class EndEvent(msgspec.Struct, frozen=True):
    """The stream ends here (`too_slow`, `leaving`, `ask_again`); come back with the last position."""

    code: str


Change = ResetEvent | BlocksEvent | GoneEvent | PositionEvent | EndEvent

_READ: Final[dict[bytes, Any]] = {
    name: msgspec.json.Decoder(kind).decode
    for name, kind in (
        (b"reset", ResetEvent),
        (b"blocks", BlocksEvent),
        (b"gone", GoneEvent),
        (b"position", PositionEvent),
        (b"end", EndEvent),
    )
}


class Told(NamedTuple):
    """One event, and the position behind it if it has one."""

    event: Change
    position: str | None


class Reader:
    """Takes bytes as they come, in any pieces."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[Told]:
        """The events that this piece completes.  Raises BadAnswerError."""
        looked_at = max(0, len(self._rest) - 1)
        self._rest += chunk
        end = self._rest.rfind(b"\n\n", looked_at)
        if end >= 0:
            whole = bytes(self._rest[:end])
            del self._rest[: end + 2]
            yield from filter(None, map(self._told, whole.split(b"\n\n")))
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadAnswerError(self._url, f"an event is longer than {MAX_EVENT_BYTES} bytes")

    def _told(self, text: bytes) -> Told | None:
        fields = dict(line.split(b": ", 1) for line in text.split(b"\n") if b": " in line and line[:1] != b":")
        read = _READ.get(fields.get(b"event", b""))
        if read is None:
            return None
        position = fields.get(b"id")
        try:
            return Told(read(fields.get(b"data", b"")), None if position is None else position.decode())
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise BadAnswerError(self._url, "an event of /v1/changes can't be read") from None
