"""The table: on the terminal, and between two markers of a document whose other text is kept."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks import messages, throughput
from benchmarks.results import FIGURES, Comparison, Results
from benchmarks.workload import BRANCHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.arena import Arena
    from benchmarks.services import Contender


class Markers(NamedTuple):
    """Lines of a document between which a part of it is generated."""

    begin: str
    end: str


MARKERS: Final = Markers(
    "<!-- benchmarks: begin (written by `python -m benchmarks --write`) -->", "<!-- benchmarks: end -->"
)
SAME: Final = 0.05
"""Differences below this share are called equal."""


def number(value: float | None) -> str:
    """Three digits that matter, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    better = comparison.better
    if abs(better - 1) < SAME:
        return "equal"
    said = f"{better:.2f} x better" if better > 1 else f"**{1 / better:.2f} x worse**"
    return said if comparison.steady else f"{said}, rounds differ"


def table(results: Results, names: Sequence[str]) -> str:
    """Build a Markdown table; with two services the last column compares the first with the second."""
    pair = len(names) == 2
    head = ["", "unit", *names, *([f"{names[0]}, median of the rounds' ratios"] if pair else [])]
    rows = []
    for key, figure in FIGURES.items():
        if not any(results.samples[key][name] for name in names):
            continue
        values = [number(results.typical(key, name)) for name in names]
        verdict = [_verdict(results.comparison(key, *names))] if pair else []
        rows.append([figure.label, figure.unit, *values, *verdict])
    tally = [f"{results.right[name]:,} of {results.checked[name]:,}" for name in names]
    rows.append(["right answers", "", *tally, *([""] if pair else [])])
    return grid(head, rows)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Build a Markdown table with columns of even width."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    first = "| " + " | ".join(c.ljust(w) for c, w in zip(head, widths, strict=True)) + " |"
    return "\n".join([first, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


def behind(results: Results, names: Sequence[str]) -> list[str]:
    """Labels of the figures in which the first service is worse than the second."""
    if len(names) != 2:
        return []
    found = []
    for key, figure in FIGURES.items():
        comparison = results.comparison(key, *names)
        if comparison and comparison.better <= 1 - SAME:
            found.append(f"{figure.label} ({figure.unit})")
    return found


def processor() -> str:
    """Name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def circumstances(arena: Arena, contenders: Sequence[Contender], absent: Sequence[str]) -> str:
    """When, where, what."""
    workload, scale = arena.workload, arena.workload.scale
    sent = sum(1 for _ in messages.read_spool(arena.initial.path, range(scale.engines)))
    events = sent - scale.engines  # the mark is none of the workload
    versions = ", ".join(f"{contender.name} {contender.version}" for contender in contenders)
    cores = len(os.sched_getaffinity(0))
    shared = f"{cores} cores, shared by services, publishers and client"
    client = throughput.client_name()
    entries = f"{scale.entries:,} (engine, block) entries in blocks of 16 tokens, {events:,} store events"
    queries = f"{len(workload.families) * BRANCHES} different prompts of 512 blocks, every engine in every answer"
    lines = [
        f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Services: {versions}" + "".join(f"; {name} was not installed and is left out" for name in absent),
        f"Machine: {processor()}, {shared}",
        f"Neighbours: other processes took {arena.neighbours.share():.0%} of the machine meanwhile",
        f"Linux {platform.release()}, Python {platform.python_version()}; 8 connections driven by {client}",
        f"Workload: {scale.engines} engines, {entries}",
        f"Queries: {queries}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def text(arena: Arena, contenders: Sequence[Contender], absent: Sequence[str]) -> str:
    """Build the whole report."""
    names = [contender.name for contender in contenders]
    parts = [circumstances(arena, contenders, absent), table(arena.results, names)]
    if worse := behind(arena.results, names):
        parts.append(f"Where {names[0]} is behind: {'; '.join(worse)}.")
    return "\n\n".join(parts)


def write(path: Path, generated: str, markers: Markers = MARKERS) -> None:
    """Replace what stands between the markers, or append them."""
    begin, end = markers
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    part = f"{begin}\n{generated}\n{end}"
    if begin in old and end in old:
        before, _, rest = old.partition(begin)
        after = rest.partition(end)[2]
        path.write_text(before + part + after)
    else:
        path.write_text(f"{old.rstrip()}\n\n{part}\n")
