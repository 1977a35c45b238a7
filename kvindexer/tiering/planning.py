"""From the copies of a block to what its manager should know before it frees one of them.

The copy in question lies on one tier of one instance (or store).  Other copies are counted by owner: two ranks of
one instance are one holder.  A copy that lacks one of its KV-cache groups can't replace it and is not certain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvindexer.tiering.advice import Copies
from kvindexer.tiering.nearness import Copy, reach
from kvindexer.types import TIERS, Tier


class Asker(NamedTuple):
    """Whose copy is in question."""

    owner: str
    store: bool
    tier: Tier
    rank: int | None
    """Of the instance; None: whichever ranks hold the block on that tier."""


class Around(NamedTuple):
    """What there is of a block beside the copy in question."""

    held: bool
    """The copy in question is known."""
    copies: tuple[int, int, int, int]
    """Other owners, by tier."""
    last: bool
    """There is no copy beside this one, certain or not."""
    below: Copies
    others: Copies


def look_around(asker: Asker, copies: Iterable[Copy]) -> Around:
    """Sort a block's copies by what they mean to one of them."""
    own: list[Copy] = []
    others: list[Copy] = []
    for copy in copies:
        (own if (copy.owner, copy.store) == (asker.owner, asker.store) else others).append(copy)
    asked = [copy for copy in own if copy.tier == asker.tier and asker.rank in (None, copy.rank)]
    here = {copy.rank for copy in asked}
    groups = {group for copy in asked for group in copy.groups}
    own, others = _whole(own, groups), _whole(others, groups)
    ranks = here or ({asker.rank} if asker.rank is not None else {copy.rank for copy in own})
    beside = [copy for copy in own if copy.tier != asker.tier or copy.rank not in ranks]
    read = [copy for copy in others if not asker.store and reach(copy, asker.owner) == "reads"]
    stores = [copy for copy in read if copy.tier >= asker.tier]
    lower = [copy for copy in own if copy.tier > asker.tier]
    below = min(
        (_trust([*stores, *(copy for copy in lower if copy.rank == rank)]) for rank in ranks), default=_trust(stores)
    )
    elsewhere = _trust(others)
    if elsewhere is Copies.NONE and beside:
        elsewhere = Copies.OWN
    gpu, cpu, disk, remote = (len({(c.owner, c.store) for c in others if c.tier == tier}) for tier in TIERS)
    return Around(bool(here), (gpu, cpu, disk, remote), not others and not beside, below, elsewhere)


def _whole(copies: list[Copy], groups: set[int]) -> list[Copy]:
    """The same copies; those that lack a group are not certain."""
    return [copy._replace(certain=copy.certain and groups.issubset(copy.groups)) for copy in copies]


def _trust(copies: list[Copy]) -> Copies:
    return max((Copies.SURE if copy.certain else Copies.UNSURE for copy in copies), default=Copies.NONE)
