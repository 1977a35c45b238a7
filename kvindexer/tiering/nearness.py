"""Which copy of a block is the nearest, seen from an instance.

    own     on a tier of the instance itself
    reads   in a store that it reads
    other   with another instance
    apart   in a store that it doesn't read

In this order; then by tier, those that are live and sound first, and by name and rank.  Seen from nowhere: by tier,
instances before stores, then the same.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from kvindexer.types import Tier

Reach = Literal["own", "reads", "other", "apart"]

_ORDER: Final = {"own": 0, "reads": 1, "other": 2, "apart": 3}


class Copy(NamedTuple):
    """One place where a block lies."""

    owner: str
    """The instance, or the store."""
    store: bool
    readers: tuple[str, ...]
    """Of a store: the instances that can load from it."""
    rank: int
    tier: Tier
    certain: bool
    """Its source is live and sound."""
    groups: tuple[int, ...] = (0,)
    """The KV-cache groups of which it is a copy."""


def reach(copy: Copy, near: str) -> Reach:
    """How an instance gets at a copy."""
    if copy.store:
        return "reads" if near in copy.readers else "apart"
    return "own" if copy.owner == near else "other"


def order(copy: Copy, near: str | None) -> tuple[int, int, bool, bool, str, int]:
    """Sorts copies, the nearest first."""
    group = 0 if near is None else _ORDER[reach(copy, near)]
    return group, copy.tier, copy.store, not copy.certain, copy.owner, copy.rank
