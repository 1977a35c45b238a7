"""What a shard makes of what Redis says, step by step."""

from __future__ import annotations

from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.store.layout import Checkpoint, Coverage, Found, Meta
from kvindexer.store.shard import Rewrite, Shard, Wait


def meta(upto: int) -> Meta:
    """A shard that holds so many messages."""
    checkpoint = Checkpoint(1, upto, b"digest", b"birth", Coverage(2, 0))
    return Meta(checkpoint, "aaaaaaaa", 1, 10, b"", "a", "tcp://10.0.0.1:5557", b"{}", 1)


def another_life() -> Found:
    """What Redis holds of another life of the engine."""
    return Found(meta(9)._replace(checkpoint=Checkpoint(2, 9, b"other", b"another birth", Coverage(2, 0))), None)


def proven_at_once() -> Stream:
    """A stream whose engine has confirmed its life right after the start."""
    stream = Stream(StreamSettings())
    stream.start(0.0)
    stream.connected(1.0)
    stream.replay_frame(0, b"first", 1.0)
    stream.replay_end(1.0)
    return stream


def test_what_was_read_before_our_last_write_does_not_take_it_back() -> None:
    """An answer may be under way while a write is carried out: believed, it would look like lost messages."""
    shard = Shard(Stream(StreamSettings()))
    shard.stored(meta(7), now=10.0)
    shard.read(Found(meta(5), None), now=10.5, asked_at=9.0)
    assert shard.remote == Found(meta(7), None)
    shard.read(Found(meta(5), None), now=11.5, asked_at=11.0)
    assert shard.remote == Found(meta(5), None)


def test_after_a_refused_write_whatever_is_read_counts() -> None:
    """What was known then was wrong."""
    shard = Shard(Stream(StreamSettings()))
    shard.stored(meta(7), now=10.0)
    shard.remote = None
    shard.read(Found(meta(8), None), now=10.5, asked_at=9.0)
    assert shard.remote == Found(meta(8), None)


def test_only_what_is_written_anew_ends_a_divergence() -> None:
    """A flush that was under way when it was found brings some records, and growth copies what is there."""
    shard = Shard(Stream(StreamSettings()))
    shard.stored(meta(7), now=10.0)
    shard.divergent = True
    shard.stored(meta(8), now=11.0)
    assert shard.divergent
    shard.stored(meta(9), now=12.0, anew=True)
    assert not shard.divergent


def test_a_proof_that_was_asked_for_before_another_life_was_seen_proves_nothing_against_it() -> None:
    """Its answer may have been under way while the engine was restarted, for however long."""
    stream = proven_at_once()
    shard = Shard(stream)
    shard.epoch = 1
    stream.tick(50.0)
    assert stream.replays == 1
    shard.read(another_life(), now=52.0, asked_at=51.5)
    stream.replay_frame(0, b"first", 60.0)
    stream.replay_end(60.0)
    assert stream.replays == 2
    assert stream.verified_at == 60.0
    assert isinstance(shard.decide(60.0), Wait)
    stream.tick(70.0)
    stream.replay_frame(0, b"first", 70.1)
    stream.replay_end(70.1)
    step = shard.decide(70.2)
    assert isinstance(step, Rewrite)
    assert (step.expected, step.epoch) == (2, 3)


def test_an_engine_has_time_to_say_which_life_it_lives() -> None:
    """A replica that comes back asks it again only when its pause between questions is over."""
    stream = proven_at_once()
    shard = Shard(stream, takeover_s=3.0, proof_patience_s=105.0)
    shard.epoch = 1
    shard.read(another_life(), now=50.0)
    assert isinstance(shard.decide(50.0 + 104.0), Wait)
    assert isinstance(shard.decide(50.0 + 106.0), Rewrite)
