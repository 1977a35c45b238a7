"""The tables of the store section: goals, writing, latency, warm start."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.client import BY_HASH, BY_TOKENS
from benchmarks.report import Markers, grid, number, processor
from benchmarks.store import AGAIN, CONDITIONS, DOWN, MEMORY, PACES, REDIS, SLOW, STOPPED, UP

if TYPE_CHECKING:
    from benchmarks.arena import Arena
    from benchmarks.services import Contender
    from benchmarks.store import Samples, Start

MARKERS: Final = Markers(
    "<!-- store benchmarks: begin (written by `python -m benchmarks --only store --write`) -->",
    "<!-- store benchmarks: end -->",
)
MOST_BYTES: Final = 32.0
MOST_ADDED: Final = 0.5
MOST_REDIS_US: Final = 10.0
"""CPU of 100,000 blocks/s on one core."""
SAME_P99: Final = 1.25
"""Ratios that count as the same: on shared cores one service differs from itself by that much and more."""
READY: Final = ((1_000_000, 5.0), (3_000_000, 15.0))
"""Entries, and seconds until a service with them is ready."""
NEAR: Final = 0.2


class Goal(NamedTuple):
    """One goal, and what was measured of it."""

    text: str
    measured: str
    reached: bool


def text(arena: Arena, contender: Contender, samples: Samples) -> str:
    """Build the whole section."""
    scale = arena.workload.scale
    right, checked = arena.results.right.total(), arena.results.checked.total()
    lines = [
        f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Service: {contender.name} {contender.version}, one replica; {samples.server}, without persistence",
        f"Machine: {processor()}, {len(os.sched_getaffinity(0))} cores, shared by all",
        f"Neighbours: other processes took {arena.neighbours.share():.0%} of the machine meanwhile",
        f"Workload: {scale.engines} sources with replay sockets, {scale.entries:,} entries",
        f"Answers: {right:,} of {checked:,} right",
    ]
    parts = [
        "\n".join(f"- {line}" for line in lines),
        _goals(goals(samples)),
        _writing(samples),
        _latency(samples),
        _warm_starts(samples),
    ]
    return "\n\n".join(parts)


def goals(samples: Samples) -> list[Goal]:
    """Each goal with its figure."""
    memory = samples.worst("memory", REDIS) or 0.0
    redis_us = samples.worst("paced redis cpu", REDIS) or 0.0
    behind = samples.typical("paced behind", REDIS) or 0.0
    added = _added(samples, "paced cpu")
    found = [
        Goal(f"at most {MOST_BYTES:g} bytes of Redis an entry", f"{memory:.1f} bytes", memory <= MOST_BYTES),
        Goal(
            "100,000 blocks/s on one core of Redis",
            f"{1e3 / redis_us if redis_us else 0:,.0f},000 blocks a CPU second",
            redis_us <= MOST_REDIS_US,
        ),
        Goal(
            "writing keeps up with paced ingest",
            f"Redis in step {behind:.1f} s behind the last message, at most {_s(samples.worst('lag max', REDIS))} "
            "behind meanwhile",
            (samples.worst("lag max", REDIS) or 0.0) <= LAG_S,
        ),
        Goal("less than half of ingest's CPU for it", f"{added:+.2f} of it", added < MOST_ADDED),
    ]
    for pace, condition in product(PACES, (UP, STOPPED, SLOW, DOWN)):
        ratios = [samples.typical(f"{route} p99 {pace} ratio", condition) or 0.0 for route in (BY_HASH, BY_TOKENS)]
        found.append(
            Goal(
                f"{pace:,} blocks/s, Redis {condition}: p99 at most {SAME_P99:g} x of that without",
                f"{ratios[0]:.2f} x by hash, {ratios[1]:.2f} x by tokens",
                max(ratios) <= SAME_P99,
            )
        )
    for entries, limit_s in READY:
        starts = [one for one in samples.starts if abs(one.entries / entries - 1) < NEAR]
        if starts:
            slowest = max(one.ready_s for one in starts)
            claim = f"ready with {entries / 1e6:g} M entries within {limit_s:g} s"
            found.append(Goal(claim, f"{slowest:.1f} s", slowest <= limit_s))
    return found


def _goals(found: list[Goal]) -> str:
    rows = [[goal.text, goal.measured, "yes" if goal.reached else "**no**"] for goal in found]
    return grid(["goal", "measured", "reached"], rows)


LAG_S: Final = 3.0
"""`store_takeover_s`: another replica would write what lags longer."""


def _s(seconds: float | None) -> str:
    return f"{number(seconds)} s"


def _added(samples: Samples, figure: str) -> float:
    """CPU that the store adds, as a share of that without it."""
    with_it, without = samples.typical(figure, REDIS), samples.typical(figure, MEMORY)
    return with_it / without - 1 if with_it and without else 0.0


def _writing(samples: Samples) -> str:
    rows = []
    for kind, label in (("paced", "86,000 blocks/s"), ("burst", "all at once")):
        rows += [
            [
                f"service, {label}",
                "CPU us a block",
                number(samples.typical(f"{kind} cpu", MEMORY)),
                number(samples.typical(f"{kind} cpu", REDIS)),
                f"{_added(samples, f'{kind} cpu'):+.2f}",
            ],
            [f"Redis, {label}", "CPU us a block", "", number(samples.typical(f"{kind} redis cpu", REDIS)), ""],
            [f"blocks until Redis has all, {label}", "k/s", "", number(samples.typical(f"{kind} rate", REDIS)), ""],
            [
                f"last message queryable -> in Redis, {label}",
                "s",
                "",
                number(samples.typical(f"{kind} behind", REDIS)),
                "",
            ],
        ]
    rows += [
        ["age of what Redis holds, typically", "s", "", number(samples.typical("lag p50", REDIS)), ""],
        ["age of what Redis holds, at most", "s", "", number(samples.worst("lag max", REDIS)), ""],
        ["memory of Redis an entry", "bytes", "", number(samples.worst("memory", REDIS)), ""],
        ["an empty Redis is filled again in", "s", "", number(samples.typical("refill", REDIS)), ""],
    ]
    return grid(["writing", "unit", "`--store memory`", "with Redis", "added"], rows)


def _latency(samples: Samples) -> str:
    head = [
        "queries during ingest",
        "blocks/s",
        "`--store memory`",
        *(name if name == AGAIN else f"Redis {name}" for name in CONDITIONS),
    ]
    rows = []
    routes = ((BY_HASH, "512 hashes"), (BY_TOKENS, "8192 tokens"))
    for pace, (route, label), figure in product(PACES, routes, ("p50", "p99")):
        key = f"{route} {figure} {pace}"
        cells = []
        for name in CONDITIONS:
            ratio = samples.typical(f"{key} ratio", name)
            cells.append("-" if ratio is None else f"{ratio:.2f} x")
        rows.append([f"{label}, {figure}", f"{pace:,}", f"{number(samples.typical(key, MEMORY))} ms", *cells])
    return grid(head, rows)


def _warm_starts(samples: Samples) -> str:
    head = [
        "warm start",
        "ready after, s",
        "memory, MB",
        "its peak, MB",
        "replays",
        "of them from 0",
        "messages replayed",
    ]
    return grid(head, [_start(one) for one in samples.starts])


def _start(one: Start) -> list[str]:
    counts = (one.replays[name] for name in ("asked", "from_zero", "replayed"))
    figures = (number(one.ready_s), f"{one.rss_mb:.0f}", f"{one.peak_mb:.0f}")
    return [f"{one.entries:,} entries", *figures, *map(str, counts)]
