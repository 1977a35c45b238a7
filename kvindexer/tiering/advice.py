"""What to do with one copy of a block that its manager would like to free: drop it, offload it, or keep it.

    drop     free it: a copy that is certain remains
    offload  copy it to a tier below first, then free it
    keep     do neither: what is known does not allow it

The rules are a table, and the first row that fits decides.  Invariant: nothing is dropped unless a copy of somebody
else, or a copy that the same rank can load from a tier below, is live and sound.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, Literal, NamedTuple, Protocol

from kvindexer.types import Keyspace

Advice = Literal["drop", "offload", "keep"]

Reason = Literal[
    "unknown",
    "lower_copy",
    "other_holder",
    "hot",
    "lower_copy_unsure",
    "other_holders_unsure",
    "own_copies_only",
    "last_copy",
]

HOT: Final = 1.0
"""Questions a minute from which a block is hot, unless a request says otherwise."""


class Heat(Protocol):
    """How much blocks are asked for."""

    def heat(self, keyspace: Keyspace, key: int) -> float:
        """How often a block is asked for, a minute; 0: hardly ever, or never."""


class Copies(IntEnum):
    """How far copies can be relied on, the best of them."""

    NONE = 0
    OWN = 1
    """Only copies of the same instance that don't count: on nearer tiers, or of other ranks."""
    UNSURE = 2
    """There are some, none of a source that is live and sound."""
    SURE = 3


class Facts(NamedTuple):
    """What is known of a block when its manager asks."""

    known: bool
    """Its hash means a block."""
    below: Copies
    """On tiers below, or in stores, from which the same ranks can load it."""
    others: Copies
    """Of other instances, and in other stores."""
    hot: bool
    bottom: bool
    """There is no tier below."""


class Verdict(NamedTuple):
    """The advice, and the rule that it comes from."""

    advice: Advice
    reason: Reason


class Rule(NamedTuple):
    """A row of the table; None fits everything."""

    verdict: Verdict
    known: bool | None = None
    below: Copies | None = None
    others: Copies | None = None
    hot: bool | None = None
    bottom: bool | None = None

    def fits(self, facts: Facts) -> bool:
        """Whether the row is about these facts."""
        _, *wanted = self
        return all(want is None or want == fact for want, fact in zip(wanted, facts, strict=True))


RULES: Final = (
    Rule(Verdict("keep", "unknown"), known=False),
    Rule(Verdict("drop", "lower_copy"), below=Copies.SURE),
    Rule(Verdict("drop", "other_holder"), others=Copies.SURE, hot=False),
    Rule(Verdict("keep", "hot"), others=Copies.SURE, bottom=True),
    Rule(Verdict("offload", "hot"), others=Copies.SURE),
    Rule(Verdict("keep", "lower_copy_unsure"), below=Copies.UNSURE),
    Rule(Verdict("keep", "other_holders_unsure"), others=Copies.UNSURE, bottom=True),
    Rule(Verdict("offload", "other_holders_unsure"), others=Copies.UNSURE),
    Rule(Verdict("keep", "own_copies_only"), others=Copies.OWN, bottom=True),
    Rule(Verdict("offload", "own_copies_only"), others=Copies.OWN),
    Rule(Verdict("keep", "last_copy"), bottom=True),
    Rule(Verdict("offload", "last_copy")),
)


def advise(facts: Facts) -> Verdict:
    """The first row that fits; the last one fits everything."""
    return next(rule.verdict for rule in RULES if rule.fits(facts))
