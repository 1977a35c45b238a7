"""Streams over real sockets: each trap that broke an indexer, against an engine that knows what it holds."""

from __future__ import annotations

import random

import pytest

from kvindexer.events.fleet import LiveFleet
from kvindexer.events.status import SourceReport
from kvindexer.testing import FakeEngine, Faults, PoolShape, Vllm
from live import agrees, connected, held, spec_of, until, with_fleet

SMALL = PoolShape(num_blocks=40, block_size=4)


def traffic(engine: FakeEngine, requests: int, seed: int = 0) -> None:
    """Prompts that share prefixes, in a cache that is too small for them."""
    dice = random.Random(seed)
    shared = [[dice.randrange(100) for _ in range(12)] for _ in range(3)]
    for _ in range(requests):
        tokens = dice.choice(shared) + [dice.randrange(100) for _ in range(dice.randrange(1, 30))]
        engine.run_request(tokens, max_tokens=dice.choice((1, 6)))
    engine.publisher.flush()


def report(fleet: LiveFleet) -> SourceReport:
    return fleet.reports()[0]


async def flags(fleet: LiveFleet, *, sound: bool, complete: bool) -> None:
    await until(
        f"live, sound={sound}, complete={complete}; now {report(fleet)}",
        lambda: (report(fleet).state, report(fleet).sound, report(fleet).complete) == ("live", sound, complete),
    )


@pytest.mark.parametrize("version", [(0, 9), (0, 12), (0, 23), (0, 25), (0, 26), (0, 33)])
def test_a_live_engine_is_followed_exactly(version: tuple[int, int]) -> None:
    """P1, P3: after traffic with evictions the index equals the engine, in every dialect and both replay framings."""
    with FakeEngine(pool=SMALL, dialect=Vllm(version)) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            traffic(engine, 20)
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 60, seed=1)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)
            assert report(fleet).gaps == 0

        with_fleet(scenario)


def test_trap_14_gap_with_replay_is_filled() -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 3)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)
            last = engine.last_seq or 0
            engine.faults = Faults(drop_seqs=frozenset(range(last + 2, last + 8)))
            traffic(engine, 40)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)
            assert report(fleet).gaps >= 1

        with_fleet(scenario)


def test_trap_14_gap_without_replay_takes_the_flags_and_later_events_count() -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, replay=False))
            await connected(engine)
            traffic(engine, 5)
            last = engine.last_seq or 0
            engine.faults = Faults(drop_seqs=frozenset({last + 2, last + 3}))
            traffic(engine, 10)
            await until("all applied", lambda: report(fleet).seq == engine.last_seq)
            assert (report(fleet).sound, report(fleet).complete) == (False, False)
            assert "no replay" in report(fleet).why or "lost" in report(fleet).why
            engine.reset()
            engine.run_request([1] * 9)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)  # a clear makes up for every loss

        with_fleet(scenario)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(replay_silent=True),
        Faults(replay_no_end=True),
        Faults(replay_garbage=True),
        Faults(replay_stop_after=3),
        Faults(replay_skip_seqs=frozenset({3, 4})),
    ],
    ids=["silent", "no-end", "garbage", "stops", "inner-gaps"],
)
def test_trap_14_a_bad_replay_never_makes_a_source_dark(faults: Faults) -> None:
    """Live events count meanwhile; once the replay socket behaves, everything is put right."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            traffic(engine, 12)
            engine.faults = faults
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 5, seed=1)
            await until("newest message applied", lambda: report(fleet).seq == engine.last_seq)
            assert not report(fleet).complete
            engine.faults = Faults()
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)

        with_fleet(scenario)


def test_trap_14_gap_older_than_the_buffer_is_shown() -> None:
    with FakeEngine(pool=SMALL, buffer_steps=4) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            await flags(fleet, sound=True, complete=True)
            traffic(engine, 5)
            await agrees(fleet, engine)
            last = engine.last_seq or 0
            engine.faults = Faults(drop_seqs=frozenset(range(last + 1, last + 20)))
            traffic(engine, 40)
            await until("newest message applied", lambda: report(fleet).seq == engine.last_seq)
            await flags(fleet, sound=False, complete=False)

        with_fleet(scenario)


@pytest.mark.parametrize("burst", [1, 60], ids=["seq-back-to-0", "seq-beyond-the-old-one"])
def test_trap_15_a_restart_withdraws_the_old_life(burst: int) -> None:
    """The engine is back under its endpoint with an empty cache, and perhaps past the old life's seq already."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 10)
            await agrees(fleet, engine)
            engine.restart(hash_seed=1)
            traffic(engine, burst, seed=7)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)
            assert report(fleet).epoch > 1

        with_fleet(scenario)


def test_trap_15_a_silent_restart_is_noticed() -> None:
    """Nothing is published after the restart: the replay socket tells."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 10)
            await agrees(fleet, engine)
            engine.restart()
            await agrees(fleet, engine)
            assert held(fleet, engine) == {}

        with_fleet(scenario)


@pytest.mark.parametrize("lost", [1, 5])
def test_trap_16_the_last_message_is_lost_and_nothing_follows(lost: int) -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 10)
            await agrees(fleet, engine)
            last = engine.last_seq or 0
            engine.faults = Faults(drop_seqs=frozenset(range(last + 1, last + 1 + lost)))
            while (engine.last_seq or 0) < last + lost:
                traffic(engine, 1, seed=engine.last_seq or 0)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)

        with_fleet(scenario)


def test_trap_17_a_late_join_is_live_and_not_complete() -> None:
    with FakeEngine(pool=SMALL, buffer_steps=5) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            traffic(engine, 30)
            fleet.register(spec_of(engine))
            await connected(engine)
            await flags(fleet, sound=True, complete=False)
            traffic(engine, 5, seed=1)
            await until("newest message applied", lambda: report(fleet).seq == engine.last_seq)
            in_cache = engine.held()
            known = held(fleet, engine)
            assert known
            assert all(in_cache.get(entry, 0) >= n for entry, n in known.items()), "nothing is claimed that is gone"

        with_fleet(scenario)


def test_trap_18_unregistered_while_events_are_in_flight() -> None:
    """Late events of a withdrawn source add nothing; registered again it starts from the engine's own history."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            spec = spec_of(engine)
            fleet.register(spec)
            await connected(engine)
            traffic(engine, 30)
            assert fleet.unregister("pod-a", model="m", tenant="default", rank=0) == [spec]
            traffic(engine, 5, seed=1)
            assert fleet.reports() == []
            assert fleet.index.keyspaces("default", "m") == []
            fleet.register(spec)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)

        with_fleet(scenario)


def test_trap_19_an_oversize_message_is_survived() -> None:
    """Libzmq hangs up for good at a message beyond the limit; the subscription recovers by itself."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 5)
            await agrees(fleet, engine)
            engine.publish_raw(b"\x00" * 200_000)
            dice = random.Random(1)

            def caught_up() -> bool:
                if dice.random() < 0.05:
                    traffic(engine, 1, seed=dice.randrange(1000))
                return report(fleet).seq == engine.last_seq and (engine.last_seq or 0) > 20

            await until("live events again", caught_up)
            assert (report(fleet).sound, report(fleet).complete) == (False, False)

        with_fleet(scenario, max_message_bytes=100_000)


def test_trap_20_an_idle_reset_is_told_with_the_next_step() -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 5)
            await agrees(fleet, engine)
            engine.reset()
            engine.run_request([5] * 9)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)

        with_fleet(scenario)


def test_trap_21_duplicates_and_overlapping_replays_never_inflate_copies() -> None:
    with FakeEngine(pool=SMALL, faults=Faults(duplicate_seqs=frozenset(range(0, 200, 3)))) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            traffic(engine, 10)
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 40, seed=1)
            await agrees(fleet, engine)
            assert report(fleet).epoch == 1

        with_fleet(scenario)


def test_trap_4_a_bad_batch_costs_only_itself() -> None:
    """Its seq counts, the flags say that something is missing, other sources do not notice."""
    with FakeEngine(pool=SMALL) as bad, FakeEngine(pool=SMALL, hash_seed=1) as good:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(bad, "pod-bad"))
            fleet.register(spec_of(good, "pod-good"))
            await connected(bad)
            await connected(good)
            for payload in (b"", b"\xc1", b"garbage", b"\x93\x01\x02\x03"):
                bad.publish_raw(payload)
            traffic(bad, 10)
            traffic(good, 10)
            await agrees(fleet, bad)
            await agrees(fleet, good)
            assert report(fleet).poison == 4
            assert not report(fleet).complete
            assert report(fleet).gaps == 0
            assert fleet.status("pod-good")[:3] == ("live", True, True)

        with_fleet(scenario)


def test_ready_waits_for_the_sources_known_at_start() -> None:
    """P8: and a source that is not there holds readiness up only until its deadline."""
    with FakeEngine(pool=SMALL) as engine:
        traffic(engine, 10)

        async def scenario(fleet: LiveFleet) -> None:
            assert not fleet.ready
            await until("ready", lambda: fleet.ready)
            assert held(fleet, engine) == engine.held()

        with_fleet(scenario, sources=(spec_of(engine),))

    async def unreachable(fleet: LiveFleet) -> None:
        assert not fleet.ready
        await until("ready", lambda: fleet.ready)

    with_fleet(unreachable, sources=(spec_of(engine),), sync_deadline_s=0.5)


def test_an_engine_that_is_cut_off_is_not_called_sound() -> None:
    """P2: a killed engine's blocks may be gone; nobody who asks for `sound` is sent there, from the cut on."""
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 5)
            await agrees(fleet, engine)
            await flags(fleet, sound=True, complete=True)
            assert fleet.status("pod-a")[:3] == ("live", True, True)
            engine.stop()
            await flags(fleet, sound=False, complete=False)
            assert report(fleet).why == "disconnected"
            assert fleet.status("pod-a")[:3] == ("live", False, False)

        with_fleet(scenario)
