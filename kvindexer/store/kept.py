"""One source as its keeper sees it: the shard, and what is under way with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvindexer.events.stream import Stream
from kvindexer.store.layout import pack_spec, shard_tag
from kvindexer.store.server import Author
from kvindexer.store.shard import Shard
from kvindexer.types import SourceSpec


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
        """Counts what makes a write under way worthless: entries were withdrawn."""
        self.collected: set[int] | None = None
        """Hashes that change while a write is made ready."""

    def author(self, writer: str) -> Author:
        """Who writes, and of what."""
        return Author(writer, self.source, self.packed_spec, self.shard.registration)

    def changed(self, hashes: Iterable[int]) -> None:
        """These records have just changed."""
        if self.collected is not None:
            self.collected.update(hashes)

    def withdrawn(self) -> None:
        """What a write under way has made ready is worthless."""
        self.life += 1
