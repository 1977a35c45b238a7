"""`kvindexer doctor`: is a running service well, and what is to be done if not.

It only asks: /health, /v1/sources, and the version in the OpenAPI document.  What the answers mean is in `checkup`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from kvindexer import __version__
from kvindexer.commands.checkup import Finding, findings
from kvindexer.commands.client import OPEN, UnreachableError, UntrustedError, WayIn, call, way_in
from kvindexer.commands.failure import CommandError
from kvindexer.commands.tables import BAD, DOUBTFUL, GOOD, cell, console

if TYPE_CHECKING:
    from argparse import Namespace

_STYLES: Final = {"ok": GOOD, "warn": DOUBTFUL, "fail": BAD}


def run(options: Namespace) -> int:
    """Ask and print; the exit code is 1 if anything failed."""
    found = examine(options.url, way_in(options))
    counts = Counter(finding.level for finding in found)
    worst = next(level for level in ("fail", "warn", "ok") if counts[level])
    if options.json:
        checks = [finding._asdict() for finding in found]
        print(json.dumps({"url": options.url, "status": worst, "checks": checks}, indent=2))
    else:
        out = console()
        out.print(findings_table(found))
        out.print(cell(", ".join(f"{counts[level]} {level}" for level in ("fail", "warn", "ok")), _STYLES[worst]))
    return 1 if counts["fail"] else 0


def examine(url: str, way: WayIn = OPEN) -> list[Finding]:
    """All findings about the service there."""
    try:
        health = call(url, "/health", way=way)
    except UnreachableError as error:
        found = isinstance(error, UntrustedError)
        advice = error.hint if found else "is the service running there, and is the port the right one?"
        return [Finding("fail", "reachable", error.message, advice)]
    try:
        sources = call(url, "/v1/sources", way=way)["sources"]
        version = call(url, "/openapi.json", way=way)["info"]["version"]
        return [Finding("ok", "reachable", url), *findings(health, sources, str(version), __version__)]
    except (LookupError, TypeError, AttributeError):
        raise CommandError("the answer has an unknown form", f"is {url} another version?") from None


def findings_table(found: list[Finding]) -> Table:
    """A line a check, and below it what to do."""
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True, min_width=max(map(len, _STYLES)))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for finding in found:
        said = cell(finding.what)
        if finding.advice:
            said = Text("\n").join((said, cell(f"-> {finding.advice}", "bold")))
        made.add_row(cell(finding.level, _STYLES[finding.level]), cell(finding.check), said)
    return made
