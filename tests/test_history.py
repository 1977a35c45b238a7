"""Recorded histories of faulty runs keep every promise; and each promise's validator knows a broken one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from history import (
    Answered,
    Applied,
    Asked,
    Entry,
    Followed,
    Full,
    Gauged,
    Harmed,
    Healed,
    Logged,
    Planted,
    Published,
    Said,
    Settled,
    Shed,
    Withdrawn,
)
from kvindexer.index.seam import IndexLimits
from kvindexer.settings import Settings
from kvindexer.testing import BlockStored, FakeEngine, Faults, LinkFaults
from live import QUICK, agrees, connected, spec_of, until
from promises import (
    MATCH,
    OK,
    READY,
    Breach,
    Validator,
    p1_order,
    p2_no_silent_falsehood,
    p3_convergence,
    p4_every_answer_says_how_sure_it_is,
    p5_isolation,
    p6_availability,
    p7_bounds,
    p8_readiness,
    p9_secrecy,
)
from proxied import flags, report, traffic
from recorder import Caller, RecordingEngine, plant, recorded_logs, recorded_service

ALL: list[Validator] = [
    p1_order,
    p2_no_silent_falsehood,
    p3_convergence,
    p4_every_answer_says_how_sure_it_is,
    p5_isolation,
    p6_availability,
    p7_bounds,
    p8_readiness,
    p9_secrecy,
]
STEPS = 25
LINKS = [
    LinkFaults(latency_s=0.02),
    LinkFaults(slice_bytes=5),
    LinkFaults(byte_limit=30_000),
    LinkFaults(stall=True),
    LinkFaults(blackhole=True),
    LinkFaults(reset=True),
    LinkFaults(down=True),
]
REPLAYS = [
    Faults(replay_silent=True),
    Faults(replay_no_end=True),
    Faults(replay_garbage=True),
    Faults(replay_stop_after=3),
    Faults(replay_skip_seqs=frozenset(range(0, 500, 7))),
]
MARKS = (b"QzXq", b"JvKj", b"WxVq", b"XjQk")
"""Names of token ids that nothing else in a run is called."""
MARKED = [int.from_bytes(name, "big") for name in MARKS]


def poison(dice: random.Random) -> bytes:
    """A message that can't be read, and would tell something about a prompt if it were shown."""
    stamp = dice.random()
    kinds: list[bytes] = [
        b"".join([b"\xc1", str(stamp).encode(), *MARKS]),
        msgpack.packb([stamp, [["BlockStored", "no hashes", None, MARKED, 4]], 0]),
        msgpack.packb([stamp, [["BlockStored", [1], None, [*MARKED, "no token"], 4]], 0]),
    ]
    return dice.choice(kinds)


def harm(engine: RecordingEngine, dice: random.Random) -> None:
    """One thing that goes wrong, or gets well again."""
    last = engine.last_seq or 0
    engine.harmed("by a throw of the dice")
    match dice.randrange(8):
        case 0 | 1:
            engine.network = dice.choice(LINKS)
        case 2:
            engine.faults = dice.choice(REPLAYS)
        case 3:
            engine.faults = Faults(drop_seqs=frozenset(range(last + 1, last + dice.randrange(2, 20))))
        case 4:
            engine.restart(hash_seed=dice.random().hex())
        case 5:
            engine.events.cut()
        case 6:
            engine.publish_raw(poison(dice))
        case _:
            engine.heal()


async def questions(caller: Caller, instances: list[str], dice: random.Random, enough: asyncio.Event) -> None:
    """What schedulers, operators and probes ask, and what callers get wrong."""
    prompt = [*MARKED, *(dice.randrange(100) for _ in range(8))]
    wrong = [
        b'{"model": "m", "tokens": [%d, ' % MARKED[0],
        {"model": "m", "tokens": [*MARKED, -1]},
        {"model": "m", "tokens": [*MARKED, str(MARKED[0])]},
        {"model": "m", "tokens": MARKED, "prompt_tokens": MARKED[1]},
        {"model": "m", "tokens": {"of": MARKED}},
        {"model": "nobody's", "tokens": MARKED},
    ]
    while not enough.is_set():
        await caller.ask(READY)
        await caller.ask(MATCH, {"model": "m", "tokens": prompt, "candidates": instances})
        await caller.ask("/query", {"model": "m", "token_ids": prompt})
        await caller.ask(dice.choice((MATCH, "/query")), dice.choice(wrong), valid=False)
        await caller.ask(dice.choice(("/metrics", "/v1/sources", "/health")))
        await asyncio.sleep(0.01)


async def faulty_run(seed: int) -> list[Entry]:
    """Two engines to which things happen, one to which nothing does, and callers who never stop asking."""
    history: list[Entry] = []
    dice = random.Random(seed)
    with ExitStack() as stack:
        stack.enter_context(recorded_logs(history))
        engines = [
            stack.enter_context(RecordingEngine(history, hash_seed=i, buffer_steps=steps))
            for i, steps in enumerate((10_000, 10_000, 40))
        ]
        bad = engines[1:]
        for mark in MARKS:
            plant(history, mark)
        specs = [spec_of(engine, f"pod-{i}") for i, engine in enumerate(engines)]
        settings = Settings(**QUICK, sources=tuple(specs))
        async with recorded_service(history, settings) as (fleet, caller):
            for engine in engines:
                await connected(engine)
                await flags(fleet, engine, sound=True, complete=True)
            enough, instances = asyncio.Event(), [spec.instance for spec in specs]
            asking = asyncio.create_task(questions(caller, instances, random.Random(seed), enough), name="questions")
            for step in range(STEPS):
                harm(dice.choice(bad), dice)
                for engine in engines:
                    traffic(engine, dice.randrange(4), step)
                    engine.run_request(MARKED * 2)
                await asyncio.sleep(dice.choice((0.0, 0.01, 0.1)))
            for engine in bad:
                engine.heal()
            for engine in engines:
                await connected(engine)
                engine.reset()  # what lies beyond a buffer can't be repaired otherwise
                traffic(engine, 3)
            for engine in engines:
                await agrees(fleet, engine)
                await flags(fleet, engine, sound=True, complete=True)
                fleet.settled(engine)
            enough.set()
            await asking
            await caller.count_shed()
    return history


async def full_rooms() -> list[Entry]:
    """A source with more to say than there is room for: frames behind a hole, then blocks of unknown place."""
    history: list[Entry] = []
    settings = Settings(**QUICK, held_max_frames=8)
    limits = IndexLimits(max_orphans_per_source=5, max_entries_per_source=30)
    with RecordingEngine(history) as engine:
        async with recorded_service(history, settings, limits) as (fleet, caller):
            fleet.register(spec_of(engine))
            await connected(engine)
            await flags(fleet, engine, sound=True, complete=True)
            engine.harmed("a hole, and nobody to fill it")
            engine.faults = Faults(replay_silent=True, drop_seqs=frozenset({0}))
            for number in range(40):
                orphan = BlockStored((b"%032d" % number,), b"%032d" % (number + 1_000), (1, 2, 3, 4), 4, 1)
                engine.publish_events([orphan])
            await until("it has waited in vain", lambda: report(fleet, engine).seq is not None)
            engine.heal()
            traffic(engine, 60)
            await until("all are in", lambda: report(fleet, engine).seq == engine.last_seq)
            await caller.count_shed()
    return history


async def slow_start() -> list[Entry]:
    """Of two sources known at start one is out of reach; another one that is comes when all is ready."""
    history: list[Entry] = []
    with RecordingEngine(history) as engine, FakeEngine() as away, FakeEngine() as later:
        away.stop()
        later.stop()
        traffic(engine, 10)
        sources = (spec_of(engine), spec_of(away, "pod-away"))
        settings = Settings(**QUICK, sources=sources, stale_after_s=0.3, sync_deadline_s=2.5)
        async with recorded_service(history, settings) as (fleet, caller):
            while await caller.ask(READY) != OK:  # noqa: ASYNC110 - asks again and again, as a probe does
                await asyncio.sleep(0.05)
            fleet.register(spec_of(later, "pod-later"))
            for _ in range(3):
                await caller.ask(READY)
    return history


@cache
def recorded(run: Callable[[], Awaitable[list[Entry]]]) -> Sequence[Entry]:
    """The history of a run that several tests look at."""
    return asyncio.run(run())  # type: ignore[arg-type]


def breaches(history: Sequence[Entry]) -> list[Breach]:
    """What each validator finds."""
    return [breach for validator in ALL if (breach := validator(history)) is not None]


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(6))
def test_a_faulty_run_keeps_every_promise(seed: int) -> None:
    """P1 to P9, over real sockets."""
    history = asyncio.run(faulty_run(seed))
    assert breaches(history) == []
    kinds = {type(entry) for entry in history}
    assert kinds >= {Published, Harmed, Applied, Said, Settled, Gauged, Asked, Answered, Logged, Planted}
    assert {it.status for it in history if isinstance(it, Answered)} > {200}, "mistakes were answered too"
    first, *_, newest = (entry for entry, it in enumerate(history) if isinstance(it, Harmed | Healed))
    assert any(isinstance(it, Asked) and it.path == MATCH for it in history[first:newest]), (
        "asked in the worst of times"
    )


def test_full_rooms_are_within_their_limits_and_counted() -> None:
    """P7: held frames, orphans and entries all find their limits, and every promise is kept meanwhile."""
    history = recorded(full_rooms)
    assert breaches(history) == []
    assert {it.room for it in history if isinstance(it, Full)} == {"held_frames", "index"}
    at_limit = {it.room for it in history if isinstance(it, Gauged) and it.value == it.limit}
    assert at_limit >= {"held_frames", "orphans"}


def test_a_slow_start_is_ready_once_and_for_all() -> None:
    """P8: also if the source that holds it up is called stale before its time is over."""
    history = recorded(slow_start)
    assert breaches(history) == []
    assert {it.status for it in history if isinstance(it, Answered)} == {200, 503}
    assert "stale" in {it.state for it in history if isinstance(it, Said)}


# -- histories that a run has written, and somebody has altered ------------------------------------------------


def healthy_run() -> Awaitable[list[Entry]]:
    """One of the faulty runs."""
    return faulty_run(0)


Run = Callable[[], Awaitable[list[Entry]]]
Alter = Callable[[list[Entry], int], None]
"""Changes the history at this entry."""


def is_a(kind: type, **fields: object) -> Callable[[Entry], bool]:
    """Entries of this kind with these values."""
    return lambda it: isinstance(it, kind) and all(getattr(it, name) == value for name, value in fields.items())


def is_match(it: Entry) -> bool:
    """Good answers of /v1/match."""
    return isinstance(it, Answered) and it.text.startswith('{"model":"m","blocks"')


def is_ready(it: Entry) -> bool:
    """Answers of /ready."""
    return isinstance(it, Answered) and it.text.startswith('{"ready"')


def leave_out(history: list[Entry], entry: int) -> None:
    """It never was."""
    del history[entry]


def repeat(history: list[Entry], entry: int) -> None:
    """It was twice."""
    history.insert(entry, history[entry])


def with_values(**values: Any) -> Alter:
    """It was something else."""

    def alter(history: list[Entry], entry: int) -> None:
        history[entry] = history[entry]._replace(**values)

    return alter


def with_row(**values: object) -> Alter:
    """The answer had these values in its first row; None: not even the field."""

    def alter(history: list[Entry], entry: int) -> None:
        it = history[entry]
        assert isinstance(it, Answered)
        answer = json.loads(it.text)
        row = {**answer["matches"][0], **values}
        answer["matches"][0] = {name: value for name, value in row.items() if value is not None}
        history[entry] = it._replace(text=json.dumps(answer))

    return alter


def and_then(*more: Entry) -> Alter:
    """This came behind it."""

    def alter(history: list[Entry], entry: int) -> None:
        history[entry + 1 : entry + 1] = more

    return alter


def withdrawn(history: list[Entry], entry: int) -> None:
    """Its source was withdrawn then."""
    it = history[entry]
    assert isinstance(it, Said)
    history.insert(entry, Withdrawn(it.at, it.source, "gone"))


ALTERED: list[tuple[Validator, Run, Callable[[Entry], bool], Alter]] = [
    (p1_order, healthy_run, is_a(Applied), repeat),
    (p1_order, healthy_run, is_a(Applied), with_values(digest=0)),
    (p2_no_silent_falsehood, slow_start, is_a(Applied, seq=0), leave_out),
    (p2_no_silent_falsehood, slow_start, is_a(Applied, seq=3), leave_out),
    (p3_convergence, healthy_run, is_a(Settled), with_values(claimed={"a block": 1})),
    (p3_convergence, healthy_run, is_a(Settled), with_values(claimed={})),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(sound=False)),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(complete=False)),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(state="stale")),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(state=None)),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(lag_ms=None)),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(lag_ms=1e9)),
    (p4_every_answer_says_how_sure_it_is, healthy_run, is_match, with_row(instance="somebody else")),
    (p5_isolation, slow_start, is_a(Applied), leave_out),
    (p5_isolation, slow_start, is_a(Said, state="live"), withdrawn),
    (p6_availability, healthy_run, is_match, leave_out),
    (p6_availability, healthy_run, is_match, with_values(status=503)),
    (p7_bounds, full_rooms, is_a(Gauged, room="held_frames"), with_values(value=9)),
    (p7_bounds, full_rooms, is_a(Gauged, room="orphans"), with_values(value=6)),
    (p7_bounds, full_rooms, is_a(Shed, room="held_frames"), with_values(total=0)),
    (p7_bounds, full_rooms, is_a(Shed, room="index"), leave_out),
    (p8_readiness, slow_start, is_ready, with_values(status=503)),
    (p8_readiness, slow_start, lambda it: is_ready(it) and "true" in str(it), with_values(status=503)),
    (p9_secrecy, healthy_run, is_match, with_values(text=f"tokens: [{MARKED[1]}]")),
    (p9_secrecy, healthy_run, is_a(Logged), with_values(text=f"can't read {MARKS[2]!r}")),
    (p9_secrecy, healthy_run, is_a(Logged), and_then(Logged(0, f"token 0x{MARKED[3]:x}"))),
]


@pytest.mark.parametrize(("validator", "run", "wanted", "alter"), ALTERED)
def test_validators_notice_what_was_altered(
    validator: Validator, run: Run, wanted: Callable[[Entry], bool], alter: Alter
) -> None:
    """Each in the last entry of a kind, in a history that was good before."""
    history = list(recorded(run))
    assert validator(history) is None
    alter(history, max(entry for entry, it in enumerate(history) if wanted(it)))
    assert validator(history) is not None


# -- histories made by hand ----------------------------------------------------------------------------------

LIVE = Said(0, "a", "live", sound=True, complete=True)
JOINED_LATE = LIVE._replace(complete=False)
UNSURE = Said(0, "a", "live", sound=False, complete=False)
GONE = Withdrawn(0, "a", "new_life")
KNOWN = Followed(0, "a", "a")
AWAITED = Followed(0, "a", "a", awaited_until=20.0)


def published(*messages: tuple[int, int], source: str = "a") -> list[Entry]:
    return [Published(0, source, life, seq, 1_000 * life + seq) for life, seq in messages]


def applied(*messages: tuple[int, int], source: str = "a") -> list[Entry]:
    return [Applied(0, source, seq, 1_000 * life + seq) for life, seq in messages]


TWO_LIVES = published((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2))
GOOD: list[Sequence[Entry]] = [
    [],
    [*TWO_LIVES, *applied((1, 0), (1, 1), (1, 2)), LIVE, GONE, *applied((2, 0), (2, 1), (2, 2)), LIVE],
    [*TWO_LIVES, *applied((1, 1)), JOINED_LATE, *applied((2, 2)), UNSURE],
    [*TWO_LIVES, *applied((1, 0), (1, 2)), UNSURE, GONE, *applied((1, 0), (1, 1), (1, 2)), LIVE],
    [*TWO_LIVES, Published(0, "a", 2, 3, 2_003, clears=True), *applied((1, 1), (2, 3)), LIVE],
    [LIVE, Settled(0, "a", {"x": 2}, {"x": 2})],
    [UNSURE, Settled(0, "a", {"x": 1, "y": 1}, {"x": 2})],
    [JOINED_LATE, Settled(0, "a", {"x": 1}, {"x": 2, "y": 1})],
    [LIVE, Settled(0, "a", {}, {}), *published((1, 0), source="b"), Withdrawn(0, "b", "gone")],
    [AWAITED, Asked(1, 0, READY), Answered(1, 0, 503, ""), LIVE, Asked(2, 1, READY), Answered(2, 1, 200, "")],
    [AWAITED, Asked(19, 0, READY), Answered(19, 0, 503, ""), Asked(20, 1, READY), Answered(20, 1, 200, "")],
    [Planted(0, "1234"), Logged(0, "12345 01234"), Answered(0, 0, 404, "123 4")],
    [Full(0, "a", "orphans"), Gauged(0, "a", "orphans", 5, 5), Shed(0, "orphans", 1)],
]
BAD: list[tuple[Validator, Sequence[Entry], str]] = [
    (p1_order, [*TWO_LIVES, *applied((1, 0), (1, 0))], "behind"),
    (p1_order, [*TWO_LIVES, *applied((1, 1), (1, 0))], "behind"),
    (p1_order, [*TWO_LIVES, *applied((1, 1), (2, 0))], "behind"),
    (p1_order, [*published((1, 0), source="b"), *applied((1, 0))], "never published"),
    (p1_order, [*TWO_LIVES, Applied(0, "a", 1, 1_000)], "never published"),
    (p2_no_silent_falsehood, [*TWO_LIVES, *applied((1, 0), (1, 2)), LIVE], "called sound"),
    (p2_no_silent_falsehood, [*TWO_LIVES, *applied((1, 1)), *applied((2, 2)), JOINED_LATE], "called sound"),
    (p2_no_silent_falsehood, [*TWO_LIVES, *applied((2, 0), (1, 1)), LIVE], "called sound"),
    (p2_no_silent_falsehood, [*TWO_LIVES, *applied((1, 1), (1, 2)), LIVE], "called complete"),
    (p2_no_silent_falsehood, [*TWO_LIVES, *applied((1, 0)), GONE, *applied((2, 1)), LIVE], "called complete"),
    (p2_no_silent_falsehood, [Published(0, "a", 1, 0, 1_000, clears=True), *applied((1, 0), (1, 2)), LIVE], "sound"),
    (p3_convergence, [Settled(0, "a", {}, {})], "not live"),
    (p3_convergence, [LIVE, LIVE._replace(state="stale"), Settled(0, "a", {}, {})], "not live"),
    (p3_convergence, [JOINED_LATE, Settled(0, "a", {"x": 1}, {})], "are gone"),
    (p3_convergence, [LIVE, Settled(0, "a", {"x": 1}, {"x": 2})], "misses"),
]


NOTHING_FOUND = '{"matches": []}'
BAD += [
    (
        p4_every_answer_says_how_sure_it_is,
        [KNOWN, LIVE, Asked(1, 0, MATCH), Answered(1, 0, 200, NOTHING_FOUND)],
        "not",
    ),
    (p5_isolation, [LIVE, GONE], "withdrawn"),
    (p5_isolation, [LIVE, UNSURE], "lost its state or a flag"),
    (p5_isolation, [LIVE, LIVE._replace(state="stale")], "lost its state or a flag"),
    (p5_isolation, [*published((1, 0), (1, 1)), *applied((1, 0))], "never applied"),
    (p5_isolation, [*published((1, 0)), *applied((2, 0))], "never applied"),
    (p7_bounds, [Gauged(0, "a", "orphans", 6, 5)], "limit is 5"),
    (p8_readiness, [AWAITED, Asked(1, 0, READY), Answered(1, 0, 200, "")], "neither been live"),
]


def test_ready_before_its_time_is_noticed() -> None:
    """In the first entry: the last one may be answered when its time has just come."""
    history = list(recorded(slow_start))
    early = min(entry for entry, it in enumerate(history) if is_ready(it) and "false" in str(it))
    with_values(status=200)(history, early)
    assert p8_readiness(history) is not None


@pytest.mark.parametrize("history", GOOD)
def test_validators_accept_a_history_that_keeps_the_promises(history: Sequence[Entry]) -> None:
    assert breaches([Harmed(0, "a", "something"), Harmed(0, "b", "something"), *history]) == []


@pytest.mark.parametrize(("validator", "history", "what"), BAD)
def test_validators_reject_a_history_that_breaks_theirs(
    validator: Validator, history: Sequence[Entry], what: str
) -> None:
    breach = validator(history)
    assert breach is not None
    assert breach.source == "a"
    assert what in breach.what
