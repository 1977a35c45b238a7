"""`kvindexer demo`: the service and a simulated fleet, a query to paste, and a live table.

demo ──starts──> serve <──registers, asks for routes── simulate
  └────asks for /v1/sources────┘  <────events over ZMQ────┘

With --replicas, several services behind a load balancer stand in the place of the one.  The services read variables
like any other: where those ask for a token, or for TLS, --token-file and its like are for the demo's own questions.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

from rich.live import Live

from kvindexer.commands.alone import Alone
from kvindexer.commands.child import Child, kvindexer
from kvindexer.commands.client import WayIn, call, way_in, way_in_flags
from kvindexer.commands.deployment import HOST, POLL_TIMEOUT_S
from kvindexer.commands.failure import CommandError
from kvindexer.commands.replicated import Replicated
from kvindexer.commands.stopping import Stop
from kvindexer.commands.tables import cell, console
from kvindexer.settings import load_settings

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from rich.console import Console, Group
    from rich.text import Text

    from kvindexer.commands.deployment import Deployment

START_WITHIN_S: Final = 30.0
LOOK_AGAIN_S: Final = 0.1
INTERVAL_S: Final = 1.0
PLAIN_INTERVAL_S: Final = 5.0

T = TypeVar("T")


def run(options: Namespace) -> int:
    """Show both at work until Ctrl-C; the fleet ends first, then what it was registered with, then we."""
    way = way_in(options)
    secured = load_settings(None, {"host": HOST}, os.environ).tls_cert_file is not None
    with Stop() as stop, ExitStack() as owned:
        folder = Path(owned.enter_context(TemporaryDirectory(prefix="kvindexer-demo-")))
        shown = owned.enter_context(_deployment(options, way, folder, secured=secured))
        _until(lambda: shown.ready() or None, stop, shown.check)
        simulate = kvindexer("simulate", *_fleet(options, shown.url, folder / "example.json"))
        fleet = owned.enter_context(Child("kvindexer simulate", simulate))

        def check() -> None:
            shown.check()
            fleet.check()

        example = _until(lambda: _held_example(shown.url, way, folder / "example.json"), stop, check)
        out = console()
        if example is not None:
            _explain(out, shown, example, options)
            stop.after(options.duration_s)
            _show(out, shown, options.interval_s, stop, check)
    return 0


def _deployment(options: Namespace, way: WayIn, folder: Path, *, secured: bool) -> AbstractContextManager[Deployment]:
    if options.replicas is None:
        return Alone(options.port, way, secured=secured)
    if secured:  # the balancer asks them in clear whether they are ready
        raise CommandError("replicas of a demo speak plain HTTP", "unset KVINDEXER_TLS_CERT_FILE", exit_code=2)
    return Replicated(options.replicas, options.port, folder, way)


def _fleet(options: Namespace, url: str, example: Path) -> list[str]:
    arguments = ["--register", url, "--route", url, "--example", str(example), "--model", options.model]
    for name in ("engines", "rate", "blocks", "cpu_blocks", "block_size"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return arguments + way_in_flags(options)


def _until(condition: Callable[[], T | None], stop: Stop, check: Callable[[], None]) -> T | None:
    """Wait for something to come true; None if it is time to stop before it does."""
    deadline = monotonic() + START_WITHIN_S
    while not stop.wait(LOOK_AGAIN_S):
        check()
        if (result := condition()) is not None:
            return result
        if monotonic() > deadline:
            raise CommandError(f"nothing to show after {START_WITHIN_S:.0f} s", "is the machine very busy?")
    return None


def _held_example(url: str, way: WayIn, file: Path) -> str | None:
    """Return the query that the fleet wrote down, once the service has heard of its blocks."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        matches = call(url, "/v1/match", json.loads(text), timeout_s=POLL_TIMEOUT_S, way=way)["matches"]
    except (OSError, CommandError):
        return None
    return text if any(match["matched_tokens"] for match in matches) else None


def _explain(out: Console, shown: Deployment, example: str, options: Namespace) -> None:
    """Print the query, unbroken, so that it can be pasted."""
    for line in shown.explanation():
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print("Who holds how much of a prompt of the fleet:", highlight=False)
    line = f"curl -s {_curl_flags(options)}{shown.url}/v1/match -H 'content-type: application/json' -d '{example}'"
    out.print(f"\n{line}\n", markup=False, highlight=False, soft_wrap=True)
    out.print("Ctrl-C ends the demo.", highlight=False)


def _curl_flags(options: Namespace) -> str:
    """Our way in, as curl has it; a token stays in its file."""
    named = {"--cacert": options.ca_file, "--cert": options.cert_file, "--key": options.key_file}
    flags = [f"{flag} {shlex.quote(str(file))} " for flag, file in named.items() if file]
    if options.token_file:
        flags.append(f'-H "authorization: Bearer $(cat {shlex.quote(str(options.token_file))})" ')
    return "".join(flags)


def _show(out: Console, shown: Deployment, interval_s: float | None, stop: Stop, check: Callable[[], None]) -> None:
    def look() -> Group | Text:
        check()
        try:
            return shown.overview()
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
