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
    from collections.abc import Iterable, Mapping, Sequence

PIPE_WIDTH: Final = 200
"""Columns where there is no terminal whose width could be asked."""
_LEAST_CUT: Final = 12
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


def fitting_table(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    width: int,
    *,
    words: Iterable[str],
    dispensable: Iterable[str],
) -> Table:
    """Return a table that fits: where it gets narrow, dispensable columns go, then the longest texts are cut."""
    cells = {name: [cell(row.get(name)) for row in rows] for name in columns}
    widths = {name: max(len(name), *(len(one) for one in cells[name]), 1) for name in columns}
    for name in dispensable:
        if _needed(widths) > width:
            del widths[name]
    while _needed(widths) > width and max(widths.values()) > _LEAST_CUT:
        longest = max(widths, key=widths.__getitem__)
        widths[longest] -= 1
    made = table(widths, words=words)
    for column, name in zip(made.columns, widths, strict=True):
        column.min_width = column.max_width = widths[name]
    for line in zip(*(cells[name] for name in widths), strict=True):
        made.add_row(*line)
    return made


def _needed(widths: Mapping[str, int]) -> int:
    """Columns of the terminal, with what stands between and beside those of the table."""
    return sum(widths.values()) + len(widths) + 1


def tier_cells(by_tier: Mapping[str, Any]) -> list[Text]:
    """Show a number a tier, in the order of the tiers."""
    return [cell(by_tier.get(tier.label, 0)) for tier in TIERS]


TIER_COLUMNS: Final = tuple(tier.label for tier in TIERS)


def state_cells(row: Mapping[str, Any]) -> list[Text]:
    """Show state, sound and complete: how far a row can be trusted."""
    state = row.get("state")
    return [cell(state, STATE_STYLES.get(str(state), "")), cell(row.get("sound")), cell(row.get("complete"))]


STATE_COLUMNS: Final = ("state", "sound", "complete")
