"""What is measured, and the samples: one value a round and service."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Figure(NamedTuple):
    """One line of the table."""

    label: str
    unit: str
    more_is_better: bool = False
    grain: float = 1e-9
    """Smaller values can't be told apart."""


AGREEMENT: Final = 0.75
"""This share of the rounds has to say the same, or the difference may be the machine's noise."""

FIGURES: Final[dict[str, Figure]] = {
    "paced cpu": Figure("ingest, paced", "k blocks per CPU second", more_is_better=True),
    "paced wall": Figure("ingest, paced", "k blocks/s", more_is_better=True),
    "paced rss": Figure("memory, paced", "MB per million entries"),
    "burst cpu": Figure("ingest, all at once", "k blocks per CPU second", more_is_better=True),
    "burst wall": Figure("ingest, all at once", "k blocks/s", more_is_better=True),
    "burst rss": Figure("memory, all at once", "MB per million entries"),
    "burst peak": Figure("memory, all at once, peak", "MB per million entries"),
    "/query_by_hash p50": Figure("query by 512 hashes, p50", "ms"),
    "/query_by_hash p99": Figure("query by 512 hashes, p99", "ms"),
    "/query_by_hash cpu": Figure("query by 512 hashes, CPU", "us per request"),
    "/query p50": Figure("query by 8192 tokens, p50", "ms"),
    "/query p99": Figure("query by 8192 tokens, p99", "ms"),
    "/query cpu": Figure("query by 8192 tokens, CPU", "us per request"),
    "/query_by_hash rate": Figure("8 connections, by hash", "requests/s", more_is_better=True),
    "/query rate": Figure("8 connections, by tokens", "requests/s", more_is_better=True),
    "fresh p50": Figure("published -> queryable, p50", "ms"),
    "fresh p99": Figure("published -> queryable, p99", "ms"),
    "quiet p99": Figure("query by hash, p99, no ingest", "ms"),
    "busy p50": Figure("query by hash, p50, during ingest", "ms"),
    "busy p99": Figure("query by hash, p99, during ingest", "ms"),
    "busy lag": Figure("last message sent -> everything queryable", "ms", grain=10.0),
    "removal cpu": Figure("removals, one block an event", "k blocks per CPU second", more_is_better=True),
    "idle cpu": Figure("CPU with nothing to do", "ms per second", grain=10.0),
}


class Percentiles(NamedTuple):
    """Of one round, in milliseconds."""

    p50: float
    p99: float


class Comparison(NamedTuple):
    """How one service did against another."""

    better: float
    """So many times better, the median of the rounds; below 1 it was worse."""
    steady: bool
    """Most rounds say the same."""


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Median and 99th percentile."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return Percentiles(cuts[49] * 1e3, cuts[98] * 1e3)


@dataclass
class Results:
    """All samples, by figure and service, and the tally of checked answers."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    right: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)

    def add(self, figure: str, service: str, value: float) -> None:
        """One round's value."""
        if figure not in FIGURES:
            raise KeyError(figure)
        self.samples[figure][service].append(value)

    def check(self, service: str, *, right: int, of: int) -> None:
        """Count answers that were compared with the oracle's."""
        self.right[service] += right
        self.checked[service] += of

    def typical(self, figure: str, service: str) -> float | None:
        """The median round, or None when it was not measured."""
        values = self.samples[figure][service]
        return median(values) if values else None

    def comparison(self, figure: str, ours: str, theirs: str) -> Comparison | None:
        """Compare two services round by round, or None when they were not both measured."""
        kind = FIGURES[figure]
        pairs = zip(self.samples[figure][ours], self.samples[figure][theirs], strict=False)
        ratios = [max(a, kind.grain) / max(b, kind.grain) for a, b in pairs]
        if not ratios:
            return None
        better = [ratio if kind.more_is_better else 1 / ratio for ratio in ratios]
        typical = median(better)
        agreeing = sum((ratio > 1) == (typical > 1) for ratio in better)
        return Comparison(typical, agreeing >= AGREEMENT * len(better))
