"""One test per defect that the stream machine once had."""

from __future__ import annotations

from xxhash import xxh3_128_digest

from kvindexer.events.states import Action, Apply, Ask, Drop, State, Withdraw
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.types import Epoch

SETTINGS = StreamSettings(probe_interval_s=5.0, retry_min_s=0.5)


def payload(seq: int, life: int = 1) -> bytes:
    return b"%d:%d" % (life, seq)


def applied(actions: list[Action]) -> list[bytes]:
    return [action.payload for action in actions if isinstance(action, Apply)]


def asked(actions: list[Action]) -> list[int]:
    return [action.start for action in actions if isinstance(action, Ask)]


def withdrawn(actions: list[Action]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, Withdraw)]


def caught_up(stream: Stream, now: float) -> list[Action]:
    """What follows a replay, as long as there is time."""
    actions: list[Action] = []
    while stream.catching_up:
        actions += stream.catch_up(now)
    return actions


def followed(messages: int, now: float = 0.0) -> Stream:
    """A stream that has heard a life from its first message on, all of it."""
    stream = Stream(SETTINGS)
    stream.start(now)
    stream.connected(now)
    stream.replay_end(now)
    for seq in range(messages):
        assert applied(stream.frame(seq, payload(seq), now)) == [payload(seq)]
    assert (stream.state, stream.sound, stream.complete) == (State.LIVE, True, True)
    return stream


def failed_probe(stream: Stream, now: float) -> None:
    """The replay socket does not answer for once."""
    assert asked(stream.tick(now)) == [stream.last_seq]
    stream.replay_failed("no answer", now)
    assert (stream.sound, stream.complete) == (False, False)


def test_a_probe_that_fails_once_costs_the_flags_only_until_the_next_one() -> None:
    """Long-lived engines: their buffer does not reach back to the first message, so a rebuild would be no help."""
    stream = followed(100)
    failed_probe(stream, 6.0)
    assert asked(stream.tick(7.0)) == [99]
    assert withdrawn(stream.replay_frame(99, payload(99), 7.0) + stream.replay_end(7.0)) == []
    assert (stream.sound, stream.complete, stream.why) == (True, True, "live")


def test_doubt_is_settled_from_where_it_began() -> None:
    """What came since the failed probe may be of another life: its own newest message proves nothing."""
    stream = followed(10)
    stream.disconnected(1.0)
    stream.connected(2.0)
    stream.replay_failed("no answer", 3.0)
    assert applied(stream.frame(10, payload(10, life=2), 3.0)) == [payload(10, life=2)]
    assert asked(stream.tick(4.0)) == [9]
    actions = stream.replay_frame(9, payload(9, life=2), 4.0)
    assert withdrawn(actions) == ["new_life"]
    assert asked(actions) == [0]
    for seq in range(11):
        assert applied(stream.replay_frame(seq, payload(seq, life=2), 4.0)) == [payload(seq, life=2)]
    stream.replay_end(4.0)
    assert (stream.sound, stream.complete, stream.epoch) == (True, True, 2)


def test_doubt_longer_than_the_remembered_digests_is_no_new_life() -> None:
    stream = followed(10)
    failed_probe(stream, 6.0)
    for seq in range(10, 1_000):
        stream.frame(seq, payload(seq), 6.0)
    assert asked(stream.tick(7.0)) == [9]
    for seq in range(9, 1_000):
        assert withdrawn(stream.replay_frame(seq, payload(seq), 7.0)) == []
    stream.replay_end(7.0)
    assert (stream.sound, stream.complete, stream.epoch, stream.last_seq) == (True, True, 1, 999)


def test_doubt_behind_the_buffer_is_settled_by_an_unbroken_connection_only() -> None:
    for broken in (False, True):
        stream = followed(10)
        failed_probe(stream, 6.0)
        for seq in range(10, 100):
            stream.frame(seq, payload(seq), 6.0)
        if broken:
            stream.disconnected(6.0)
            stream.connected(6.0)
        else:
            stream.tick(7.0)
        for seq in range(50, 100):
            assert applied(stream.replay_frame(seq, payload(seq), 7.0)) == []
        stream.replay_end(7.0)
        assert (stream.sound, stream.complete, stream.last_seq) == (not broken, not broken, 99)


def test_a_replay_that_breaks_off_goes_on_where_it_broke_off() -> None:
    """A publisher whose socket drops behind its high-water mark sends a part at a time: none is asked for twice."""
    stream = Stream(SETTINGS)
    stream.start(0.0)
    assert asked(stream.connected(0.0)) == [0]
    stream.frame(40, payload(40), 0.0)
    for part in range(0, 40, 10):
        for seq in range(part, part + 10):
            assert applied(stream.replay_frame(seq, payload(seq), 0.0)) == [payload(seq)]
        assert asked(stream.replay_failed("no end", 0.0)) == [part + 9]
        assert not stream.complete
        stream.replay_frame(part + 9, payload(part + 9), 0.0)
    assert applied(stream.replay_end(0.0)) == [payload(40)]
    assert (stream.sound, stream.complete, stream.gaps) == (True, True, 0)


def test_a_replay_that_drips_does_not_hold_live_events_back_for_ever() -> None:
    stream = Stream(SETTINGS)
    stream.start(0.0)
    stream.connected(0.0)
    stream.frame(1_000, payload(1_000), 0.0)
    for seq in range(1_000):
        stream.replay_frame(seq, payload(seq), 0.0)
        if applied(stream.replay_failed("no end", 0.0)):
            break
    assert stream.last_seq == 1_000
    assert (stream.sound, stream.complete) == (False, False)


def test_entries_kept_from_an_earlier_life_are_not_sound_once_the_new_one_is_in() -> None:
    """The end of the new life's replay says nothing of them."""
    stream = followed(10)
    assert withdrawn(stream.frame(3, payload(3, life=2), 1.0)) == ["new_life"]
    stream.uncertain("entries of an earlier life were kept")
    for seq in range(4):
        stream.replay_frame(seq, payload(seq, life=2), 2.0)
    stream.replay_end(2.0)
    assert (stream.sound, stream.complete) == (False, True)
    stream.cleared(3)
    assert (stream.sound, stream.complete) == (True, True)


def test_a_rebuild_does_not_prove_what_its_messages_left_uncertain() -> None:
    """A reset that may or may not have emptied the CPU tier is as uncertain the second time."""
    stream = followed(10)
    stream.frame(12, payload(12), 1.0)
    for _ in range(2):  # nobody has 10 and 11
        stream.replay_frame(9, payload(9), 1.0)
        stream.replay_frame(12, payload(12), 1.0)
        stream.replay_end(1.0)
    assert not stream.sound
    assert asked(stream.tick(9.0)) == [0]
    assert withdrawn(stream.replay_frame(0, payload(0), 9.0)) == ["rebuild"]
    stream.uncertain("the cache was reset; whether cpu was emptied too is not on the wire")
    for seq in range(1, 13):
        stream.replay_frame(seq, payload(seq), 9.0)
    stream.replay_end(9.0)
    assert (stream.sound, stream.complete) == (False, True)


def test_a_restart_while_holes_are_open_is_a_new_epoch() -> None:
    """A rebuild begins with the first message of a life; if that is another one now, so is the life."""
    for life, epoch in ((1, 1), (2, 2)):
        stream = followed(10)
        stream.frame(12, payload(12), 1.0)
        for _ in range(2):  # nobody has 10 and 11
            stream.replay_frame(9, payload(9), 1.0)
            stream.replay_frame(12, payload(12), 1.0)
            stream.replay_end(1.0)
        assert asked(stream.tick(9.0)) == [0]
        actions = stream.replay_frame(0, payload(0, life), 9.0)
        assert withdrawn(actions) == ["rebuild" if life == 1 else "new_life"]
        seen = applied(actions) if life == 1 else applied(stream.replay_frame(0, payload(0, life), 9.0))
        for seq in range(1, 13):
            seen += applied(stream.replay_frame(seq, payload(seq, life), 9.0))
        stream.replay_end(9.0)
        assert seen == [payload(seq, life) for seq in range(13)]
        assert (stream.sound, stream.complete, stream.epoch) == (True, True, epoch)


def test_a_repeated_frame_that_found_no_room_is_no_new_life() -> None:
    stream = Stream(StreamSettings(held_max_frames=2))
    stream.start(0.0)
    stream.connected(0.0)
    for seq in (0, 1, 2, 2):
        assert withdrawn(stream.frame(seq, payload(seq), 0.0)) == []
    assert stream.epoch == 1


def test_a_reconnected_source_is_not_sound_before_its_life_is_proven() -> None:
    """Stale for long, then connected again: it may be a restarted engine that has none of its blocks any more."""
    stream = followed(10)
    stream.disconnected(1.0)
    assert (stream.state, stream.sound, stream.complete) == (State.LIVE, False, False)
    stream.tick(20.0)
    assert (stream.state, stream.sound) == (State.STALE, False)
    assert asked(stream.connected(40.0)) == [9]
    assert (stream.sound, stream.complete) == (False, False)
    stream.replay_frame(9, payload(9), 40.1)
    stream.replay_end(40.1)
    assert (stream.state, stream.sound, stream.complete, stream.epoch) == (State.LIVE, True, True, 1)


def test_a_replay_that_overtakes_the_live_frames_is_no_loss() -> None:
    """A subscriber that is behind asks, and the buffer has moved on: what lies between is in its own socket still."""
    stream = followed(10)
    assert asked(stream.tick(6.0)) == [9]
    for seq in range(50, 60):
        assert applied(stream.replay_frame(seq, payload(seq), 6.0)) == []
    assert applied(stream.frame(10, payload(10), 6.0)) == []
    assert applied(stream.replay_end(6.0)) == [payload(10)]
    for seq in range(11, 60):
        assert applied(stream.frame(seq, payload(seq), 7.0)) == [payload(seq)]
    assert (stream.sound, stream.complete, stream.gaps) == (True, True, 0)


def test_a_tail_lost_beyond_the_buffer_is_told_from_haste_by_the_second_probe() -> None:
    stream = followed(10)
    assert asked(stream.tick(6.0)) == [9]
    stream.replay_frame(50, payload(50), 6.0)
    stream.replay_end(6.0)
    assert asked(stream.tick(8.0)) == []
    assert asked(stream.tick(12.0)) == [9]
    assert applied(stream.replay_frame(50, payload(50), 12.0)) == [payload(50)]
    stream.replay_end(12.0)
    assert (stream.state, stream.sound, stream.complete, stream.gaps) == (State.LIVE, False, False, 1)


def test_behind_a_hole_that_nobody_can_fill_no_live_frame_is_lost_as_well() -> None:
    """10 and 11 are gone for good; the buffer begins at 50, with 12 to 49 here or on their way."""
    stream = followed(10)
    seen: list[bytes] = []
    for seq in range(12, 20):
        seen += applied(stream.frame(seq, payload(seq), 1.0))
    for _ in range(2):
        stream.replay_frame(50, payload(50), 1.0)
        seen += applied(stream.replay_end(1.0) + caught_up(stream, 1.0))
    for seq in range(20, 51):
        seen += applied(stream.frame(seq, payload(seq), 1.0))
    assert seen == [payload(seq) for seq in range(12, 51)]
    assert (stream.sound, stream.complete, stream.gaps > 0) == (False, False, True)


def test_a_clear_inside_a_late_joiner_s_replay_makes_it_complete() -> None:
    """What was before the clear does not matter, wherever the news of it comes from."""
    stream = Stream(SETTINGS)
    stream.start(0.0)
    stream.connected(0.0)
    stream.replay_frame(5, payload(5), 0.0)
    stream.replay_frame(6, payload(6), 0.0)
    stream.cleared(6)
    stream.replay_frame(7, payload(7), 0.0)
    stream.replay_end(0.0)
    assert (stream.state, stream.sound, stream.complete) == (State.LIVE, True, True)


def test_a_clear_does_not_make_up_for_what_is_lost_behind_it() -> None:
    """The shell may tell of the clear when the machine is past the loss already."""
    stream = followed(10)
    assert asked(stream.tick(6.0)) == [9]
    for seq in (10, 11, 13):
        stream.frame(seq, payload(seq), 6.0)
    actions = stream.replay_failed("no answer", 6.0) + caught_up(stream, 6.0)
    assert applied(actions) == [payload(seq) for seq in (10, 11, 13)]
    stream.cleared(10)
    assert (stream.sound, stream.complete) == (False, False)
    stream.frame(14, payload(14), 6.0)
    stream.cleared(14)
    assert (stream.sound, stream.complete) == (True, True)


def test_a_clear_of_the_life_before_says_nothing_of_the_new_one() -> None:
    stream = followed(10)
    stream.disconnected(1.0)
    stream.connected(1.0)
    stream.frame(10, payload(10, life=2), 1.0)
    actions = stream.replay_frame(9, payload(9), 1.0) + stream.replay_frame(10, payload(10), 1.0)
    actions += stream.replay_end(1.0)
    assert withdrawn(actions) == ["new_life"]
    stream.cleared(10)
    assert not stream.complete


def test_a_stream_resumed_on_an_incomplete_copy_is_rebuilt_where_the_buffer_still_reaches_back() -> None:
    """A warm start from a copy that had lost records stayed incomplete, although the engine still knew everything."""
    stream = Stream(SETTINGS)
    stream.resume(Epoch(3), 2, xxh3_128_digest(payload(1)), b"", (0, 0))
    stream.start(0.0)
    assert asked(stream.connected(0.0)) == [1]
    stream.replay_frame(1, payload(1), 0.0)
    stream.replay_end(0.0)
    assert (stream.state, stream.sound, stream.complete) == (State.LIVE, False, False)
    assert asked(stream.tick(1.0)) == [0]
    actions = stream.replay_frame(0, payload(0), 1.0) + stream.replay_frame(1, payload(1), 1.0)
    assert withdrawn(actions) == ["rebuild"]
    assert applied(actions) == [payload(0), payload(1)]
    stream.replay_end(1.0)
    assert (stream.sound, stream.complete, stream.epoch) == (True, True, 3)


def test_what_was_held_follows_a_replay_one_frame_at_a_time() -> None:
    """All at once, ten thousand frames kept every query waiting until the last of them was applied."""
    stream = followed(10)
    assert asked(stream.tick(6.0)) == [9]
    for seq in range(10, 20):
        assert applied(stream.frame(seq, payload(seq), 6.0)) == []
    stream.replay_frame(9, payload(9), 6.0)
    assert applied(stream.replay_end(6.5)) == [payload(10)]
    assert (stream.sound, stream.complete, stream.lag_s(7.0)) == (True, True, 1.0)
    assert applied(stream.frame(20, payload(20), 7.0)) == [], "it comes behind those that were held"
    assert stream.tick(20.0) == [], "no probe between"
    for seq in range(11, 21):
        assert stream.catching_up
        assert applied(stream.catch_up(20.0)) == [payload(seq)]
    assert not stream.catching_up
    assert applied(stream.frame(21, payload(21), 20.0)) == [payload(21)]


def test_a_disconnect_ends_catching_up() -> None:
    """The next replay has what was held: whoever comes back may be another life."""
    stream = followed(10)
    stream.tick(6.0)
    for seq in range(10, 20):
        stream.frame(seq, payload(seq), 6.0)
    stream.replay_frame(9, payload(9), 6.0)
    assert applied(stream.replay_end(6.0)) == [payload(10)]
    assert stream.disconnected(6.0) == [Drop("disconnected")] * 9
    assert not stream.catching_up
    assert asked(stream.connected(7.0)) == [10]
    for seq in range(10, 21):
        stream.replay_frame(seq, payload(seq), 7.0)
    stream.replay_end(7.0)
    assert (stream.last_seq, stream.sound, stream.complete, stream.gaps) == (20, True, True, 0)


def test_a_frame_without_room_while_catching_up_is_asked_for_at_the_end() -> None:
    stream = Stream(StreamSettings(held_max_frames=2))
    stream.start(0.0)
    stream.connected(0.0)
    for seq in (0, 1):
        stream.frame(seq, payload(seq), 0.0)
    assert applied(stream.replay_end(0.0)) == [payload(0)]
    stream.frame(2, payload(2), 0.0)
    assert stream.frame(3, payload(3), 0.0) == [Drop("held_full")]
    assert applied(actions := caught_up(stream, 0.0)) == [payload(1), payload(2)]
    assert asked(actions) == [2]
    for seq in (2, 3):
        stream.replay_frame(seq, payload(seq), 0.0)
    stream.replay_end(0.0)
    assert (stream.last_seq, stream.sound, stream.complete) == (3, True, True)
