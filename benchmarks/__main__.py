"""`python -m benchmarks`: kvindexer and NVIDIA Dynamo's standalone indexer side by side, and what Redis costs."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import costs, match, match_report, measure, report, services, store, store_report
from benchmarks.arena import Arena, Running
from benchmarks.measure import Effort
from benchmarks.process import Neighbours
from benchmarks.services import Contender
from benchmarks.workload import Scale

QUICK: Final = Effort(ingest_rounds=1, rounds=2, requests=300, wrk_s=1, probes=60, busy_rounds=1, busy_s=1.5)
QUICK_ENTRIES: Final = 100_000
STORE: Final = "store"
SECTIONS: Final = ("ingest", "query", "throughput", "freshness", "busy", STORE)
MATCH: Final = "match"
"""A section of its own workload and table, which is of kvindexer alone."""


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--only", help=f"sections, separated by commas: {', '.join((*SECTIONS, MATCH))}")
    made.add_argument(
        "--services", default="kvindexer,dynamo", help="who is measured (default: both); one twice shows the noise"
    )
    made.add_argument("--quick", action="store_true", help="a tenth of the workload, about a minute")
    made.add_argument("--engines", type=int, default=64)
    made.add_argument("--entries", type=int, help="(engine, block) entries (default: 1000000)")
    made.add_argument("--rounds", type=int, help="rounds of every section")
    made.add_argument("--kvindexer-python", default=sys.executable, metavar="PATH", help="has kvindexer")
    made.add_argument("--kvindexer-args", default="", help="further arguments of `kvindexer serve`")
    made.add_argument("--dynamo-python", default=sys.executable, metavar="PATH", help="has ai-dynamo-runtime")
    made.add_argument("--dynamo-args", default="", help="further arguments of `dynamo.indexer`")
    made.add_argument("--write", type=Path, metavar="FILE", help="rewrite the generated part of this document")
    return made


def chosen(options: argparse.Namespace) -> tuple[list[Contender], list[str]]:
    """Find the services to measure, and name those that are not installed."""
    found = {
        "kvindexer": services.kvindexer(options.kvindexer_python, shlex.split(options.kvindexer_args)),
        "dynamo": services.dynamo(options.dynamo_python, shlex.split(options.dynamo_args)),
    }
    wanted = [name.strip() for name in options.services.split(",")]
    contenders: list[Contender] = []
    for name in wanted:
        if contender := found[name]:
            twice = contender in contenders
            contenders.append(replace(contender, name=f"{contender.name} again") if twice else contender)
    return contenders, [name for name in wanted if not found[name]]


def run(arena: Arena, contenders: list[Contender], sections: list[str], effort: Effort) -> None:
    """Measure the sections, the results are in the arena."""
    start = time.monotonic()
    with ExitStack() as stack:
        running: list[Running] = []
        for section in sections:
            print(f"[{time.monotonic() - start:5.0f} s] {section}", file=sys.stderr)
            if section == "ingest":
                measure.ingest(arena, contenders, effort)
                continue
            if not running:
                engines = arena.workload.scale.engines
                running = [stack.enter_context(Running(contender, engines)) for contender in contenders]
                for one in running:
                    one.play(arena.initial, 0)
                    arena.check_all(one)
            measure.WITH_FULL_SERVICES[section](arena, running, effort)


def finish(text: str, path: Path | None, markers: report.Markers) -> None:
    """Print a report, and write it into the document."""
    print(text)
    if path:
        report.write(path, text, markers)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = parser().parse_args(arguments)
    contenders, absent = chosen(options)
    if not contenders:
        print("nothing to measure: none of the services is installed", file=sys.stderr)
        return 1
    effort = QUICK if options.quick else Effort()
    if n := options.rounds:
        effort = replace(effort, ingest_rounds=n, rounds=n, busy_rounds=n)
    wanted = options.only.split(",") if options.only else SECTIONS
    if MATCH in wanted:
        mine = next((one for one in contenders if one.name == "kvindexer"), None)
        if mine is None:
            print("the section match is of kvindexer, which is not installed", file=sys.stderr)
            return 1
        match_effort, cost_effort = (
            (match.QUICK, costs.QUICK) if options.quick else (match.MatchEffort(), costs.CostEffort())
        )
        if n := options.rounds:
            match_effort, cost_effort = replace(match_effort, rounds=n), replace(cost_effort, rounds=n)
        neighbours = Neighbours()
        ways, told = match.run(mine, match_effort), costs.run(mine, cost_effort)
        finish(match_report.text(mine, ways, told, neighbours), options.write, match_report.MARKERS)
        if not any(section in wanted for section in SECTIONS):
            return 0
    entries = options.entries or (QUICK_ENTRIES if options.quick else Scale.entries)
    sections = [section for section in SECTIONS if section in wanted]
    scale = Scale(engines=options.engines, entries=entries)
    if compared := [section for section in sections if section != STORE]:
        with Arena(scale) as arena:
            run(arena, contenders, compared, effort)
            finish(report.text(arena, contenders, absent), options.write, report.MARKERS)
    ours = [contender for contender in contenders if contender.name == "kvindexer"]
    if STORE in sections and ours:
        with Arena(scale) as arena:
            samples = store.run(arena, ours[0], store.QUICK if options.quick else store.StoreEffort())
            finish(store_report.text(arena, ours[0], samples), options.write, store_report.MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
