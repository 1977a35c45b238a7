"""Tables of the commands.  What comes from the service is shown as plain text: no markup, no control characters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvindexer.types import TIERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PIPE_WIDTH: Final = 200
"""Columns where there is no terminal whose width could be asked."""
GOOD: Final = "green"
DOUBTFUL: Final = "yellow"
BAD: Final = "red"
STATE_STYLES: Final = {"live": GOOD, "syncing": DOUBTFUL, "stale": DOUBTFUL, "gone": BAD}


def console() -> Console:
    """Return a console on standard output; one that is no terminal gets wide, plain lines."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def cell(value: object, style: str = "") -> Text:
    """Show one value."""
    match value:
        case None:
            shown = "-"
        case bool():
            return Text("yes" if value else "no", style=style or (GOOD if value else DOUBTFUL))
        case float():
            shown = f"{value:.1f}"
        case _:
            shown = str(value)
    return Text("".join(letter if letter.isprintable() else "?" for letter in shown), style=style)


def table(columns: Iterable[str], *, words: Iterable[str] = ()) -> Table:
    """Return an empty table; all columns but `words` hold numbers.  Where it gets narrow, the first column folds."""
    left = set(words)
    made = Table(box=box.SIMPLE_HEAD, padding=0)
    for place, name in enumerate(columns):
        made.add_column(
            name,
            justify="left" if name in left else "right",
            min_width=len(name),
            no_wrap=place > 0,
            overflow="ellipsis" if place > 0 else "fold",
        )
    return made


def tier_cells(by_tier: Mapping[str, Any]) -> list[Text]:
    """Show a number a tier, in the order of the tiers."""
    return [cell(by_tier.get(tier.label, 0)) for tier in TIERS]


TIER_COLUMNS: Final = tuple(tier.label for tier in TIERS)


def state_cells(row: Mapping[str, Any]) -> list[Text]:
    """Show state, sound and complete: how far a row can be trusted."""
    state = row.get("state")
    return [cell(state, STATE_STYLES.get(str(state), "")), cell(row.get("sound")), cell(row.get("complete"))]


STATE_COLUMNS: Final = ("state", "sound", "complete")
