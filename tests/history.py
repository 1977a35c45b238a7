"""Histories of runs: what engines did, what the service did with it, and what it said, in the order it happened.

    engines ──► Published, Harmed, Healed ─┐
    fleet ────► Followed, Applied,         │
                Withdrawn, Said            ├──► history ──► validator of a promise (`promises`)
    bounds ───► Gauged, Full, Shed         │
    callers ──► Planted, Asked, Answered   │
    logs ─────► Logged                     │
    the end ──► Settled ───────────────────┘

Data only; `recorder` writes it.  Times are of one monotonic clock, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """An engine has given a message to its socket, in this life of it."""

    at: float
    source: str
    life: int
    seq: int
    digest: int
    clears: bool = False
    """It begins with the news that the cache is empty."""


class Harmed(NamedTuple):
    """Something befalls the engine, or the network before it."""

    at: float
    source: str
    what: str


class Healed(NamedTuple):
    """Engine and network are well again, from now on."""

    at: float
    source: str


class Followed(NamedTuple):
    """A source was registered."""

    at: float
    source: str
    instance: str
    awaited_until: float | None = None
    """When readiness stops waiting for it; None: it was not known at start."""


class Applied(NamedTuple):
    """The fleet has counted a message into the index."""

    at: float
    source: str
    seq: int
    digest: int


class Withdrawn(NamedTuple):
    """The fleet has forgotten what the source held."""

    at: float
    source: str
    reason: str


class Said(NamedTuple):
    """What the fleet says of a source from now on."""

    at: float
    source: str
    state: str
    sound: bool
    complete: bool


class Settled(NamedTuple):
    """The network is whole, traffic has stopped, time has passed: what the index claims, what the engine holds."""

    at: float
    source: str
    claimed: Mapping[Any, int]
    holds: Mapping[Any, int]


class Gauged(NamedTuple):
    """So much is in a room that has a limit, of one source or ("") of the process."""

    at: float
    source: str
    room: str
    value: int
    limit: int


class Full(NamedTuple):
    """Something found no place in that room."""

    at: float
    source: str
    room: str


class Shed(NamedTuple):
    """So much /metrics says was refused or dropped at the limit of that room, in all."""

    at: float
    room: str
    total: int


class Planted(NamedTuple):
    """From now on prompts and events contain something that is spelled like this."""

    at: float
    text: str


class Asked(NamedTuple):
    """A caller sends a request."""

    at: float
    request: int
    path: str
    valid: bool = True
    """There is nothing wrong with it: it deserves an answer."""


class Answered(NamedTuple):
    """Its answer is in, whole."""

    at: float
    request: int
    status: int
    text: str


class Logged(NamedTuple):
    """A line of any log."""

    at: float
    text: str


OfSource = Published | Harmed | Healed | Followed | Applied | Withdrawn | Said | Settled
Entry = OfSource | Gauged | Full | Shed | Planted | Asked | Answered | Logged
