"""What a demo shows at work: one service (`commands.alone`) or several (`commands.replicated`)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, Protocol

from kvindexer.commands.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Group

HOST: Final = "127.0.0.1"
USUAL_PORT: Final = 8090
POLL_TIMEOUT_S: Final = 2.0
SERVE: Final = ("serve", "--host", HOST, "--log-level", "warning")
"""A service of a demo, as far as all are the same."""


class Deployment(Protocol):
    """What a demo shows at work."""

    url: str

    def check(self) -> None:
        """Raise CommandError if it can't go on."""

    def ready(self) -> bool:
        """Whether queries can be sent."""

    def explanation(self) -> Sequence[str]:
        """What somebody who looks at it should know, in lines to print."""

    def overview(self) -> Group:
        """The table of the moment.  Raises CommandError."""


class Rates:
    """Turns counters into rates, from one look to the next."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, int]] | None = None

    def between(self, now_s: float, counters: Mapping[str, int]) -> dict[str, float]:
        """Return how much each counter grew a second since the last call; 0 at first, and where it began anew."""
        then_s, then = self._before or (now_s, counters)
        self._before = (now_s, counters)
        passed_s = now_s - then_s
        return {
            name: max(0.0, value - then.get(name, value)) / passed_s if passed_s else 0.0
            for name, value in counters.items()
        }


def free_port(wanted: int | None = None, usual: int = 0) -> int:
    """Find a port that is free, the usual one if that is; a wish that can't be met is an error."""
    for port in (usual, 0) if wanted is None else (wanted,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise CommandError(f"port {wanted} can't be used", "leave --port away to have a free one chosen")
