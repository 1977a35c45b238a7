"""The result: on the terminal, and between two markers of a document whose other text is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import zmq

from e2e_vllm.comparing import Outcome
from e2e_vllm.scenario import Recovery, Scenario
from kvindexer import __version__

BEGIN: Final = "<!-- e2e-vllm: begin (written by `make e2e-vllm`) -->"
END: Final = "<!-- e2e-vllm: end -->"
WIDTH: Final = 118
RECOVER_S: Final = 10.0
"""What is promised."""


@dataclass(frozen=True, slots=True)
class Versions:
    """What ran."""

    vllm: str
    torch: str
    python: str


def unequal(scenario: Scenario) -> list[Outcome]:
    """Wrong predictions that nothing excuses."""
    return [outcome for outcome in scenario.comparer.outcomes if not outcome.equal and outcome.excuse is None]


def failures(scenario: Scenario) -> list[str]:
    """Everything that is not as promised."""
    return [
        *(outcome.evidence() for outcome in unequal(scenario)),
        *(
            f"{one.stage}, {one.instance}: holds {one.told.held} blocks, kvindexer says {one.indexed}"
            for one in scenario.comparer.inventories
            if not one.equal
        ),
        *(
            f"{one.title}: recovered {one.seconds:.1f} s after the publisher could be reached"
            for one in scenario.recoveries
            if one.seconds > RECOVER_S
        ),
    ]


def text(scenario: Scenario, versions: Versions, seconds: float) -> str:
    """Build the whole report."""
    parts = [_circumstances(scenario, versions, seconds), _by_stage(scenario), _by_kind(scenario.comparer.outcomes)]
    parts += [_excused(scenario.comparer.outcomes), _stock(scenario), *map(_recovery, scenario.recoveries)]
    wrong = failures(scenario)
    parts.append("Not as promised:\n\n" + _list(wrong) if wrong else "Everything was as promised.")
    return "\n\n".join(parts)


def write(path: Path, generated: str) -> None:
    """Replace what stands between the markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{generated}\n{END}{after}", encoding="utf-8")


def _circumstances(scenario: Scenario, versions: Versions, seconds: float) -> str:
    outcomes = scenario.comparer.outcomes
    equal = sum(outcome.equal for outcome in outcomes)
    excused = sum(not outcome.equal and outcome.excuse is not None for outcome in outcomes)
    verdict = (
        f"**{len(outcomes)} requests sent alone: {equal} predictions equal, {len(unequal(scenario))} different**"
    )
    return _list(
        [
            f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds / 60:.1f} minutes, seed {scenario.seed}",
            f"kvindexer {__version__}{_commit()}, Python {platform.python_version()}, libzmq {zmq.zmq_version()}",
            f"vLLM {versions.vllm}, torch {versions.torch}, Python {versions.python}",
            *(f"{server.instance}: {server.variant.note}" for server in scenario.servers),
            f"Machine: {_processor()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
            f"{verdict}, and {excused} different that the wire can't tell (below)",
            f"{sum(outcome.trusted for outcome in outcomes)} answers said live, sound and complete",
            f"{scenario.uncompared} more requests were sent several at once and are not compared",
        ]
    )


def _by_stage(scenario: Scenario) -> str:
    outcomes = scenario.comparer.outcomes
    return _by("stage", [(outcome.stage, outcome) for outcome in outcomes])


def _by_kind(outcomes: Iterable[Outcome]) -> str:
    return _by("kind of prompt", [(outcome.prompt.kind, outcome) for outcome in outcomes])


def _by(title: str, named: Sequence[tuple[str, Outcome]]) -> str:
    head = [title, "requests", "salted", "with a hit", "tokens cached", "of", "equal", "excused", "different"]
    rows = []
    for name in [*dict.fromkeys(name for name, _ in named), "all"]:
        of = [outcome for other, outcome in named if name in (other, "all")]
        figures = [
            len(of),
            sum(outcome.prompt.salt is not None for outcome in of),
            sum(outcome.actual > 0 for outcome in of),
            sum(outcome.actual for outcome in of),
            sum(len(outcome.prompt.tokens) for outcome in of),
            sum(outcome.equal for outcome in of),
            sum(not outcome.equal and outcome.excuse is not None for outcome in of),
            sum(not outcome.equal and outcome.excuse is None for outcome in of),
        ]
        rows.append([name, *(f"{figure:,}" for figure in figures)])
    return _table(head, rows)


def _excused(outcomes: Iterable[Outcome]) -> str:
    excused = [outcome for outcome in outcomes if outcome.excuse is not None]
    rows = [
        [f"{one.excuse}: {one.instance}, {one.prompt.kind}", f"{one.predicted}", f"{one.actual}"] for one in excused
    ]
    intro = (
        f"{len(excused)} requests are not held to equality: vLLM says that its cache was emptied only with the "
        "events of the next step."
    )
    return _paragraph(intro) + _table(["request", "predicted", "actual"], rows)


def _stock(scenario: Scenario) -> str:
    head = ["after the stage", "server", "messages", "stored", "removed", "cleared", "held", "copies", "indexed"]
    rows = [
        [
            one.stage,
            one.instance,
            *(f"{n:,}" for n in one.told[:4]),
            str(one.told.held),
            str(one.told.copies),
            str(one.indexed),
        ]
        for one in scenario.comparer.inventories
    ]
    intro = (
        "Blocks that the engine holds by its own messages of this life, counted apart from kvindexer, and blocks "
        "that kvindexer says it holds:"
    )
    return _paragraph(intro) + _table(head, rows)


def _recovery(one: Recovery) -> str:
    rows = [
        [
            f"{seen.at - one.killed_at:+.2f}",
            seen.state,
            _yes(seen.sound),
            _yes(seen.complete),
            str(seen.epoch),
            str(seen.blocks),
            seen.why,
        ]
        for seen in one.seen
        if seen.at >= one.killed_at
    ]
    intro = (
        f"{one.title}, {one.instance}: {one.held_before} blocks were held. Its publisher could be reached again "
        f"{one.reachable_at - one.killed_at:.1f} s after the kill, and **{one.seconds:.2f}** s later it was live, "
        f"sound and complete in a new epoch (promised: {RECOVER_S:g} s). Clients got {one.answered} answers and "
        f"{one.failed} failures meanwhile. What `/v1/sources` said, in seconds since the kill:"
    )
    return _paragraph(intro) + _table(["s", "state", "sound", "complete", "epoch", "blocks", "why"], rows)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH) + "\n\n"


def _yes(value: bool) -> str:  # noqa: FBT001 - what it shows
    return "yes" if value else "no"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10.0)
    except OSError:
        return ""
    return f" ({said.stdout.strip()})" if said.returncode == 0 else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
