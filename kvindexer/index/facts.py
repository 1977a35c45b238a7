"""What events have said of a source beyond its blocks, as bytes: is anything missing, and what its groups need.

One msgpack value (`Facts`), canonical: equal states give equal bytes.  Its first number is the layout of facts and
records both; a later layout gets a higher one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvindexer.index.share import MOST_PLACES, Share
from kvindexer.index.space import Space
from kvindexer.tiering.groups import GroupRule
from kvindexer.types import Tier

LAYOUT: Final = 1

_Number = Annotated[int, Meta(ge=0)]
_BlockSize = Annotated[int, Meta(ge=1)]


class Group(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A group that an event has named."""

    rank: _Number
    group: _Number
    block_size: _BlockSize
    seen_lower: bool
    rule: tuple[_Number, bool] | None


class Facts(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What is known of a source beyond its blocks."""

    layout: int
    truncated: bool
    groups: list[Group]


_decode = msgspec.msgpack.Decoder(Facts).decode


def pack(share: Share) -> bytes:
    """What is known of a source now."""
    seen = [
        Group(rank, group, block_size, slot.seen_lower, slot.rule)
        for (rank, group, block_size), slot in sorted(share.slots.items())
        if slot.seen
    ]
    return msgspec.msgpack.encode(Facts(LAYOUT, share.truncated, seen))


def read(packed: bytes) -> Facts:
    """Raise ValueError unless these are facts that this program understands."""
    try:
        facts = _decode(packed)
    except (msgspec.MsgspecError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a source's facts: {error}") from None
    if facts.layout != LAYOUT:
        raise ValueError(f"facts of layout {facts.layout}, this program reads {LAYOUT}")
    if len(facts.groups) > MOST_PLACES:
        raise ValueError(f"{len(facts.groups)} groups, at most {MOST_PLACES} make sense")
    return facts


def learn(share: Share, packed: bytes, space_for: Callable[[int], Space]) -> None:
    """Take over what another index knew; `space_for` finds the keyspace of a block size.

    Raises ValueError, and changes nothing, if the bytes can't be read.
    """
    facts = read(packed)
    share.truncated = share.truncated or facts.truncated
    for told in facts.groups:
        slot = share.slot(told.rank, told.group, space_for(told.block_size))
        rule = None if told.rule is None else GroupRule(*told.rule)
        slot.witness(Tier.CPU if told.seen_lower else Tier.GPU, rule)
