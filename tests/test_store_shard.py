"""What a shard makes of what Redis says, step by step."""

from __future__ import annotations

from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.store.layout import Checkpoint, Coverage, Found, Meta
from kvindexer.store.shard import Shard


def meta(upto: int) -> Meta:
    """A shard that holds so many messages."""
    checkpoint = Checkpoint(1, upto, b"digest", b"birth", Coverage(2, 0))
    return Meta(checkpoint, "aaaaaaaa", 1, 10, b"", "a", "tcp://10.0.0.1:5557", b"{}", 1)


def test_what_was_read_before_our_last_write_does_not_take_it_back() -> None:
    """An answer may be under way while a write is carried out: believed, it would look like lost messages."""
    shard = Shard(Stream(StreamSettings()))
    shard.stored(meta(7), now=10.0)
    shard.read(Found(meta(5), None), now=9.0)
    assert shard.remote == Found(meta(7), None)
    shard.read(Found(meta(5), None), now=11.0)
    assert shard.remote == Found(meta(5), None)


def test_after_a_refused_write_whatever_is_read_counts() -> None:
    """What was known then was wrong."""
    shard = Shard(Stream(StreamSettings()))
    shard.stored(meta(7), now=10.0)
    shard.remote = None
    shard.read(Found(meta(8), None), now=9.0)
    assert shard.remote == Found(meta(8), None)
