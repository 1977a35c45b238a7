"""Recorded histories of faulty runs keep every promise; and each promise's validator knows a broken one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from history import (
    Applied,
    Breach,
    Entry,
    Published,
    RecordingEngine,
    RecordingFleet,
    Said,
    Settled,
    Validator,
    Withdrawn,
    p1_order,
    p2_no_silent_falsehood,
    p3_convergence,
    p5_isolation,
)
from kvindexer.index.engine import PyIndex
from kvindexer.settings import Settings
from kvindexer.testing import Faults, LinkFaults
from live import QUICK, Uncounted, agrees, connected, spec_of
from proxied import flags, traffic

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


def harm(engine: RecordingEngine, dice: random.Random) -> None:
    """One thing that goes wrong, or gets well again."""
    last = engine.last_seq or 0
    match dice.randrange(7):
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
        case _:
            engine.network, engine.faults = LinkFaults(), Faults()


async def faulty_run(seed: int) -> tuple[list[Entry], set[str]]:
    """Two engines to which things happen, one to which nothing does; what was recorded, and who was harmed."""
    history: list[Entry] = []
    dice = random.Random(seed)
    settings = Settings(**QUICK)
    fleet = RecordingFleet(history, settings, lambda least: PyIndex(None, None, least), Uncounted())
    with ExitStack() as stack:
        engines = [
            stack.enter_context(RecordingEngine(history, hash_seed=i, buffer_steps=steps))
            for i, steps in enumerate((10_000, 10_000, 40))
        ]
        bad = engines[1:]
        async with fleet.running():
            for i, engine in enumerate(engines):
                fleet.register(spec_of(engine, f"pod-{i}"))
            for engine in engines:
                await connected(engine)
                await flags(fleet, engine, sound=True, complete=True)
            for step in range(STEPS):
                harm(dice.choice(bad), dice)
                for engine in engines:
                    traffic(engine, dice.randrange(4), step)
                await asyncio.sleep(dice.choice((0.0, 0.01, 0.1)))
            for engine in bad:
                engine.network, engine.faults = LinkFaults(), Faults()
            for engine in engines:
                await connected(engine)
                engine.reset()  # what lies beyond a buffer can't be repaired otherwise
                traffic(engine, 3)
            for engine in engines:
                await agrees(fleet, engine)
                await flags(fleet, engine, sound=True, complete=True)
                fleet.settled(engine)
    return history, {engine.endpoint for engine in bad}


@pytest.mark.parametrize("seed", range(6))
def test_a_faulty_run_keeps_every_promise(seed: int) -> None:
    """P1, P2, P3, P5."""
    history, harmed = asyncio.run(faulty_run(seed))
    assert p1_order(history) is None
    assert p2_no_silent_falsehood(history) is None
    assert p3_convergence(history) is None
    assert p5_isolation(history, harmed) is None
    kinds = {type(entry) for entry in history}
    assert kinds == {Published, Applied, Withdrawn, Said, Settled}, "the run was worth recording"


# -- histories made by hand ----------------------------------------------------------------------------------

LIVE = Said(0, "a", "live", sound=True, complete=True)
JOINED_LATE = LIVE._replace(complete=False)
UNSURE = Said(0, "a", "live", sound=False, complete=False)
GONE = Withdrawn(0, "a", "new_life")


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


def for_a(history: Sequence[Entry]) -> Breach | None:
    """P5 where "a" is the source that nothing has befallen."""
    return p5_isolation(history, harmed={"b"})


BAD += [
    (for_a, [LIVE, GONE], "withdrawn"),
    (for_a, [LIVE, UNSURE], "lost its state or a flag"),
    (for_a, [LIVE, LIVE._replace(state="stale")], "lost its state or a flag"),
    (for_a, [*published((1, 0), (1, 1)), *applied((1, 0))], "never applied"),
    (for_a, [*published((1, 0)), *applied((2, 0))], "never applied"),
]


@pytest.mark.parametrize("history", GOOD)
def test_validators_accept_a_history_that_keeps_the_promises(history: Sequence[Entry]) -> None:
    for validator in (p1_order, p2_no_silent_falsehood, p3_convergence):
        assert validator(history) is None
    assert p5_isolation(history, harmed={"a", "b"}) is None


@pytest.mark.parametrize(("validator", "history", "what"), BAD)
def test_validators_reject_a_history_that_breaks_theirs(
    validator: Validator, history: Sequence[Entry], what: str
) -> None:
    breach = validator(history)
    assert breach is not None
    assert breach.source == "a"
    assert what in breach.what
