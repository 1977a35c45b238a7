"""States of a source, what moves it between them, and what its stream tells the shell to do.  Data only.

The picture of the table in docs/architecture.md is generated: `python -m kvindexer.events.states`.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Final, NamedTuple

from kvindexer.types import Seq


class State(Enum):
    """Whether the source is heard."""

    SYNCING = "syncing"
    LIVE = "live"
    STALE = "stale"
    GONE = "gone"


class Signal(Enum):
    """What moves a source from state to state."""

    SYNCED = "replay or first frame in"
    NEW_LIFE = "new life"
    SILENCE = "silent for stale_after_s"
    LONG_SILENCE = "silent for gone_after_s"
    HEARD = "heard again"


TRANSITIONS: Final[dict[tuple[State, Signal], State]] = {
    (State.SYNCING, Signal.SYNCED): State.LIVE,
    (State.SYNCING, Signal.NEW_LIFE): State.SYNCING,
    (State.SYNCING, Signal.SILENCE): State.STALE,
    (State.LIVE, Signal.NEW_LIFE): State.SYNCING,
    (State.LIVE, Signal.SYNCED): State.LIVE,
    (State.LIVE, Signal.SILENCE): State.STALE,
    (State.STALE, Signal.SYNCED): State.LIVE,
    (State.STALE, Signal.NEW_LIFE): State.SYNCING,
    (State.STALE, Signal.HEARD): State.LIVE,
    (State.STALE, Signal.LONG_SILENCE): State.GONE,
    (State.GONE, Signal.SYNCED): State.LIVE,
    (State.GONE, Signal.NEW_LIFE): State.SYNCING,
    (State.GONE, Signal.HEARD): State.SYNCING,
}
"""The whole table; a pair that is not in it changes nothing."""


class Apply(NamedTuple):
    """Count this payload into the index."""

    seq: Seq
    payload: bytes


class Ask(NamedTuple):
    """Request a replay of everything from this seq on, inclusive."""

    start: Seq


class Withdraw(NamedTuple):
    """The source's entries are not to be trusted any more; `everything`: also those that outlive an epoch."""

    reason: str
    everything: bool


class Drop(NamedTuple):
    """A frame has no effect; `reason` is a short fixed word for counters."""

    reason: str


Action = Apply | Ask | Withdraw | Drop


class Purpose(Enum):
    """Why a replay runs."""

    SYNC = "sync"  # nothing is known of this life yet
    CHECK = "check"  # from the last applied seq: proves the life, finds what was lost
    REBUILD = "rebuild"  # from 0, because holes are open: only if the buffer still reaches back to 0


def mermaid() -> str:
    """The table as a Mermaid state diagram."""
    arrows = (
        f"    {state.value} --> {following.value}: {signal.value}"
        for (state, signal), following in TRANSITIONS.items()
    )
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.SYNCING.value}", *arrows])


if __name__ == "__main__":
    sys.stdout.write(mermaid() + "\n")
