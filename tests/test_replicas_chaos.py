"""Trap 24 and all at once: replicas in processes of their own are killed, paused and cut off, Redis is as well.

At the end all replicas, Redis and the engines agree exactly.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from api_server import NO_CERTIFICATES
from kvindexer.index.engine import PyIndex
from kvindexer.store.layout import pack_spec
from kvindexer.testing import FakeEngine, FaultProxy, LinkFaults
from kvindexer.types import SourceSpec, Tier
from live import QUICK, spec_of, truth
from proxied import SMALL, ProxiedEngine, traffic
from replicas import KEEP_QUICK, contents, eventually
from served import Served
from servers import HOST, Server
from test_store_faults import restore, save

pytestmark = pytest.mark.proof

WHOLE = LinkFaults()
FAULTS = (LinkFaults(stall=True), LinkFaults(down=True), LinkFaults(reset=True), LinkFaults(latency_s=0.1))
STEPS = 24
ENGINES = 8


class Replicas(NamedTuple):
    """Three services, and how to ask them."""

    served: list[Served]
    links: list[FaultProxy]
    client: httpx.Client

    def get(self, number: int, path: str) -> httpx.Response | None:
        """An answer; None if it doesn't listen."""
        try:
            return self.client.get(self.served[number].url + path)
        except httpx.TransportError:
            return None

    def ready(self, number: int) -> bool:
        """What /ready says."""
        answer = self.get(number, "/ready")
        return answer is not None and answer.status_code == 200

    def sources(self, number: int) -> dict[str, dict[str, Any]]:
        """What it says of its sources, by their endpoints."""
        answer = self.get(number, "/v1/sources")
        return {} if answer is None else {one["source"]: one for one in answer.json()["sources"]}

    def cached(self, number: int, tokens: list[int]) -> dict[str, int]:
        """What each instance will report as cached of a prompt."""
        body = {"model": "m", "tokens": tokens}
        answer = self.client.post(self.served[number].url + "/v1/match", json=body)
        assert answer.status_code == 200, answer.text
        return {match["instance"]: match["cached_tokens"] for match in answer.json()["matches"]}


@contextmanager
def services(folder: Path, server: Server, specs: list[SourceSpec], names: str) -> Iterator[Replicas]:
    """Replicas that follow these sources, each with a network of its own to Redis."""
    settings = {
        **QUICK,
        **KEEP_QUICK,
        "store_timeout_s": 0.3,
        "log_level": "info",
        "sources": [json.loads(pack_spec(spec)) for spec in specs],
    }
    config = folder / "settings.yaml"
    config.write_text(json.dumps(settings))
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=5, verify=NO_CERTIFICATES))
        running = Replicas([], [], client)
        for name in names:
            link = stack.enter_context(FaultProxy(HOST, server.port))
            one = Served(folder, name, "--config", str(config), "--store", f"redis://{HOST}:{link.port}")
            running.links.append(link)
            running.served.append(one)
            stack.callback(one.close)
            one.start()
        yield running


async def redis_holds(server: Server, spec: SourceSpec) -> tuple[dict[tuple[int, int], int], int, int]:
    """What the GPU of a source holds according to Redis, its epoch and the seq that is expected next."""
    found, records = await contents(server.url, spec)
    if found.meta is None or found.meta.entries != len(records):
        return {}, 0, -1
    index = PyIndex()
    index.attach(spec.endpoint, spec)
    index.load(spec.endpoint, list(records), list(records.values()))
    index.loaded(spec.endpoint, found.meta.facts)
    copies = index.copies(spec.endpoint)
    held = {(group, int(value)): n for (_, group, tier, _, value), n in copies.items() if tier is Tier.GPU}
    return held, found.meta.checkpoint.epoch, found.meta.checkpoint.next


async def all_agree(server: Server, running: Replicas, engines: list[FakeEngine], specs: list[SourceSpec]) -> None:
    """Wait until every replica, Redis and every engine say the same."""

    async def agree(engine: FakeEngine, spec: SourceSpec) -> bool:
        held, epoch, expected = await redis_holds(server, spec)
        if held != truth(engine) or expected != (-1 if engine.last_seq is None else engine.last_seq) + 1:
            return False
        said = [running.sources(number).get(spec.endpoint) for number in range(len(running.served))]
        return all(
            one is not None
            and (one["state"], one["sound"], one["complete"]) == ("live", True, True)
            and (one["epoch"], one["seq"], one["blocks"]["gpu"]) == (epoch, engine.last_seq, len(held))
            for one in said
        )

    for engine, spec in zip(engines, specs, strict=True):
        await eventually(f"all agree on {spec.endpoint}", lambda e=engine, s=spec: agree(e, s))  # type: ignore[misc]


def prompts(dice: random.Random) -> list[list[int]]:
    """Some that engines may hold: they begin as the traffic does, or not."""
    shared = [[dice.randrange(100) for _ in range(12)] for _ in range(4)]
    return [chosen + [dice.randrange(100) for _ in range(20)] for chosen in shared]


def answers_are_right(running: Replicas, engines: list[FakeEngine], specs: list[SourceSpec], seed: int) -> None:
    """Every replica says of some prompts what the engines would report."""
    for prompt in prompts(random.Random(seed)):
        for engine in engines:
            engine.run_request(prompt)
        for engine in engines:
            engine.publisher.flush()
    asyncio.run(all_agree_quick(running, engines, specs))
    for prompt in prompts(random.Random(seed)):
        true = {spec.instance: engine.cached_tokens(prompt) for engine, spec in zip(engines, specs, strict=True)}
        for number in range(len(running.served)):
            said = running.cached(number, prompt)
            assert {name: said.get(name, 0) for name in true} == true


async def all_agree_quick(running: Replicas, engines: list[FakeEngine], specs: list[SourceSpec]) -> None:
    """Wait until every replica has heard all that there is."""

    async def heard() -> bool:
        last = {spec.endpoint: engine.last_seq for engine, spec in zip(engines, specs, strict=True)}
        said = [running.sources(number) for number in range(len(running.served))]
        return all({name: one[name]["seq"] for name in last if name in one} == last for one in said)

    await eventually("all have heard all", heard)


def test_trap_24_killed_at_any_point_and_started_again(own_redis_server: Server, tmp_path: Path) -> None:
    """A replica that was killed says what one says that never died, and is not ready before it can."""
    dice = random.Random(24)
    with ExitStack() as stack:
        engines = [stack.enter_context(FakeEngine(pool=SMALL)) for _ in range(3)]
        specs = [spec_of(engine, f"pod-{number}") for number, engine in enumerate(engines)]
        running = stack.enter_context(services(tmp_path, own_redis_server, specs, "ab"))
        killed = running.served[1]
        for round_ in range(4):
            for engine in engines:
                traffic(engine, 5, round_)
            asyncio.run(asyncio.sleep(dice.random() * 0.2))
            killed.end(signal.SIGKILL)
            for engine in engines:
                traffic(engine, 5, round_ + 10)
            if round_ == 2:
                engines[0].restart()
                traffic(engines[0], 5, 20)
            killed.start()
            asked = 0
            while not running.ready(1):
                asked += 1
                answer = running.get(1, "/ready")
                assert answer is not None
                assert answer.status_code in (200, 503)
            now = running.sources(1)
            assert all(now[spec.endpoint]["state"] == "live" for spec in specs), "ready before it was warm"
            answers_are_right(running, engines, specs, round_)
        asyncio.run(all_agree(own_redis_server, running, engines, specs))
        assert "Traceback" not in "".join(one.log for one in running.served)


class Chaos:
    """What may happen, one thing at a time."""

    def __init__(self, server: Server, running: Replicas, engines: list[ProxiedEngine], dice: random.Random) -> None:
        self.server = server
        self.running = running
        self.engines = engines
        self.dice = dice
        self.dead: set[int] = set()
        self.paused: set[int] = set()
        self.older = save(server)

    @property
    def actions(self) -> list[Callable[[], None]]:
        """Each as often as the others."""
        return [
            self.replica_dies_or_comes_back, self.replica_stops_or_goes_on, self.redis_dies, self.redis_stops,
            self.redis_is_emptied, self.redis_has_lost_writes, self.redis_link, self.engine_link,
            self.engine_restarts,
        ]  # fmt: skip

    def replica_dies_or_comes_back(self) -> None:
        number = self.dice.randrange(3)
        if number in self.dead:
            self.running.served[number].start()
            self.dead.discard(number)
        elif number not in self.paused:
            self.running.served[number].end(self.dice.choice((signal.SIGKILL, signal.SIGTERM)))
            self.dead.add(number)

    def replica_stops_or_goes_on(self) -> None:
        number = self.dice.randrange(3)
        if number in self.paused:
            self.running.served[number].tell(signal.SIGCONT)
            self.paused.discard(number)
        elif number not in self.dead:
            self.running.served[number].tell(signal.SIGSTOP)
            self.paused.add(number)

    def redis_dies(self) -> None:
        self.server.kill()
        self.server.start()

    def redis_stops(self) -> None:
        self.server.pause()
        asyncio.run(asyncio.sleep(0.4))
        self.server.resume()

    def redis_is_emptied(self) -> None:
        self.server.ask("FLUSHALL")

    def redis_has_lost_writes(self) -> None:
        restore(self.server, self.older)

    def redis_link(self) -> None:
        self.dice.choice(self.running.links).faults = self.dice.choice((*FAULTS, WHOLE))

    def engine_link(self) -> None:
        self.dice.choice(self.engines).network = self.dice.choice((*FAULTS, WHOLE))

    def engine_restarts(self) -> None:
        self.dice.choice(self.engines).restart()

    def ask_somebody(self) -> None:
        """Whoever is up answers, whatever else is down."""
        up = [number for number in range(3) if number not in self.dead | self.paused]
        if up:
            self.running.cached(self.dice.choice(up), prompts(self.dice)[0])

    def end(self) -> None:
        """Everything is up and whole again."""
        for number in self.paused:
            self.running.served[number].tell(signal.SIGCONT)
        for number in self.dead:
            self.running.served[number].start()
        for link in self.running.links:
            link.faults = WHOLE
        for engine in self.engines:
            engine.network = WHOLE


@pytest.mark.parametrize("seed", [1])
def test_everything_at_once(own_redis_server: Server, tmp_path: Path, seed: int) -> None:
    """Three replicas, eight engines, load on all; kill -9, restart, pause, flush, fail over, partitions."""
    server, dice = own_redis_server, random.Random(seed)
    with ExitStack() as stack:
        engines = [stack.enter_context(ProxiedEngine()) for _ in range(ENGINES)]
        specs = [spec_of(engine, f"pod-{number}") for number, engine in enumerate(engines)]
        running = stack.enter_context(services(tmp_path, server, specs, "abc"))
        chaos = Chaos(server, running, engines, dice)
        order = (chaos.actions * (STEPS // len(chaos.actions) + 1))[:STEPS]
        dice.shuffle(order)
        for step, action in enumerate(order):
            action()
            if step % 5 == 0:
                chaos.older = save(server)
            for engine in engines:
                traffic(engine, 2, dice.randrange(10**6))
            asyncio.run(asyncio.sleep(dice.random() * 0.5))
            chaos.ask_somebody()
        chaos.end()
        for engine in engines:
            traffic(engine, 3)
        asyncio.run(all_agree(server, running, list(engines), specs))
        answers_are_right(running, list(engines), specs, seed)
        asyncio.run(all_agree(server, running, list(engines), specs))
        assert "Traceback" not in "".join(one.log for one in running.served)
