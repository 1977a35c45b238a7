"""Two things to count with: durations in buckets, and counters whose owners come and go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final

LATENCY_BOUNDS_S: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)


class Latencies:
    """One route's histogram."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more observation."""
        self.buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Buckets as Prometheus wants them: label and number of all observations up to it."""
        total = 0
        rows = []
        for bound, count in zip((*map(str, LATENCY_BOUNDS_S), "+Inf"), self.buckets, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Accumulated:
    """A counter of the whole fleet, made of the counters of sources, which end with their source."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[str, int] = {}

    def look(self, counts: Mapping[str, int]) -> int:
        """Add what has come since the last look; a count below the last one is that of a new source."""
        for source, count in counts.items():
            before = self._seen.get(source, 0)
            self.total += count - before if count >= before else count
        self._seen = dict(counts)
        return self.total
