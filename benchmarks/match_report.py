"""The tables of the match section: ways of giving a prompt, batches, costs, goals."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Final

from benchmarks import costs as costing
from benchmarks import match
from benchmarks.report import Markers, grid, number, processor

if TYPE_CHECKING:
    from benchmarks.costs import Costs
    from benchmarks.match import Samples
    from benchmarks.process import Neighbours
    from benchmarks.services import Contender

MARKERS: Final = Markers(
    "<!-- match benchmarks: begin (written by `python -m benchmarks --only match --write`) -->",
    "<!-- match benchmarks: end -->",
)
LONG_MS: Final = 10.0
COST: Final = 1.1
SAID: Final = {
    costing.NEITHER: "nothing of it",
    costing.HEAT: "heat",
    costing.NEITHER_NEW: "nothing of it, new prompts",
    costing.HEAT_NEW: "heat, new prompts",
    costing.TRUNK: f"{costing.ROUTED} routed prompts that share the trunk",
    costing.ALIKE: f"{costing.ROUTED} routed prompts that go on alike",
    costing.REPORTED: "engines' reports",
    costing.ALL_TRUNK: "heat, reports, and prompts that share the trunk",
    costing.ALL: "heat, reports, and prompts that go on alike",
}


def text(contender: Contender, samples: Samples, costs: Costs, neighbours: Neighbours) -> str:
    """Build the whole section."""
    lines = [
        f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Service: {contender.name} {contender.version}",
        f"Machine: {processor()}, {len(os.sched_getaffinity(0))} cores, shared by all",
        f"Neighbours: other processes took {neighbours.share():.0%} of the machine meanwhile",
        f"Answers: {samples.right + costs.right:,} of {samples.checked + costs.checked:,} right",
    ]
    parts = ["\n".join(f"- {line}" for line in lines), _goals(samples, costs), _ways(samples), _costs(costs)]
    return "\n\n".join(parts)


def _goals(samples: Samples, costs: Costs) -> str:
    rows = []
    for way in (match.TOKENS, match.PACKED, match.BINARY, match.KEYS):
        p50, cpu = samples.ratio(way, match.QUERY), samples.ratio(way, match.QUERY, "cpu_us")
        measured = f"{p50:.2f} x its p50, {cpu:.2f} x its CPU"
        rows.append([f"at least as fast as `/query`: {way}", measured, _yes(p50 <= 1)])
    long_ms = median(samples.p50_ms[match.LONG])
    rows.append([f"{match.LONG}: p50 of at most {LONG_MS:g} ms", f"{number(long_ms)} ms", _yes(long_ms <= LONG_MS)])
    for name in _batches(samples):
        p50, cpu = (samples.ratio(name, f"{name}{match.ONE_BY_ONE}", kind) for kind in ("p50_ms", "cpu_us"))
        measured = f"{p50:.2f} x the time, {cpu:.2f} x the CPU"
        rows.append([f"{name}: cheaper in one call", measured, _yes(max(p50, cpu) < 1)])
    for name in costs.p50_ms:
        if name not in {costing.NEITHER, costing.NEITHER_NEW}:
            cpu = costs.ratio(name)
            rows.append([f"{SAID[name]}: at most a tenth", f"{cpu:.2f} x the CPU", _yes(cpu <= COST)])
    return grid(["goal", "measured", "reached"], rows)


def _yes(reached: bool) -> str:  # noqa: FBT001 - one word for one bit
    return "yes" if reached else "**no**"


def _batches(samples: Samples) -> list[str]:
    return [name for name in samples.p50_ms if f"{name}{match.ONE_BY_ONE}" in samples.p50_ms]


def _ways(samples: Samples) -> str:
    rows = [
        [name, *(number(median(figures[name])) for figures in (samples.p50_ms, samples.p99_ms, samples.cpu_us))]
        for name in samples.p50_ms
    ]
    head = [f"POST /v1/match, {match.ENGINES} engines", "p50, ms a prompt", "p99, ms", "CPU, us a prompt"]
    return grid(head, rows)


def _costs(costs: Costs) -> str:
    rows = []
    for name, values in costs.cpu_us.items():
        asks = name in costs.p50_ms
        p50 = [number(median(costs.p50_ms[name])), f"{costs.ratio(name, 'p50_ms'):.2f}"] if asks else ["", ""]
        cpu = [number(median(values)), f"{costs.ratio(name):.2f}" if asks else ""]
        rows.append([f"/v1/match with {SAID[name]}" if asks else f"a call of {name}", *cpu, *p50])
    head = [f"8,192 tokens, {costing.ENGINES} engines", "CPU, us", "to that with nothing", "p50, ms", "to it"]
    return grid(head, rows)
