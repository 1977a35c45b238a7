"""Replicas of one source against a model of an engine and of what can happen to them, writing to a real Redis.

Streams, indices, shards and scripts are the real ones; time, the network between engine and replicas, and who is
awake when are Hypothesis'.  The engine's block pool knows what was held after each of its messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, event
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis import Redis
from xxhash import xxh3_128_digest

from kvindexer.events.states import Action, Apply, Ask, Withdraw
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.index.engine import PyIndex
from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.store import layout
from kvindexer.store.connect import open_client
from kvindexer.store.growing import grow
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Found, Meta, Names, shard_tag
from kvindexer.store.server import Refusal, ShardServer
from kvindexer.store.shard import Flush, Grow, Load, Rewrite, Shard
from kvindexer.store.turns import turn
from kvindexer.store.writing import Writing
from kvindexer.testing import BlockPool, Vllm
from kvindexer.types import TIERS, Epoch, SourceSpec, Tier
from servers import Server

pytestmark = pytest.mark.proof

NAMES = ("a", "b", "c")
SPEC = SourceSpec(instance="pod", model="m", block_size=2, endpoint="tcp://engine:1", replay="tcp://engine:2")
SOURCE = SPEC.endpoint
BUFFER_STEPS = 12
TAKEOVER_S = 3.0
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=2)
REPLICA = st.sampled_from(NAMES)
Copies = Mapping[tuple[int, Any], int]

_servers: list[Server] = []


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """A server, and buckets so small that shards of a few blocks outgrow theirs."""
    with Server() as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "BUCKET_ENTRIES", 2)
        _servers.append(server)
        yield
        _servers.clear()


class Engine:
    """Lives with their messages, what was held after each, and the replay buffer of the present one."""

    def __init__(self) -> None:
        self.dialect = Vllm((0, 32))
        self.ts = 0.0
        self.lives: list[list[bytes]] = []
        self.truth: dict[bytes, Copies] = {}
        self.begin()

    def begin(self) -> None:
        self.pool = BlockPool(8, SPEC.block_size, hash_seed=len(self.lives))
        self.lives.append([])
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=BUFFER_STEPS)

    @property
    def held(self) -> Copies:
        said = self.lives[-1]
        return self.truth[said[-1]] if said else {}

    def run(self, prompts: list[list[int]]) -> list[tuple[int, bytes]]:
        for tokens in prompts:
            self.pool.submit(tokens)
        messages = []
        while self.pool.busy:
            if events := self.pool.step():
                self.ts += 1
                payload = self.dialect.encode(events, self.ts, None)
                self.truth[payload] = {
                    (group, int.from_bytes(digest[-8:], "big")): n for (group, digest), n in self.pool.held().items()
                }
                message = (len(self.lives[-1]), payload)
                self.lives[-1].append(payload)
                self.buffer.append(message)
                messages.append(message)
        return messages

    def life_with(self, birth: bytes) -> list[bytes] | None:
        return next((life for life in self.lives if life and xxh3_128_digest(life[0]) == birth), None)


class Interrupted(Lull):
    """Whenever work gives way, one more message of what is on its way arrives."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self._side = replica

    async def wait(self) -> float:
        """One more message has arrived."""
        self._side.hear(most=1)
        return 0.0


class InterruptedServer(ShardServer):
    """While a shard grows, what is on its way to the replica that does it arrives."""

    side: Replica

    async def grow(self, tag: str, registration: int, meta: Meta, wider: Meta, numbers: range) -> int | Refusal:
        """Copy, after one more message has arrived."""
        self.side.hear(most=1)
        return await super().grow(tag, registration, meta, wider, numbers)


class Replica:
    """What `LiveFleet` and `RedisKeeper` do for one source, without their sockets and clocks."""

    def __init__(self, machine: ReplicaMachine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.index = PyIndex()
        self.writing = Writing(
            machine.server, self.index, name, Interrupted(self), clock=lambda: machine.now, piece_records=2
        )
        self.writes = 0
        self.kept: KeptSource | None = None
        self.follow()

    def follow(self) -> None:
        """As when it has just been registered: warm if possible."""
        before = self.kept
        if before is not None:
            before.dropped = True
        self.wire: deque[tuple[int, bytes]] = deque()
        self.connected = False
        self.asked: int | None = None
        self.asks = 0
        self.stream = Stream(StreamSettings(held_max_frames=6))
        shard = Shard(self.stream, takeover_s=TAKEOVER_S)
        shard.turn = turn(self.name, NAMES, "tag")
        self.index.attach(SOURCE, SPEC)
        self.kept = KeptSource(SOURCE, SPEC, self.stream, shard, lambda: None)
        if before is not None:
            shard.load_tried(self.machine.now)
        self.stream.warming()
        self.machine.run(self.writing.load(self.kept))
        self.act(self.stream.start(self.machine.now))

    @property
    def shard(self) -> Shard:
        assert self.kept is not None
        return self.kept.shard

    @property
    def copies(self) -> Copies:
        held = self.index.copies(SOURCE)
        return {(group, value): n for (_, group, tier, _, value), n in held.items() if tier is Tier.GPU}

    def act(self, actions: list[Action]) -> None:
        assert self.kept is not None
        for action in actions:
            match action:
                case Apply(seq, payload):
                    change = self.index.apply(SOURCE, payload)
                    if change.cleared:
                        self.stream.cleared(seq)
                    self.shard.applied(seq, xxh3_128_digest(payload), change.touched, self.machine.now)
                    self.kept.changed(change.touched)
                case Withdraw(reason):
                    self.index.withdraw(SOURCE, TIERS)
                    self.kept.withdrawn()
                    match reason:
                        case "rebuild":
                            self.shard.rebuilt()
                        case "gone":
                            self.shard.left()
                        case _:
                            self.shard.new_life()
                case Ask(start):
                    self.asked, self.asks = start, self.asks + 1
        if self.stream.catching_up:
            self.act(self.stream.catch_up(self.machine.now))

    def hear(self, most: int | None = None) -> None:
        """Take in what has arrived: all of it, or so many messages."""
        while self.wire and most != 0:
            seq, payload = self.wire.popleft()
            self.act(self.stream.frame(seq, payload, self.machine.now))
            most = None if most is None else most - 1

    def answer(self) -> None:
        start, mine = self.asked, self.asks
        if start is None:
            return
        for seq, payload in [message for message in self.machine.engine.buffer if message[0] >= start]:
            self.act(self.stream.replay_frame(seq, payload, self.machine.now))
            if self.asks != mine:
                return
        self.asked = None
        self.act(self.stream.replay_end(self.machine.now))

    def read(self) -> None:
        self.shard.read(self.machine.found(), self.machine.now)

    def write(self) -> None:
        """Do what the shard decides, perhaps on what was true a while ago."""
        assert self.kept is not None
        step = self.shard.decide(self.machine.now)
        if self.shard.epoch is not None:
            self.stream.epoch = Epoch(self.shard.epoch)
        match step:
            case Flush():
                self.wrote(self.writing.flush(self.kept, step))
            case Rewrite():
                self.wrote(self.writing.rewrite(self.kept, step))
            case Grow():
                server = self.machine.server
                server.side = self
                self.machine.grown += 1
                self.wrote(grow(server, self.kept, step, lambda: self.machine.now, piece_buckets=1))
            case Load():
                self.follow()

    def wrote(self, writing: Coroutine[Any, Any, Refusal | None]) -> None:
        self.writes += 1
        if self.machine.run(writing) is not None:
            self.shard.remote = None


class ReplicaMachine(RuleBasedStateMachine):
    """What Redis holds is what some replica rightly held; in the end all agree."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.now = 0.0
        self.admin: Any = Redis.from_url(_servers[0].url, protocol=2)
        self.admin.flushall()
        values: dict[str, Any] = {"store": _servers[0].url, "store_timeout_s": 10}
        settings = Settings(**values)
        self.server = InterruptedServer(open_client(settings), Names("kvindexer"), 10)
        self.engine = Engine()
        self.saved: dict[bytes, bytes] = {}
        self.grown = 0
        self.replicas: dict[str, Replica] = {}

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def found(self) -> Found:
        (found,) = self.run(self.server.read([self.tag]))
        assert isinstance(found, Found), found
        return found

    @initialize()
    def begin(self) -> None:
        self.tag = shard_tag(SOURCE, SPEC)
        self.replicas = {name: Replica(self, name) for name in NAMES}
        self.publish([[1, 0, 1, 1]], set())
        for name in NAMES:
            self.catch_up(name)
        self.rounds(list(NAMES))

    def teardown(self) -> None:
        try:
            if self.replicas:
                self._settle()
        finally:
            self.run(self.server.close())
            self.admin.close()
            self.runner.close()

    # What can happen

    @rule(prompts=PROMPTS, heard_by=st.sets(REPLICA))
    def publish(self, prompts: list[list[int]], heard_by: set[str]) -> None:
        """Some replicas hear it at once, the others when they catch up."""
        messages = self.engine.run(prompts)
        for name, one in self.replicas.items():
            if one.connected:
                one.wire += messages
                if name in heard_by:
                    one.hear()

    @rule()
    def reset(self) -> None:
        self.engine.pool.reset()

    @rule(burst=st.lists(PROMPTS, max_size=8), noticed_by=st.sets(REPLICA))
    def restart(self, burst: list[list[list[int]]], noticed_by: set[str]) -> None:
        for name in NAMES:
            self.cut(name)
        self.engine.begin()
        for prompts in burst:
            self.engine.run(prompts)
        for name in noticed_by:
            self.catch_up(name)

    @rule(name=REPLICA)
    def catch_up(self, name: str) -> None:
        """It hears the engine again, and all that it has missed as far as the engine remembers."""
        one = self.replicas[name]
        if not one.connected:
            one.connected = True
            one.act(one.stream.connected(self.now))
        self.replicas[name].hear()
        for _ in range(3):
            one.answer()

    @rule(name=REPLICA)
    def probe(self, name: str) -> None:
        """Time enough passes for a proof that all is well."""
        self.pass_time(6.0)
        self.catch_up(name)

    @rule(name=REPLICA)
    def cut(self, name: str) -> None:
        one = self.replicas[name]
        if one.connected:
            one.connected = False
            one.wire.clear()
            one.act(one.stream.disconnected(self.now))
            if one.asked is not None:
                one.asked = None
                one.act(one.stream.replay_failed("cut", self.now))

    @rule(name=REPLICA)
    def miss_more_than_the_engine_remembers(self, name: str) -> None:
        self.cut(name)
        for token in (0, 1) * (BUFFER_STEPS // 2 + 1):
            self.publish([[token, 1, 0, token, 1]], set(NAMES))
        self.catch_up(name)

    @rule(name=REPLICA)
    def join_late(self, name: str) -> None:
        """The copy is lost, and the engine no longer remembers its first messages."""
        self.miss_more_than_the_engine_remembers(name)
        self.flushall()
        self.crash_and_start(name)
        self.catch_up(name)

    @rule(name=REPLICA, place=st.integers(0, 100))
    def lose(self, name: str, place: int) -> None:
        wire = self.replicas[name].wire
        if wire:
            del wire[place % len(wire)]

    @rule(name=REPLICA, fresh=st.booleans())
    def write(self, name: str, fresh: bool) -> None:  # noqa: FBT001 - drawn by Hypothesis
        """Do what is decided, on what Redis holds or held a while ago."""
        if fresh:
            self.replicas[name].read()
        self.replicas[name].write()

    @rule(names=st.permutations(NAMES))
    def rounds(self, names: list[str]) -> None:
        """What happens in a quiet second or two."""
        self.pass_time(2.0)
        for name in names:
            self.write(name, fresh=True)

    @rule(name=REPLICA)
    def crash_and_start(self, name: str) -> None:
        self.replicas[name] = Replica(self, name)

    @rule(seconds=st.sampled_from([0.6, 2.0, 6.0, 20.0, 400.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for one in self.replicas.values():
            one.act(one.stream.tick(self.now))

    @rule()
    def flushall(self) -> None:
        self.admin.flushall()

    @rule()
    def save(self) -> None:
        self.saved = {key: self.admin.dump(key) for key in self.admin.keys(b"*")}

    @precondition(lambda self: self.saved)
    @rule()
    def fail_over_to_what_was_saved(self) -> None:
        """The last writes are lost."""
        self.admin.flushall()
        for key, value in self.saved.items():
            self.admin.restore(key, 0, value)

    # What must hold

    @invariant()
    def what_redis_holds_was_held(self) -> None:
        """A shard that calls itself complete is what the engine held after the last message in it."""
        if not self.replicas:
            return
        meta = self.found().meta
        if meta is None or meta.checkpoint.coverage.level < 2 or not meta.checkpoint.birth:
            return
        life = self.engine.life_with(meta.checkpoint.birth)
        assert life is not None
        assert xxh3_128_digest(life[meta.checkpoint.next - 1]) == meta.checkpoint.digest
        assert self._copies_in_redis() == self.engine.truth[life[meta.checkpoint.next - 1]]

    def _copies_in_redis(self) -> Copies:
        index = PyIndex()
        index.attach(SOURCE, SPEC)

        async def load() -> None:
            (found,) = await self.server.read([self.tag])
            assert isinstance(found, Found)
            assert found.meta is not None
            count = 0
            async for _, hashes, records in self.server.buckets(self.tag, found.meta):
                index.load(SOURCE, hashes, records)
                count += len(hashes)
            index.loaded(SOURCE, found.meta.facts)
            assert count == found.meta.entries

        self.run(load())
        return {(group, value): n for (_, group, _, _, value), n in index.copies(SOURCE).items()}

    def _settle(self) -> None:
        """Everybody hears the engine again, and enough time passes."""
        self.engine.run([[1, 1, 1], [0, 1, 0, 1]])
        for _ in range(80):
            self._round()
        writes = [one.writes for one in self.replicas.values()]
        event(f"shards grown: {min(self.grown, 3)}")
        for _ in range(20):
            self._round()
        assert writes == [one.writes for one in self.replicas.values()], "no ping-pong"
        meta = self.found().meta
        assert meta is not None
        last = self.engine.lives[-1]
        assert meta.checkpoint.next == len(last)
        assert meta.checkpoint.digest == xxh3_128_digest(last[-1])
        assert {one.stream.epoch for one in self.replicas.values()} == {meta.checkpoint.epoch}
        if any(one.stream.coverage[0] == 2 for one in self.replicas.values()):
            assert meta.checkpoint.coverage.level == 2
        if meta.checkpoint.coverage.level == 2:
            assert self._copies_in_redis() == self.engine.held
        for one in self.replicas.values():
            if one.stream.sound and one.stream.complete:
                assert one.copies == self.engine.held, one.name

    def _round(self) -> None:
        self.pass_time(2.0)
        for name in NAMES:
            self.catch_up(name)
            self.write(name, fresh=True)


TestReplicas = ReplicaMachine.TestCase
TestReplicas.settings = hypothesis_settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
