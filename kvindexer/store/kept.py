"""One source as its keeper sees it: the shard, and what is under way with it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

from kvindexer.events.stream import Stream
from kvindexer.index.seam import Index
from kvindexer.store.layout import pack_spec, shard_tag
from kvindexer.store.server import Author
from kvindexer.store.shard import Shard
from kvindexer.types import SourceSpec

MOST_READY: Final = 8_192
"""Records that are kept ready for a flush; what is more is made when it is written."""


class KeptSource:
    """What the keeper holds of one followed source."""

    def __init__(self, source: str, spec: SourceSpec, stream: Stream, shard: Shard, dial: Callable[[], None]) -> None:
        self.source = source
        self.spec = spec
        self.stream = stream
        self.shard = shard
        self.dial = dial
        self.tag = shard_tag(source, spec)
        self.packed_spec = pack_spec(spec)
        self.busy = False
        """A write or load of this shard is under way."""
        self.dialled = False
        self.dropped = False
        """Followed no longer, or anew: whatever is under way must not touch the index any more."""
        self.life = 0
        """Counts what makes a rewrite under way worthless: entries were withdrawn."""
        self.collected: set[int] | None = None
        """Hashes that change while a rewrite is under way."""
        self.ready: dict[int, bytes] = {}
        """Records as they are now, of hashes that changed lately: made while what they are made of is at hand.
        A hash that changes is made anew or not here at all."""

    def author(self, writer: str) -> Author:
        """Who writes, and of what."""
        return Author(writer, self.source, self.packed_spec, self.shard.registration)

    def changed(self, hashes: array[int], index: Index, *, ours: bool) -> None:
        """These records have just changed; `ours`: it is our turn to write them."""
        if self.collected is not None:
            self.collected.update(hashes)
        if not ours or len(self.ready) + len(hashes) > MOST_READY:
            self.ready.clear()
        if ours and len(hashes) <= MOST_READY:
            self.ready.update(zip(hashes, index.records(self.source, hashes), strict=True))

    def withdrawn(self) -> None:
        """What a rewrite under way has staged is worthless."""
        self.life += 1
        self.ready.clear()
