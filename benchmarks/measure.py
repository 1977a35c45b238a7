"""The measurements.  In every round each service has its turn; nothing here asserts a time.

Each section takes the arena and what it measures, and leaves its samples in the arena's results.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from benchmarks import messages, throughput
from benchmarks.arena import Arena, Running
from benchmarks.client import BY_HASH, BY_TOKENS
from benchmarks.results import percentiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.arena import Asked
    from benchmarks.services import Contender

T = TypeVar("T")

RATE: Final = 86_000
"""Blocks a second when paced."""
SETTLE_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    ingest_rounds: int = 4
    rounds: int = 9
    requests: int = 1000
    wrk_s: int = 2
    probes: int = 120
    busy_rounds: int = 4
    busy_s: float = 4.0


def turns(of: Sequence[T], turn: int) -> Sequence[T]:
    """Reverse the order in every other round: who comes first has no advantage."""
    return of[:: -1 if turn % 2 else 1]


def ingest(arena: Arena, contenders: Sequence[Contender], effort: Effort) -> None:
    """Fill fresh services, paced and all at once: blocks per CPU second and per second, memory afterwards."""
    for turn in range(effort.ingest_rounds):
        # Paced filling takes its time and varies less: every other round will do.
        for kind, rate in (("paced", RATE), ("burst", 0))[turn % 2 :]:
            for contender in turns(contenders, turn // 2 if rate else turn):
                with Running(contender, arena.workload.scale.engines) as running:
                    _fill(arena, running, kind, rate)


def _fill(arena: Arena, running: Running, kind: str, rate: int) -> None:
    spool, results, service = arena.initial, arena.results, running.service
    running.fleet.load(spool.path)
    cpu = service.cpu_s()
    start = running.fleet.begin(spool.path, rate)
    running.fleet.finish()
    wall = running.reach(spool.mark) - start
    cpu = service.cpu_s() - cpu
    results.add(f"{kind} cpu", running.name, spool.blocks / cpu / 1e3)
    results.add(f"{kind} wall", running.name, spool.blocks / wall / 1e3)
    time.sleep(SETTLE_S)
    millions = arena.workload.scale.entries / 1e6
    results.add(f"{kind} rss", running.name, (service.rss_mb() - running.idle_mb) / millions)
    if not rate:
        results.add("burst peak", running.name, (service.peak_mb() - running.idle_mb) / millions)
    arena.check_all(running)


def ask(arena: Arena, running: Running, asked: Sequence[Asked], count: int, until: float = 0.0) -> list[float]:
    """Ask in turn on one connection, `count` times or until a time; check every answer afterwards."""
    sent: list[Asked] = []
    answers: list[bytes] = []
    times: list[float] = []
    with running.connect() as connection:
        connection.ask(asked[0].request)
        while len(times) < count or time.monotonic() < until:
            ask = asked[len(times) % len(asked)]
            took, answer = connection.timed(ask.request)
            times.append(took)
            sent.append(ask)
            answers.append(answer)
    arena.check(running.name, answers, sent)
    return times


def query(arena: Arena, running: Sequence[Running], effort: Effort) -> None:
    """Measure latency on one connection, CPU per request, and CPU with nothing to do."""
    for turn in range(effort.rounds):
        for one in turns(running, turn):
            cpu = one.service.cpu_s()
            time.sleep(SETTLE_S)
            arena.results.add("idle cpu", one.name, (one.service.cpu_s() - cpu) / SETTLE_S * 1e3)
        for route in (BY_HASH, BY_TOKENS):
            for one in turns(running, turn):
                cpu = one.service.cpu_s()
                times = ask(arena, one, arena.shared[route], effort.requests)
                cpu = one.service.cpu_s() - cpu
                p50, p99 = percentiles(times)
                arena.results.add(f"{route} p50", one.name, p50)
                arena.results.add(f"{route} p99", one.name, p99)
                arena.results.add(f"{route} cpu", one.name, cpu / len(times) * 1e6)


def throughputs(arena: Arena, running: Sequence[Running], effort: Effort) -> None:
    """Measure requests per second over eight connections; an answer's length stands for the checked answer."""
    for turn in range(effort.rounds):
        for route, asked in arena.shared.items():
            bodies = [ask.body for ask in asked]
            for one in turns(running, turn):
                with one.connect() as connection:
                    answers = [connection.ask(ask.request) for ask in asked]
                arena.check(one.name, answers, asked)
                load = throughput.drive(one.service.port, route, bodies, [len(a) for a in answers], effort.wrk_s)
                arena.results.add(f"{route} rate", one.name, load.requests / load.seconds)
                arena.results.check(one.name, right=load.requests - load.wrong, of=load.requests)


def freshness(arena: Arena, running: Sequence[Running], effort: Effort) -> None:
    """Publish one block, ask until it is there."""
    engines = arena.workload.scale.engines
    for turn in range(effort.rounds):
        made = [arena.block([i % engines]) for i in range(effort.probes)]
        path = arena.steps([message for content, _ in made for message in content])
        for one in turns(running, turn):
            times: list[float] = []
            answers: list[bytes] = []
            one.fleet.load(path)
            with one.connect() as connection:
                for i, (_, ask) in enumerate(made):
                    empty = connection.ask(ask.request)
                    one.fleet.step(path, i % engines)
                    while len(answer := connection.ask(ask.request)) == len(empty):
                        pass
                    seen = time.monotonic()
                    times.append(seen - one.fleet.stepped(i % engines))
                    answers.append(answer)
                    time.sleep(arena.workload.rng.uniform(0.0005, 0.004))
            arena.check(one.name, answers, [ask for _, ask in made])
            p50, p99 = percentiles(times)
            arena.results.add("fresh p50", one.name, p50)
            arena.results.add("fresh p99", one.name, p99)


def busy(arena: Arena, running: Sequence[Running], effort: Effort) -> None:
    """Measure query latency while engines store 86,000 blocks/s, against idle; then remove those blocks again."""
    asked = arena.shared[BY_HASH]
    for turn in range(effort.busy_rounds):
        stores, removals = map(arena.spool, messages.further(arena.workload, int(RATE * effort.busy_s)))
        for one in turns(running, turn):
            one.fleet.load(stores.path)
            one.fleet.load(removals.path)
            time.sleep(SETTLE_S)
            quiet = percentiles(ask(arena, one, asked, effort.requests))
            arena.results.add("quiet p99", one.name, quiet.p99)
            start = one.fleet.begin(stores.path, RATE)
            times = ask(arena, one, asked, 100, until=start + stores.blocks / RATE)
            one.fleet.finish()
            over = time.monotonic()
            lag = one.reach(stores.mark) - over
            p50, p99 = percentiles(times)
            arena.results.add("busy p50", one.name, p50)
            arena.results.add("busy p99", one.name, p99)
            arena.results.add("busy lag", one.name, lag * 1e3)
            cpu = one.service.cpu_s()
            one.fleet.begin(removals.path, 0)
            one.fleet.finish()
            one.reach(removals.mark)
            arena.results.add("removal cpu", one.name, removals.blocks / (one.service.cpu_s() - cpu) / 1e3)
            arena.check_all(one)


WITH_FULL_SERVICES: Final = {
    "query": query,
    "throughput": throughputs,
    "freshness": freshness,
    "busy": busy,
}
"""Sections that measure services which already hold the workload."""
