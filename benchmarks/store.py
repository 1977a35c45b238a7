"""What Redis costs: the same service with `--store memory` and with a copy in Redis, in the same run.

Writing: fresh services are filled at 86,000 blocks/s and all at once: CPU of both sides, and how far Redis lags.
Latency: queries during ingest at two paces, with Redis up, stopped, slow, down, and back without its data, each in
turn with none; and once more without Redis, which says how much is chance.  But for one condition Redis and the
slow link give way to everybody else: what is asked is whether the service lets queries wait, and a Redis elsewhere
takes no core from anybody.
Warm start: a service dies, its engines live on; another one starts from what Redis has.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Final, TypeAlias

from benchmarks import measure, messages
from benchmarks.arena import Running
from benchmarks.client import BY_HASH, BY_TOKENS
from benchmarks.redis import Redis
from benchmarks.results import percentiles
from benchmarks.slow_link import SlowLink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from benchmarks.arena import Arena, Spool
    from benchmarks.services import Contender

Times: TypeAlias = dict[str, list[float]]
"""Seconds of every query, by route."""
Conditions: TypeAlias = "Mapping[str, Callable[[], AbstractContextManager[None]]]"
"""What Redis is like, and how that comes about."""

MEMORY: Final = "memory"
REDIS: Final = "Redis"
AGAIN: Final = "memory again"
UP: Final = "up"
BESIDE: Final = "up, on the same cores"
"""It takes them from the service, the engines and who asks, like everybody."""
STOPPED: Final = "stopped"
SLOW: Final = "slow"
DOWN: Final = "down"
REFILLED: Final = "back, empty"
CONDITIONS: Final = (AGAIN, UP, BESIDE, STOPPED, SLOW, DOWN, REFILLED)
PACES: Final = (20_000, int(measure.RATE))
"""Blocks a second while queries are asked: a fleet at work, and all that one core takes beside them."""
AT_A_TIME: Final = 100
"""Queries of a kind."""
LATENCY_S: Final = 0.1
SETTLE_S: Final = 1.5
"""Sources are in sync, and replicas have heard of each other."""
SAMPLE_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class StoreEffort:
    """How long to measure."""

    writing_rounds: int = 2
    latency_rounds: int = 16
    busy_s: float = 1.5
    starts: int = 2
    growth: int = 3
    """The larger index has so many times the workload's entries."""


QUICK: Final = StoreEffort(writing_rounds=1, latency_rounds=1, busy_s=1.0, starts=1)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One warm start."""

    entries: int
    ready_s: float
    rss_mb: float
    peak_mb: float
    replays: Counter[str]


@dataclass
class Samples:
    """One value a round, by figure and by who or what was measured."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    starts: list[Start] = field(default_factory=list)
    server: str = ""

    def add(self, figure: str, who: str, value: float) -> None:
        """One round's value."""
        self.values[figure][who].append(value)

    def typical(self, figure: str, who: str) -> float | None:
        """The median round, None without any."""
        values = self.values[figure][who]
        return median(values) if values else None

    def worst(self, figure: str, who: str) -> float | None:
        """The largest of all rounds, None without any."""
        return max(self.values[figure][who], default=None)


def run(arena: Arena, contender: Contender, effort: StoreEffort) -> Samples:
    """Measure all of it."""
    with Redis() as redis, ExitStack() as stack:
        bench = Bench(arena, contender, redis, effort)
        bench.writing()
        with bench.fresh(bench.memory) as plain:
            bench.fill(plain, 0)
            bench.latency(plain)
        kept = stack.enter_context(bench.fresh(bench.direct))
        bench.fill(kept, 0)
        bench.warm_starts(kept)
        bench.grow(kept)
        bench.warm_starts(kept)
    return bench.samples


def _say(what: str) -> None:
    print(f"[{time.strftime('%X')}] store: {what}", file=sys.stderr)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _with_store(contender: Contender, url: str) -> Contender:
    return replace(contender, name=REDIS, arguments=(*contender.arguments, "--store", url))


class Bench:
    """One server and what is measured with it."""

    def __init__(self, arena: Arena, contender: Contender, redis: Redis, effort: StoreEffort) -> None:
        self.samples = Samples(server=redis.version)
        self.memory = replace(contender, name=MEMORY)
        self.direct = _with_store(contender, redis.url)
        self._contender = contender
        self._arena = arena
        self._redis = redis
        self._effort = effort

    @contextmanager
    def fresh(self, contender: Contender) -> Iterator[Running]:
        """An empty service with engines of its own; Redis forgets what it had."""
        if contender.name == REDIS:
            self._redis.flush()
        with Running(contender, self._arena.workload.scale.engines, replayable=True) as running:
            time.sleep(SETTLE_S)
            yield running

    # Writing

    def writing(self) -> None:
        """Fill fresh services at a steady pace."""
        for turn in range(self._effort.writing_rounds):
            _say("writing")
            for one in measure.turns((self.memory, self.direct), turn):
                with self.fresh(one) as running:
                    self.fill(running, measure.RATE)

    def fill(self, running: Running, rate: int) -> None:
        """Fill a fresh service, until Redis has all of it too."""
        redis, samples, spool = self._redis, self.samples, self._arena.initial
        kind, who = "paced" if rate else "burst", running.name
        running.fleet.load(spool.path)
        memory, cpu, redis_cpu = redis.memory(), running.service.cpu_s(), redis.cpu_s()
        start = running.fleet.begin(spool.path, rate)
        lags = self._lags(spool, start, rate) if rate and who == REDIS else []
        sent = running.fleet.finish()
        queryable = running.reach(spool.mark)
        if who == REDIS:
            in_step = self._in_step(running)
            samples.add(f"{kind} behind", who, max(0.0, in_step - queryable))
            samples.add(f"{kind} rate", who, spool.blocks / (in_step - start) / 1e3)
            samples.add(f"{kind} redis cpu", who, (redis.cpu_s() - redis_cpu) / spool.blocks * 1e6)
        elif rate:
            time.sleep(max(0.0, sent + SETTLE_S - time.monotonic()))
        samples.add(f"{kind} cpu", who, (running.service.cpu_s() - cpu) / spool.blocks * 1e6)
        if lags:
            samples.add("lag p50", who, median(lags))
            samples.add("lag max", who, max(lags))
        if who == REDIS:
            time.sleep(SETTLE_S)  # what was replaced is being swept
            samples.add("memory", who, (redis.memory() - memory) / self._entries())
        self._arena.check_all(running)

    def _in_step(self, running: Running) -> float:
        """Wait until Redis has everything; returns when that was."""
        return self._redis.reach(running.fleet.count()["sent"], self._arena.workload.scale.engines)

    def _lags(self, spool: Spool, start: float, rate: int) -> list[float]:
        """How old what Redis holds is, by the number of its blocks, looked at until the last message is sent."""
        lags: list[float] = []
        shards: list[bytes] = []
        end = start + spool.blocks / rate
        while (now := time.monotonic()) < end:
            if now - start > SETTLE_S:
                shards = shards or self._redis.shards()
                held = self._redis.total(shards, "entries")
                lags.append(max(0.0, now - start - held / rate))
            time.sleep(SAMPLE_S)
        return lags

    # Latency

    def latency(self, plain: Running) -> None:
        """Ask with and without Redis while blocks arrive, at each pace, under each of the conditions.

        The service with Redis is filled by its engines too: what is loaded lies elsewhere in memory, and is slower.
        """
        self._redis.give_way()
        # the same blocks every time: Redis also keeps what is known of blocks that were removed
        self._further = {
            pace: messages.further(self._arena.workload, int(pace * self._effort.busy_s)) for pace in PACES
        }
        with self.fresh(self.direct) as kept:
            self._rounds(
                plain,
                kept,
                {
                    AGAIN: _nothing,
                    UP: _nothing,
                    STOPPED: self._stopped,
                    BESIDE: self._beside,
                    DOWN: self._down,
                },
            )
        with SlowLink(self._redis.server.port) as link:
            distant = _with_store(self._contender, f"redis://127.0.0.1:{link.port}")
            with self.fresh(distant) as kept:
                self._rounds(plain, kept, {SLOW: lambda: link.slow(LATENCY_S)})
        self._redis.server.stop()
        self._redis.server.start()  # with a priority like everybody's

    def _rounds(self, plain: Running, kept: Running, conditions: Conditions) -> None:
        kept.play(self._arena.initial, 0)
        self._in_step(kept)
        for turn in range(self._effort.latency_rounds):
            for pace in PACES:
                _say(f"latency, {pace} blocks/s, {', '.join(conditions)}")
                self._round(plain, kept, conditions, pace, turn)

    def _round(self, plain: Running, kept: Running, conditions: Conditions, pace: int, turn: int) -> None:
        """Ratios are to `--store memory` just before or after: a shared machine's speed changes by the second."""
        for number, (name, during) in enumerate(measure.turns(list(conditions.items()), turn)):
            other = plain if name == AGAIN else kept
            times: dict[str, Times] = {}
            for one, who in measure.turns(((plain, MEMORY), (other, name)), turn + number):
                times |= self._segment(one, who, during if who == name else _nothing, pace)
            for route in (BY_HASH, BY_TOKENS):
                base = percentiles(times[MEMORY][route])
                for who, its_times in times.items():
                    found = percentiles(its_times[route])
                    for figure, value, of in (("p50", found.p50, base.p50), ("p99", found.p99, base.p99)):
                        self.samples.add(f"{route} {figure} {pace}", who, value)
                        self.samples.add(f"{route} {figure} {pace} ratio", who, value / of)

    def _segment(
        self, one: Running, name: str, during: Callable[[], AbstractContextManager[None]], pace: int
    ) -> dict[str, Times]:
        """Ask while blocks arrive, which are removed again afterwards."""
        spools = [self._arena.spool(messages) for messages in self._further[pace]]
        for spool in spools:
            one.fleet.load(spool.path)
        time.sleep(measure.SETTLE_S)
        with during():
            times = {name: self._ask_both(one, spools[0], pace)}
        if name == DOWN:
            times[REFILLED] = self._ask_until_in_step(one)
        one.fleet.begin(spools[1].path, 0)
        one.fleet.finish()
        one.reach(spools[1].mark)
        if name not in {MEMORY, AGAIN}:
            self._in_step(one)
        return times

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        self._redis.server.pause()
        yield
        self._redis.server.resume()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        self._redis.give_way(yes=False)
        yield
        self._redis.give_way()

    @contextmanager
    def _down(self) -> Iterator[None]:
        self._redis.server.stop()
        yield
        self._redis.server.start()
        self._redis.give_way()

    def _ask_both(self, one: Running, spool: Spool, pace: int) -> Times:
        """By hash and by tokens in turn, for as long as a paced spool lasts."""
        end = one.fleet.begin(spool.path, pace) + spool.blocks / pace
        times: Times = {BY_HASH: [], BY_TOKENS: []}
        while time.monotonic() < end:
            self._ask(one, times)
        one.fleet.finish()
        one.reach(spool.mark)
        return times

    def _ask_until_in_step(self, one: Running) -> Times:
        """Ask while an empty Redis is filled again."""
        start = time.monotonic()
        sent = one.fleet.count()["sent"]
        times: Times = {BY_HASH: [], BY_TOKENS: []}
        while self._redis.total(self._redis.shards(), "next") != sent:
            self._ask(one, times)
        self.samples.add("refill", REDIS, time.monotonic() - start)
        return times

    def _ask(self, one: Running, times: Times) -> None:
        for route in times:
            times[route] += measure.ask(self._arena, one, self._arena.shared[route], AT_A_TIME)

    # Warm start

    def grow(self, kept: Running) -> None:
        """Store further blocks for the warm starts of a larger index."""
        entries = self._effort.growth * self._arena.workload.scale.entries - self._entries()
        kept.play(self._arena.spool(messages.more(self._arena.workload, entries)), 0)
        self._in_step(kept)

    def _entries(self) -> int:
        return self._redis.total(self._redis.shards(), "entries")

    def warm_starts(self, kept: Running) -> None:
        """Start anew, in good order and killed."""
        _say("warm starts")
        for turn in range(self._effort.starts):
            time.sleep(SETTLE_S)
            before = kept.fleet.count()
            ready_s = kept.restart(self.direct, kill=bool(turn % 2))
            peak_mb, rss_mb = kept.service.peak_mb(), kept.service.rss_mb()
            self._arena.check_all(kept)
            replays = kept.fleet.count()
            replays.subtract(before)
            entries = self._entries()
            self.samples.starts.append(
                Start(entries=entries, ready_s=ready_s, rss_mb=rss_mb, peak_mb=peak_mb, replays=replays)
            )
