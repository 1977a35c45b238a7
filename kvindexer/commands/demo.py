"""`kvindexer demo`: the service and a simulated fleet, a query to paste, and a live table.

demo ──starts──> serve <──registers, asks for routes── simulate
  └────asks for /v1/sources────┘  <────events over ZMQ────┘
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.console import Group
from rich.live import Live
from rich.text import Text

from kvindexer.commands.child import Child
from kvindexer.commands.client import call
from kvindexer.commands.failure import CommandError
from kvindexer.commands.stopping import Stop
from kvindexer.commands.tables import STATE_COLUMNS, TIER_COLUMNS, cell, console, state_cells, table, tier_cells

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping

    from rich.console import Console

HOST: Final = "127.0.0.1"
USUAL_PORT: Final = 8090
START_WITHIN_S: Final = 30.0
LOOK_AGAIN_S: Final = 0.1
POLL_TIMEOUT_S: Final = 2.0
INTERVAL_S: Final = 1.0
PLAIN_INTERVAL_S: Final = 5.0

T = TypeVar("T")


def run(options: Namespace) -> int:
    """Show both at work until Ctrl-C; the fleet ends first, then the service, then we."""
    with Stop() as stop, ExitStack() as owned:
        folder = Path(owned.enter_context(TemporaryDirectory(prefix="kvindexer-demo-")))
        port = _port(options.port)
        url = f"http://{HOST}:{port}"
        serve = owned.enter_context(Child("serve", "--host", HOST, "--port", str(port), "--log-level", "warning"))
        _until(lambda: _answers(url), stop, serve)
        simulate = owned.enter_context(Child("simulate", *_fleet(options, url, folder / "example.json")))
        example = _until(lambda: _held_example(url, folder / "example.json"), stop, serve, simulate)
        out = console()
        if example is not None:
            _explain(out, url, example)
            stop.after(options.duration_s)
            _show(out, url, options.interval_s, stop, (serve, simulate))
    return 0


class Rates:
    """Turns counters into rates, from one look to the next."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, int]] | None = None

    def between(self, now_s: float, counters: Mapping[str, int]) -> dict[str, float]:
        """Return how much each counter grew a second since the last call; 0 at first."""
        then_s, then = self._before or (now_s, counters)
        self._before = (now_s, counters)
        passed_s = now_s - then_s
        return {
            name: (value - then.get(name, value)) / passed_s if passed_s else 0.0 for name, value in counters.items()
        }


def overview(answer: Mapping[str, Any], rates: Mapping[str, float]) -> Group:
    """Make the table of all sources, for a terminal of 80 columns."""
    made = table(
        ("instance", *STATE_COLUMNS, *TIER_COLUMNS, "seq", "lag ms", "gaps"), words=("instance", *STATE_COLUMNS)
    )
    for row in answer["sources"]:
        made.add_row(
            cell(f"{row['instance']} rank {row['rank']}" if row["rank"] else row["instance"]),
            *state_cells(row),
            *tier_cells(row["blocks"]),
            *(cell(row[name]) for name in ("seq", "lag_ms", "gaps")),
        )
    totals = answer["totals"]
    line = (
        f"{len(answer['sources'])} sources, {totals['blocks']} blocks, "
        f"{rates['events']:.0f} events/s, {rates['queries']:.0f} queries/s"
    )
    return Group(made, Text(line, style="bold"))


def _fleet(options: Namespace, url: str, example: Path) -> list[str]:
    arguments = ["--register", url, "--route", url, "--example", str(example), "--model", options.model]
    for name in ("engines", "rate", "blocks", "cpu_blocks", "block_size"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return arguments


def _port(wanted: int | None) -> int:
    """Find a port that can be listened on now; a wish that can't be met is an error."""
    for port in (USUAL_PORT, 0) if wanted is None else (wanted,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise CommandError(f"port {wanted} can't be used", "leave --port away to have a free one chosen")


def _until(condition: Callable[[], T | None], stop: Stop, *children: Child) -> T | None:
    """Wait for something to come true; None if it is time to stop before it does."""
    deadline = monotonic() + START_WITHIN_S
    while not stop.wait(LOOK_AGAIN_S):
        for child in children:
            child.check()
        if (result := condition()) is not None:
            return result
        if monotonic() > deadline:
            raise CommandError(f"nothing to show after {START_WITHIN_S:.0f} s", "is the machine very busy?")
    return None


def _answers(url: str) -> bool | None:
    try:
        call(url, "/health", timeout_s=POLL_TIMEOUT_S)
    except CommandError:
        return None
    return True


def _held_example(url: str, file: Path) -> str | None:
    """Return the query that the fleet wrote down, once the service has heard of its blocks."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        matches = call(url, "/v1/match", json.loads(text), timeout_s=POLL_TIMEOUT_S)["matches"]
    except (OSError, CommandError):
        return None
    return text if any(match["matched_tokens"] for match in matches) else None


def _explain(out: Console, url: str, example: str) -> None:
    """Print the query, unbroken, so that it can be pasted."""
    out.print(f"The service listens on {url}. Who holds how much of a prompt of the fleet:", highlight=False)
    line = f"curl -s {url}/v1/match -H 'content-type: application/json' -d '{example}'"
    out.print(f"\n{line}\n", markup=False, highlight=False, soft_wrap=True)
    out.print("Ctrl-C ends the demo.", highlight=False)


def _show(out: Console, url: str, interval_s: float | None, stop: Stop, children: tuple[Child, ...]) -> None:
    rates = Rates()

    def look() -> Group | Text:
        for child in children:
            child.check()
        try:
            answer = call(url, "/v1/sources", timeout_s=POLL_TIMEOUT_S)
            return overview(answer, rates.between(monotonic(), answer["totals"]))
        except CommandError as error:
            return cell(error.message)

    look()  # the first rates need something to be measured against
    if sys.stdout.isatty():
        with Live(console=out, auto_refresh=False) as live:
            while not stop.wait(interval_s or INTERVAL_S):
                live.update(look(), refresh=True)
    else:
        while not stop.wait(interval_s or PLAIN_INTERVAL_S):
            out.print(look())
            sys.stdout.flush()
