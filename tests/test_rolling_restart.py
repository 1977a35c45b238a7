"""Three replicas behind a load balancer, restarted one after the other under query load: no wrong, no failed answer.

Everything is real: `kvindexer serve` processes, a Redis, engines that publish over ZMQ.  Each engine keeps a record
of what it would have reported as cached for some prompts, and since when; an answer is right if every figure in it
was true at some moment between the query (less the time that an event may take) and the answer.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx
import pytest

from api_server import NO_CERTIFICATES
from kvindexer.testing import Backend, Balancer, FakeEngine, FaultProxy, LinkFaults, PoolShape
from kvindexer.testing.events import Event
from kvindexer.types import SourceSpec
from live import agrees, spec_of, until
from replicas import eventually, kept, replica
from served import Served
from servers import HOST, Server

pytestmark = pytest.mark.proof

REPLICAS = 3
ENGINES = 6
BLOCK = 16
POOL = PoolShape(num_blocks=192, block_size=BLOCK)
STEADY, MOVING = 4, 12
"""Prompts that their engines hold all the time, and prompts that come and go."""
REQUESTS_PER_S = 120
WORKERS = 6
DRAIN_S = 1.0
"""The balancer asks five times a second."""
LAG_S = 0.5
"""An event may take that long from the engine to the answers: two cores are shared by ten processes."""
PAUSE_S = 0.1
"""Before a client asks again: the connections of a process that is killed end before its listener does."""
PATIENCE_S = 20.0
REDIS_LATENCY_S = 0.05
ENOUGH_QUERIES = 50


class Prompts:
    """What is asked, and what the engines compute."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        shared = self._tokens(4 * BLOCK)
        self.steady = [self._tokens(12 * BLOCK) for _ in range(STEADY)]
        self.moving = [shared + self._tokens(8 * BLOCK + 5) for _ in range(MOVING)]
        self.all = self.steady + self.moving

    def noise(self) -> list[int]:
        """A prompt that nobody asks about; it only takes room."""
        return self._tokens(self._random.randrange(2, 8) * BLOCK)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(50_000) for _ in range(count)]


class Recording(FakeEngine):
    """An engine that remembers what it held when."""

    def __init__(self, asked: Sequence[Sequence[int]], number: int) -> None:
        self._asked = asked
        self._since: list[list[float]] = [[0.0] for _ in asked]
        self._cached = [[0] for _ in asked]
        super().__init__(pool=POOL, hash_seed=number)

    def publish_events(self, events: Sequence[Event]) -> int:
        """Take note of what is true from now on, then tell."""
        now = time.monotonic()
        for tokens, since, cached in zip(self._asked, self._since, self._cached, strict=True):
            held = self.cached_tokens(tokens)
            if held != cached[-1]:
                cached.append(held)
                since.append(now)
        return super().publish_events(events)

    def late_by(self, number: int, cached: int, sent: float, received: float) -> float | None:
        """How long before the query a figure was last true; None: never that, before the answer."""
        since, values = self._since[number], self._cached[number]
        ends = [*since[1:], float("inf")]
        for at in range(bisect_right(since, received) - 1, -1, -1):
            if values[at] == cached:
                return max(0.0, sent - ends[at])
        return None

    def changes(self, number: int) -> int:
        """How often the figure of a prompt has changed."""
        return len(self._since[number]) - 1


class Traffic:
    """Steady requests to all engines, in a thread."""

    def __init__(self, engines: Sequence[Recording], prompts: Prompts) -> None:
        self._engines = engines
        self._prompts = prompts
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        for engine, tokens in itertools.product(self._engines, self._prompts.steady):
            engine.run_request(tokens)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        chosen = random.Random(7)
        try:
            for turn in itertools.count():
                engine = self._engines[turn % len(self._engines)]
                if turn // len(self._engines) % 4 == 0:  # used again before its blocks are the oldest
                    tokens = self._prompts.steady[turn // len(self._engines) // 4 % STEADY]
                elif chosen.random() < 0.3:
                    tokens = self._prompts.noise()
                else:
                    tokens = chosen.choice(self._prompts.moving)
                engine.run_request(tokens)
                if self._stopping.wait(1 / REQUESTS_PER_S):
                    return
        except Exception as error:  # noqa: BLE001 - raised where the traffic ends
            self._failure = error


class Queries:
    """Constant queries through the balancer; what was wrong with the answers is kept."""

    def __init__(self, url: str, engines: Sequence[Recording], prompts: Prompts) -> None:
        self._url = url
        self._engines = engines
        self._prompts = prompts
        self.retried = 0
        self.may_retry = False
        self.answered = 0
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.latest_s = 0.0
        """How late the latest figure was."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask all the time; half of the workers keep their connections open."""
        tasks = [asyncio.create_task(self._work(number, keep=bool(number % 2))) for number in range(WORKERS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended

    async def _work(self, number: int, *, keep: bool) -> None:
        chosen = random.Random(number)
        limits = httpx.Limits(max_keepalive_connections=1 if keep else 0)
        async with client(self._url, limits=limits) as http:
            while True:
                await self._ask(http, chosen.randrange(len(self._prompts.all)))
                await asyncio.sleep(0.01)

    async def _ask(self, http: httpx.AsyncClient, number: int) -> None:
        sent = time.monotonic()
        try:
            answer = await self._post(http, {"model": "m", "tokens": self._prompts.all[number]})
        except httpx.TransportError as error:
            self.failed.append(f"{error!r} after {time.monotonic() - sent:.3f} s")
            return
        self.answered += 1
        if answer.status_code != 200:
            self.failed.append(f"{answer.status_code}: {answer.text}")
            return
        self.judge(number, answer.json()["matches"], sent, time.monotonic())

    async def _post(self, http: httpx.AsyncClient, body: Any) -> httpx.Response:
        try:
            return await http.post("/v1/match", json=body)
        except httpx.TransportError:
            if not self.may_retry:
                raise
            self.retried += 1
            await asyncio.sleep(PAUSE_S)
            return await http.post("/v1/match", json=body)

    def judge(self, number: int, matches: list[dict[str, Any]], sent: float, received: float) -> None:
        """Compare an answer with the engines' records."""
        rows = {row["instance"]: row for row in matches}
        for place, engine in enumerate(self._engines):
            row = rows.get(f"pod-{place}")
            said = 0 if row is None else row["cached_tokens"]
            late_s = engine.late_by(number, said, sent, received)
            self.latest_s = max(self.latest_s, late_s or 0.0)
            if late_s is None or late_s > LAG_S:
                self.wrong.append(f"prompt {number}, pod-{place}: {said} tokens, late by {late_s}")
            if row is not None and (row["state"], row["sound"], row["complete"]) != ("live", True, True):
                self.wrong.append(f"prompt {number}, pod-{place}: {row}")


class Deployment:
    """Redis, replicas, balancer, engines under traffic, and queries."""

    def __init__(self, stack: ExitStack) -> None:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvindexer-rolling-")))
        self.redis = stack.enter_context(Server())
        self.link = stack.enter_context(FaultProxy(HOST, self.redis.port))
        store = f"redis://{HOST}:{self.link.port}"
        self.prompts = Prompts(1)
        self.engines = [stack.enter_context(Recording(self.prompts.all, number)) for number in range(ENGINES)]
        self.replicas = [
            Served(folder, f"replica-{number}", "--store", store, "--set", f"drain_s={DRAIN_S}")
            for number in range(REPLICAS)
        ]
        for one in self.replicas:
            stack.callback(one.close)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Served.start, self.replicas))
        self.balancer = stack.enter_context(Balancer([Backend(HOST, one.port) for one in self.replicas]))
        self.queries = Queries(self.balancer.url, self.engines, self.prompts)

    def spec(self, number: int) -> SourceSpec:
        """The registration of an engine."""
        engine = self.engines[number]
        return SourceSpec(
            instance=f"pod-{number}",
            model="m",
            block_size=BLOCK,
            endpoint=engine.endpoint,
            replay=engine.replay_endpoint,
        )

    async def register(self) -> None:
        """Tell one replica of each engine, whichever the balancer chooses, and wait until all follow all."""
        await eventually("all replicas are ready", self.all_ready)
        async with client(self.balancer.url, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            for number in range(ENGINES):
                spec = self.spec(number)
                body = {
                    "instance_id": spec.instance, "modelname": spec.model, "block_size": BLOCK, "type": "vLLM",
                    "endpoint": spec.endpoint, "replay_endpoint": spec.replay, "dp_rank": 0,
                }  # fmt: skip
                answer = await http.post("/register", json=body)
                assert answer.status_code in (200, 201), answer.text
        for one in self.replicas:
            await eventually(f"{one.name} follows all engines", partial(self.in_step, one))

    async def all_ready(self) -> bool:
        """Whether the balancer uses all of them."""
        return len(self.balancer.ready) == REPLICAS

    async def in_step(self, one: Served) -> bool:
        """Whether a replica is live, sound and complete with every engine."""
        rows = (await sources(one))["sources"]
        return len(rows) == ENGINES and all(
            (row["state"], row["sound"], row["complete"]) == ("live", True, True) for row in rows
        )

    async def back(self, one: Served) -> None:
        """Start a replica again, and wait until it is ready and has answered its share."""
        await asyncio.to_thread(one.start)
        backend = Backend(HOST, one.port)

        async def used() -> bool:
            return backend in self.balancer.ready and (await sources(one))["totals"]["queries"] >= ENOUGH_QUERIES

        await eventually(f"{one.name} is back", used)

    async def agree(self) -> None:
        """At rest: all replicas, Redis and the engines say the same."""
        for one in self.replicas:
            end = time.monotonic() + PATIENCE_S
            while differing := await self.differing(one):
                assert time.monotonic() < end, f"{one.name}: {differing}"
                await asyncio.sleep(0.1)
        async with replica(self.redis.url, "judge") as judge:
            for number, engine in enumerate(self.engines):
                await kept(self.redis.url, judge, self.spec(number), engine)

    async def differing(self, one: Served) -> list[str]:
        """Where a replica says something else than the engines."""
        found = []
        rows = {row["instance"]: row for row in (await sources(one))["sources"]}
        for number, engine in enumerate(self.engines):
            row = rows[f"pod-{number}"]
            said = (row["seq"], row["blocks"]["gpu"], row["state"], row["sound"], row["complete"])
            if said != (true := (engine.last_seq, len(engine.held()), "live", True, True)):
                found.append(f"pod-{number}: {said}, and not {true}: {row}")
        async with client(one.url) as http:
            for place, tokens in enumerate(self.prompts.all):
                answer = await http.post("/v1/match", json={"model": "m", "tokens": tokens})
                cached = {row["instance"]: row["cached_tokens"] for row in answer.json()["matches"]}
                for number, engine in enumerate(self.engines):
                    if cached.get(f"pod-{number}", 0) != (held := engine.cached_tokens(tokens)):
                        found.append(f"prompt {place}, pod-{number}: {cached}, and not {held}")
        return found


def client(url: str, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=30, verify=NO_CERTIFICATES, **options)


async def sources(one: Served) -> Any:
    """What a replica says of its sources."""
    async with client(one.url) as http:
        return (await http.get("/v1/sources")).json()


def scenario(play: Callable[[Deployment], Awaitable[None]]) -> None:
    """Play it under load; no answer may be wrong and none may fail, and all is as it should be in the end."""

    async def run() -> None:
        with ExitStack() as stack:
            deployment = await asyncio.to_thread(Deployment, stack)
            queries = deployment.queries
            await deployment.register()
            with Traffic(deployment.engines, deployment.prompts):
                for one in deployment.replicas:
                    await eventually(f"{one.name} is in step", partial(deployment.in_step, one))
                await asyncio.sleep(LAG_S)
                async with queries.running():
                    await play(deployment)
            assert not queries.failed, f"{len(queries.failed)} of {queries.answered}: {queries.failed[:5]}"
            assert not queries.wrong, f"{len(queries.wrong)} of {queries.answered}: {queries.wrong[:5]}"
            await deployment.agree()
            for engine in deployment.engines:
                assert [engine.changes(number) for number in range(STEADY)] == [1] * STEADY
                assert all(engine.changes(number) for number in range(STEADY, STEADY + MOVING))

    asyncio.run(run())


def test_a_rolling_restart_under_load_has_no_wrong_and_no_failed_answer() -> None:
    """Each replica in turn is told to end, and started again; the next one's turn is when it is at work again."""

    async def play(deployment: Deployment) -> None:
        for one in deployment.replicas:
            assert await asyncio.to_thread(one.end, signal.SIGTERM) == 0
            await deployment.back(one)

    scenario(play)


def test_trap_24_replicas_that_are_killed_give_no_wrong_answer() -> None:
    """A client that finds its connection gone asks once more, and gets its answer.

    Redis is far away, so that there is time to ask a replica that is not warm yet, if one could.
    """

    async def play(deployment: Deployment) -> None:
        deployment.link.faults = LinkFaults(latency_s=REDIS_LATENCY_S)
        deployment.queries.may_retry = True
        for one in deployment.replicas:
            await asyncio.to_thread(one.end, signal.SIGKILL)
            await deployment.back(one)

    scenario(play)


def test_a_replica_that_can_not_ask_redis_is_not_ready_before_it_knows_what_to_follow(
    own_redis_server: Server,
) -> None:
    """It would answer that nobody holds anything, or that there is no such model."""

    async def play() -> None:
        with FakeEngine() as engine:
            async with replica(own_redis_server.url, "a") as a:
                a.fleet.register(spec_of(engine))
                engine.run_request(range(64))
                await kept(own_redis_server.url, a, spec_of(engine), engine)
            own_redis_server.pause()
            async with replica(own_redis_server.url, "b") as b:
                assert not b.fleet.ready
                own_redis_server.resume()
                await until("it is ready", lambda: b.fleet.ready)
                assert b.holds(engine)
                assert b.flags(engine.endpoint) == ("live", True, True)

    asyncio.run(play())


def test_without_redis_a_replica_is_ready_when_its_time_is_over(own_redis_server: Server) -> None:
    """P8: what is named in its settings it follows all the while."""

    async def play() -> None:
        own_redis_server.kill()
        with FakeEngine() as engine:
            engine.run_request(range(64))
            spec = spec_of(engine)
            async with replica(own_redis_server.url, sources=(spec,), sync_deadline_s=1.5) as one:
                await agrees(one.fleet, engine)
                assert not one.fleet.ready
                await until("it is ready", lambda: one.fleet.ready)

    asyncio.run(play())
