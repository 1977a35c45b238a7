"""The demo of one service: all its sources, line by line."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group
from rich.text import Text

from kvindexer.commands.child import Child, kvindexer
from kvindexer.commands.client import UntrustedError, WayIn, call
from kvindexer.commands.deployment import HOST, POLL_TIMEOUT_S, SERVE, USUAL_PORT, Rates, free_port
from kvindexer.commands.failure import CommandError
from kvindexer.commands.tables import STATE_COLUMNS, TIER_COLUMNS, cell, state_cells, table, tier_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Alone:
    """One service."""

    def __init__(self, port: int | None, way: WayIn, *, secured: bool) -> None:
        self._way = way
        self.url = f"{'https' if secured else 'http'}://{HOST}:{free_port(port, USUAL_PORT)}"
        self._serve = Child("kvindexer serve", kvindexer(*SERVE, "--port", self.url.rpartition(":")[2]))
        self._rates = Rates()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._serve.close()

    def check(self) -> None:
        """See `Deployment.check`."""
        self._serve.check()

    def ready(self) -> bool:
        """See `Deployment.ready`."""
        try:
            call(self.url, "/health", timeout_s=POLL_TIMEOUT_S, way=self._way)
        except UntrustedError:
            raise
        except CommandError:
            return False
        return True

    def explanation(self) -> Sequence[str]:
        """See `Deployment.explanation`."""
        return (f"The service listens on {self.url}.",)

    def overview(self) -> Group:
        """See `Deployment.overview`."""
        answer = call(self.url, "/v1/sources", timeout_s=POLL_TIMEOUT_S, way=self._way)
        return overview(answer, self._rates.between(monotonic(), answer["totals"]))


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
