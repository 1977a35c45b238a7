"""When a source is not believed any more: the rule, and what becomes of a source whose claims were wrong."""

from __future__ import annotations

import pytest

from kvindexer.events.fleet import LiveFleet
from kvindexer.events.states import Ask, Withdraw
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.testing import BlockRemoved, Event, FakeEngine, PoolShape
from kvindexer.tiering.feedback import Accuracy, FeedbackRule
from kvindexer.types import Seq
from live import agrees, connected, spec_of, until, with_fleet
from test_stream_regressions import followed, payload

RULE = FeedbackRule(window_s=10.0, min_reports=4, wrong_share=0.5, pause_s=30.0)
PROMPT = list(range(33))


def verdicts(reports: list[tuple[float, int, int]]) -> list[float]:
    """When the source was doubted; blocks of 4 tokens."""
    accuracy = Accuracy(RULE)
    return [now for now, predicted, cached in reports if accuracy.add(predicted, cached, 4, now).doubt]


def test_wrong_again_and_again_is_doubted_once_and_then_not_before_the_pause_is_over() -> None:
    assert verdicts([(float(now), 32, 0) for now in range(60)]) == [3.0, 33.0]


def test_few_reports_are_no_verdict() -> None:
    assert verdicts([(0.0, 32, 0), (1.0, 32, 0), (2.0, 32, 0)]) == []


def test_reports_outside_of_the_window_do_not_count() -> None:
    assert verdicts([(4.0 * step, 32, 0) for step in range(20)]) == []


def test_a_smaller_share_of_wrong_ones_is_haste_and_no_lie() -> None:
    reports = [(step / 10, 32, 0 if step % 3 == 2 else 32) for step in range(100)]
    assert verdicts(reports) == []


def test_up_to_a_block_too_much_is_not_wrong() -> None:
    assert verdicts([(float(now), 32, 28) for now in range(20)]) == []
    assert verdicts([(float(now), 32, 27) for now in range(4)]) == [3.0]


def test_what_claims_nothing_or_too_little_is_never_wrong() -> None:
    assert verdicts([(float(now), 0, 0) for now in range(20)]) == []
    assert verdicts([(float(now), 4, 32) for now in range(20)]) == []


def test_figures_add_up() -> None:
    accuracy = Accuracy(RULE)
    for predicted, cached in ((8, 8), (8, 4), (4, 8), (0, 0)):
        accuracy.add(predicted, cached, 4, 0.0)
    assert accuracy.figures == (2, 1, 1, 20, 20, 0)


# The stream


def test_a_stream_found_wrong_is_rebuilt_from_its_first_message() -> None:
    stream = followed(3)
    stream.found_wrong("it lied", 10.0)
    assert (stream.sound, stream.complete, stream.why) == (False, False, "it lied")
    assert stream.tick(10.0) == [Ask(Seq(0))]
    actions = stream.replay_frame(0, payload(0), 10.0)
    assert actions[0] == Withdraw("rebuild", everything=False)
    for seq in (1, 2):
        stream.replay_frame(seq, payload(seq), 10.0)
    stream.replay_end(10.0)
    assert (stream.sound, stream.complete, stream.last_seq) == (True, True, 2)


def test_a_stream_found_wrong_whose_buffer_does_not_reach_back_is_not_sound() -> None:
    stream = followed(30)
    stream.found_wrong("it lied", 10.0)
    stream.tick(10.0)
    for seq in range(20, 30):
        assert not any(isinstance(action, Withdraw) for action in stream.replay_frame(seq, payload(seq), 10.0))
    stream.replay_end(10.0)
    stream.frame(30, payload(30), 11.0)
    assert (stream.state.value, stream.sound, stream.complete, stream.last_seq) == ("live", False, False, 30)
    assert stream.why == "it lied"


def test_a_stream_without_replay_that_is_found_wrong_is_not_sound() -> None:
    stream = Stream(StreamSettings(replayable=False))
    stream.start(0.0)
    stream.connected(0.0)
    stream.frame(0, payload(0), 0.0)
    stream.found_wrong("it lied", 1.0)
    assert stream.tick(2.0) == []
    assert (stream.sound, stream.complete) == (False, False)


def test_a_second_time_in_one_life_no_replay_is_asked_for() -> None:
    """What the first one brought was no better; a clear makes up for it."""
    stream = followed(2)
    stream.found_wrong("it lied", 10.0)
    stream.tick(10.0)
    for seq in (0, 1):
        stream.replay_frame(seq, payload(seq), 10.0)
    stream.replay_end(10.0)
    assert stream.sound
    stream.found_wrong("it lied again", 20.0)
    assert (stream.sound, stream.why) == (False, "it lied again")
    assert Ask(Seq(0)) not in stream.tick(21.0)
    stream.frame(2, payload(2), 22.0)
    stream.replay_failed("no answer", 22.0)
    stream.cleared(2)
    assert stream.sound


# A whole fleet


class LyingEngine(FakeEngine):
    """Does not tell what it evicts: neither live nor in its replay."""

    def publish_events(self, events: list[Event]) -> int:  # type: ignore[override]
        told = [event for event in events if not isinstance(event, BlockRemoved)]
        return super().publish_events(told) if told else -1


def report(fleet: LiveFleet, predicted: int, cached: int) -> bool:
    return any(each.doubt for each in fleet.feedback("pod-a", predicted, cached, tenant="default"))


QUICK_RULE = {"feedback_min_reports": 3, "feedback_pause_s": 0.2}


def test_an_engine_that_drops_removals_silently_is_found_out_by_its_own_reports() -> None:
    """A rebuild brings the same lies; when its reports go on to be lower, it is shown as not sound."""
    with LyingEngine(pool=PoolShape(num_blocks=12, block_size=4)) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            engine.run_request(PROMPT)
            engine.run_request(list(range(100, 140)))  # evicts the first prompt, and says nothing
            engine.publisher.flush()
            await until("all applied", lambda: fleet.reports()[0].seq == engine.last_seq)
            assert engine.cached_tokens(PROMPT) < 16
            await until("sound", lambda: fleet.status("pod-a").sound)
            assert [report(fleet, 32, 0) for _ in range(3)] == [False, False, True]
            assert not fleet.status("pod-a").sound
            await until("rebuilt", lambda: fleet.status("pod-a").sound)
            assert fleet.reports()[0].replays >= 1
            await until("doubted again", lambda: report(fleet, 32, 0))
            assert not fleet.status("pod-a").sound
            assert fleet.reports()[0].accuracy.doubts == 2
            assert "fewer cached tokens" in fleet.reports()[0].why

        with_fleet(scenario, **QUICK_RULE)


def test_claims_that_came_in_by_mistake_go_when_the_engine_reports_less() -> None:
    """Something that is only in our index: the rebuild puts it right, and the flags come back."""
    with FakeEngine(pool=PoolShape(num_blocks=12, block_size=4)) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            engine.run_request(PROMPT)
            engine.publisher.flush()
            await agrees(fleet, engine)
            stray = FakeEngine(pool=PoolShape(num_blocks=12, block_size=4))
            with stray:
                sent: list[bytes] = []
                stray.publish_raw = lambda payload: sent.append(payload) or 0  # type: ignore[func-returns-value, method-assign]
                stray.run_request(list(range(200, 220)))
            for batch in sent:
                fleet.index.apply(engine.endpoint, batch)
            await until("sound", lambda: fleet.status("pod-a").sound)
            assert [report(fleet, 20, 0) for _ in range(3)] == [False, False, True]
            await agrees(fleet, engine)
            await until("sound again", lambda: fleet.status("pod-a").sound and fleet.status("pod-a").complete)

        with_fleet(scenario, **QUICK_RULE)


@pytest.mark.parametrize("who", [{"tenant": "acme"}, {"model": "other"}, {"rank": 3}])
def test_reports_of_others_are_not_counted(who: dict[str, object]) -> None:
    with FakeEngine(pool=PoolShape(num_blocks=12, block_size=4)) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            assert fleet.feedback("pod-a", 8, 0, **{"tenant": "default", **who}) == []  # type: ignore[arg-type]
            assert fleet.feedback("pod-b", 8, 0, tenant="default") == []

        with_fleet(scenario)
