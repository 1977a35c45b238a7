"""The network between the engines and the service breaks in every way that TCP can; real engine processes are killed.

Each test ends the same way: the network is whole again, and the index equals the engine's cache (P3), with both
flags up where the replay buffer reaches, and with flags that say so where it does not (P2).
"""

from __future__ import annotations

import asyncio

import pytest
import zmq

from children import Child
from kvindexer.events.fleet import LiveFleet
from kvindexer.events.sockets import SubscriberSettings, subscription_socket
from kvindexer.testing import FakeEngine, LinkFaults
from kvindexer.types import SourceSpec
from live import agrees, connected, held, spec_of, truth, until, with_fleet
from proxied import SMALL, ProxiedEngine, flags, held_at, report, traffic

pytestmark = pytest.mark.proof

WHOLE = LinkFaults()


async def in_sync(fleet: LiveFleet, engine: FakeEngine, *, replay: bool = True) -> None:
    """Register the engine and let it be followed for a while."""
    fleet.register(spec_of(engine, replay=replay))
    await connected(engine)
    await flags(fleet, engine, sound=True, complete=replay)
    traffic(engine, 10)
    await agrees(fleet, engine)
    await flags(fleet, engine, sound=True, complete=True)


@pytest.mark.parametrize(
    "faults",
    [
        LinkFaults(latency_s=0.05),
        LinkFaults(slice_bytes=1),
        LinkFaults(slice_bytes=7, latency_s=0.01),
        LinkFaults(byte_limit=20_000),
    ],
    ids=["latency", "slices", "slow-slices", "cut-every-20-kB"],
)
def test_a_bad_line_delays_and_falsifies_nothing(faults: LinkFaults) -> None:
    """P1, P3: through the fault, while it lasts."""
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            engine.network = faults
            for seed in range(5):
                traffic(engine, 20, seed)
                await asyncio.sleep(0.05)
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)
            assert report(fleet, engine).epoch == 1

        with_fleet(scenario)


def test_a_stall_shorter_than_the_heartbeat_is_only_lag() -> None:
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            engine.network = LinkFaults(stall=True)
            traffic(engine, 30, seed=1)
            await asyncio.sleep(1.0)
            engine.network = WHOLE
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)
            assert report(fleet, engine).epoch == 1

        with_fleet(scenario)


PARTITIONS = {
    "blackhole": LinkFaults(blackhole=True),
    "stall": LinkFaults(stall=True),
    "reset": LinkFaults(reset=True),
    "down": LinkFaults(down=True),
}


async def partitioned(engine: ProxiedEngine, fault: str) -> None:
    """Break the network, and wait until the subscriber has noticed: silence takes it longer than a reset."""
    before = engine.events.accepted
    engine.network = PARTITIONS[fault]
    if fault in {"blackhole", "stall"}:
        await until("the heartbeat has run out, it dials again", lambda: engine.events.accepted > before)


@pytest.mark.parametrize("fault", PARTITIONS)
def test_a_partition_during_traffic_with_evictions_is_made_up_for(fault: str) -> None:
    """P2, P3: stores and removals of the meantime come from the replay buffer, in order."""
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            await partitioned(engine, fault)
            traffic(engine, 40, seed=1)
            engine.network = WHOLE
            traffic(engine, 5, seed=2)
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)
            assert report(fleet, engine).epoch == 1

        with_fleet(scenario)


@pytest.mark.parametrize("fault", ["blackhole", "down"])
def test_a_partition_longer_than_the_replay_buffer_shows_in_the_flags(fault: str) -> None:
    """P2: what nobody can tell any more is not claimed to be known; a reset of the cache makes up for it."""
    with ProxiedEngine(buffer_steps=5) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            await flags(fleet, engine, sound=True, complete=True)
            traffic(engine, 3)
            await agrees(fleet, engine)
            await partitioned(engine, fault)
            traffic(engine, 40, seed=1)
            engine.network = WHOLE
            await connected(engine)
            traffic(engine, 5, seed=2)
            await until("the newest message is in", lambda: report(fleet, engine).seq == engine.last_seq)
            await flags(fleet, engine, sound=False, complete=False)
            engine.reset()
            engine.run_request([1] * 9)
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)

        with_fleet(scenario)


def test_dials_and_handshakes_have_deadlines_of_their_own() -> None:
    """Else a partition goes on after its end: for 30 s in a swallowed handshake, for a minute between two SYNs."""
    with zmq.Context() as context, subscription_socket(context, SubscriberSettings()) as socket:
        assert 0 < int(socket.getsockopt(zmq.CONNECT_TIMEOUT)) <= 5_000
        assert 0 < int(socket.getsockopt(zmq.HANDSHAKE_IVL)) <= 5_000


@pytest.mark.parametrize("fault", PARTITIONS)
@pytest.mark.parametrize("burst", [0, 1, 60], ids=["silent", "seq-below", "seq-already-past"])
def test_a_restart_behind_a_partition_is_found_out(fault: str, burst: int) -> None:
    """P2, P3, trap 15: nothing on the wire names the life, and the new one may be past the old one's seq."""
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            old = engine.last_seq or 0
            engine.network = PARTITIONS[fault]
            engine.restart(hash_seed=1)
            traffic(engine, burst, seed=1)
            assert burst < 60 or (engine.last_seq or 0) > old
            await asyncio.sleep(0.5)
            engine.network = WHOLE
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)
            assert report(fleet, engine).epoch == 2
            traffic(engine, 10, seed=2)
            await agrees(fleet, engine)

        with_fleet(scenario)


@pytest.mark.parametrize("fault", ["reset", "down"])
def test_without_a_replay_socket_a_reconnect_takes_the_flags_off(fault: str) -> None:
    """P2: what was lost can't be asked for; later events count, and a reset of the cache makes up for it."""
    with ProxiedEngine(replay_endpoint=None) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, replay=False))
            await connected(engine)
            traffic(engine, 10)
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)
            engine.network = PARTITIONS[fault]
            traffic(engine, 10, seed=1)
            engine.network = WHOLE
            await flags(fleet, engine, sound=False, complete=False)
            await connected(engine)
            traffic(engine, 10, seed=2)
            await until("the newest message is in", lambda: report(fleet, engine).seq == engine.last_seq)
            assert not report(fleet, engine).sound
            engine.reset()
            engine.run_request([1] * 9)
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)

        with_fleet(scenario)


@pytest.mark.parametrize("burst", [1, 60], ids=["seq-below", "seq-already-past"])
def test_without_a_replay_socket_a_restart_is_never_claimed_to_be_sound(burst: int) -> None:
    """P2, trap 15: a seq that goes back is a new life; one that goes on can't be told from a gap."""
    with ProxiedEngine(replay_endpoint=None) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, replay=False))
            await connected(engine)
            traffic(engine, 10)
            await agrees(fleet, engine)
            engine.network = LinkFaults(down=True)
            engine.restart(hash_seed=1)
            traffic(engine, burst, seed=1)
            engine.network = WHOLE
            await connected(engine)
            traffic(engine, 1, seed=2)
            await until("the newest message is in", lambda: report(fleet, engine).seq == engine.last_seq)
            now = report(fleet, engine)
            assert not now.complete
            wrong = set(held(fleet, engine)) - set(truth(engine))
            assert not now.sound or not wrong

        with_fleet(scenario)


def test_a_replay_cut_in_the_middle_is_shown_and_tried_again() -> None:
    """P2, P3, trap 14: live events count meanwhile."""
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            traffic(engine, 60)
            assert engine.replays is not None
            engine.replays.faults = LinkFaults(byte_limit=4_000)
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 5, seed=1)
            await until("the newest message is in", lambda: report(fleet, engine).seq == engine.last_seq)
            await until("tried again", lambda: len(engine.replay_requests) > 2)
            assert not report(fleet, engine).complete
            engine.replays.faults = WHOLE
            await agrees(fleet, engine)
            await flags(fleet, engine, sound=True, complete=True)

        with_fleet(scenario)


def test_a_probe_in_vain_costs_a_long_lived_engine_no_more_than_a_short_one() -> None:
    """P3: its buffer does not reach back to its first message, and need not: the next probe proves the newest."""
    with ProxiedEngine(buffer_steps=5) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            assert (engine.last_seq or 0) > 10
            assert engine.replays is not None
            engine.replays.faults = LinkFaults(down=True)
            await flags(fleet, engine, sound=False, complete=False)
            engine.replays.faults = WHOLE
            await flags(fleet, engine, sound=True, complete=True)
            await agrees(fleet, engine)

        with_fleet(scenario)


@pytest.mark.parametrize("fault", PARTITIONS)
def test_a_replay_socket_out_of_reach_costs_the_flags_and_no_events(fault: str) -> None:
    """P2: nobody can say whether the newest message is the last; live events count all the same."""
    with ProxiedEngine() as engine:

        async def scenario(fleet: LiveFleet) -> None:
            await in_sync(fleet, engine)
            assert engine.replays is not None
            engine.replays.faults = PARTITIONS[fault]
            traffic(engine, 10, seed=1)
            await flags(fleet, engine, sound=False, complete=False)
            traffic(engine, 10, seed=2)
            await agrees(fleet, engine)
            engine.replays.faults = WHOLE
            await flags(fleet, engine, sound=True, complete=True)
            await agrees(fleet, engine)
            assert report(fleet, engine).epoch == 1

        with_fleet(scenario)


def test_one_source_behind_a_broken_network_harms_no_other() -> None:
    """P5: while one is cut again and again, the other stays exact, sound and complete."""
    with ProxiedEngine() as bad, FakeEngine(pool=bad.shape, hash_seed=1) as good:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(bad, "pod-bad"))
            fleet.register(spec_of(good, "pod-good"))
            await connected(good)
            await flags(fleet, good, sound=True, complete=True)
            for seed in range(10):
                bad.network = list(PARTITIONS.values())[seed % len(PARTITIONS)]
                traffic(good, 10, seed)
                await agrees(fleet, good)
                assert (report(fleet, good).sound, report(fleet, good).complete) == (True, True)
                bad.network = WHOLE
                bad.events.cut()
                traffic(bad, 5, seed)
            await agrees(fleet, bad)
            await flags(fleet, bad, sound=True, complete=True)
            assert report(fleet, good).gaps == 0

        with_fleet(scenario)


class EngineProcess(Child):
    """A fake engine in a process of its own, to be killed without warning."""

    def __init__(self, ports: tuple[str, str], life: int) -> None:
        super().__init__("engine_process", *ports, str(life))
        self.endpoint, self.replay_endpoint = self.said

    @property
    def ports(self) -> tuple[str, str]:
        """Of events and of replays; the next life has the same."""
        return self.endpoint.rpartition(":")[2], self.replay_endpoint.rpartition(":")[2]

    def under_load(self) -> None:
        """Requests without end, from now on."""
        self.ask("load")

    def truth(self) -> dict[tuple[int, int], int]:
        """End the load; what its cache holds."""
        return {(group, block_hash): copies for group, block_hash, copies in self.ask("held")}


@pytest.mark.parametrize("pause_s", [0.0, 1.0], ids=["back-at-once", "back-after-a-second"])
def test_kill_9_of_an_engine_process_under_load(pause_s: float) -> None:
    """P2, P3, trap 15: three lives on the same ports, two killed; the index ends equal to the last one's cache."""

    async def scenario(fleet: LiveFleet) -> None:
        engine = await asyncio.to_thread(EngineProcess, ("0", "0"), 1)
        try:
            source = engine.endpoint
            fleet.register(
                SourceSpec(
                    instance="pod-a",
                    model="m",
                    block_size=SMALL.block_size,
                    endpoint=source,
                    replay=engine.replay_endpoint,
                )
            )
            for life in (2, 3):
                heard = fleet.reports()[0].batches
                await asyncio.to_thread(engine.under_load)
                await until("under load", lambda heard=heard: fleet.reports()[0].batches > heard + 50)  # type: ignore[misc]
                engine.kill()
                await asyncio.sleep(pause_s)
                engine = await asyncio.to_thread(EngineProcess, engine.ports, life)
            await asyncio.to_thread(engine.under_load)
            await asyncio.sleep(0.3)
            truth = await asyncio.to_thread(engine.truth)
            assert truth
            await until("the last life's cache", lambda: held_at(fleet, source) == truth)
            await until("both flags", lambda: fleet.status("pod-a")[:3] == ("live", True, True))
            assert fleet.reports()[0].epoch == 3
        finally:
            engine.kill()

    with_fleet(scenario)
