"""Which instances a caller wants to have listed, and in which order.  Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvindexer.api.fleet import InstanceStatus
from kvindexer.errors import RequestError
from kvindexer.tiering.weights import DEFAULT_WEIGHTS, Weights


class Requirements(NamedTuple):
    """What the caller insists on."""

    live: bool = False
    sound: bool = False
    complete: bool = False

    def met_by(self, status: InstanceStatus) -> bool:
        """Whether an instance may be listed."""
        return not (
            (self.live and status.state != "live")
            or (self.sound and not status.sound)
            or (self.complete and not status.complete)
        )


def requirements(names: Iterable[str] | None) -> Requirements | None:
    """The `require` of a request; None: nothing.  Raises RequestError."""
    if not names:
        return None
    wanted = set(names)
    if not wanted <= set(Requirements._fields):
        raise RequestError(
            "invalid_request",
            "require: a value is not known",
            f"any of: {', '.join(Requirements._fields)}",
            status=422,
        )
    return Requirements(**dict.fromkeys(wanted, True))


class Ranking(NamedTuple):
    """Which instances are listed, and in which order."""

    required: Requirements | None = None
    weights: Weights = DEFAULT_WEIGHTS
    by_score: bool = False
    most: int | None = None
    """Rows at most; None: all."""
    by_rank: bool = False
    """Each rank's figures too."""
    expected: bool = False
    """Before all by how far instances will get soon."""


class Listed(NamedTuple):
    """The candidates that are known."""

    sizes: Mapping[str, int]
    """Instance -> block size of what it could hold."""
    spelled: Mapping[str, str]
    """Instance -> as the caller spells it."""
