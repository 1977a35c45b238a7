"""A source's share as bytes: everything that is needed to go on from where it was.

A snapshot is one msgpack value (`_Snapshot`), with a version first; a later layout gets a higher one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvindexer.index.share import PlaceName, Share
from kvindexer.index.space import Space
from kvindexer.tiering.groups import GroupRule
from kvindexer.types import Keyspace, Tier

VERSION: Final = 1

_Hash = Annotated[int, Meta(ge=0)]
_Number = Annotated[int, Meta(ge=0)]
_BlockSize = Annotated[int, Meta(ge=1)]
_Copies = Annotated[int, Meta(ge=1)]


class _Place(msgspec.Struct, array_like=True, frozen=True):
    rank: _Number
    group: _Number
    tier: Tier
    ownership: str | None
    block_size: _BlockSize
    rule: tuple[_Number, bool] | None
    copies: dict[_Hash, _Copies]


class _Binding(msgspec.Struct, array_like=True, frozen=True):
    """Bindings of one block size."""

    block_size: _BlockSize
    keys: dict[_Hash, _Hash]


class _Link(msgspec.Struct, array_like=True, frozen=True):
    """A hash that waits for its parent's key."""

    parent: _Hash
    block_hash: _Hash
    local: _Hash
    block_size: _BlockSize


class _Snapshot(msgspec.Struct, array_like=True, frozen=True):
    version: int
    places: list[_Place]
    bindings: list[_Binding]
    links: list[_Link]
    parents: dict[_Hash, _Hash] | None
    dead: list[_Hash]
    truncated: bool


_decode = msgspec.msgpack.Decoder(_Snapshot).decode


def pack(share: Share) -> bytes:
    """The share's places, with what its domain knows, except bindings of what only its other members hold."""
    domain = share.domain
    own = domain.space.keyspace.block_size
    of_others = {
        block_hash
        for member in domain.members
        if member is not share
        for block_hash in member.hashes()
        if not share.holds(block_hash)
    }
    sizes: dict[int, dict[int, int]] = {own: {}}
    for block_hash, key in domain.bindings.items():
        if block_hash not in of_others:
            sizes.setdefault(domain.space_of(block_hash).keyspace.block_size, {})[block_hash] = key
    return msgspec.msgpack.encode(
        _Snapshot(
            VERSION,
            [
                _Place(*name[:2], name.tier, name.ownership, name.block_size, place.slot.rule, place.copies)
                for name, place in share.places.items()
                if place.slot.seen
            ],
            [_Binding(size, keys) for size, keys in sizes.items()],
            [
                _Link(parent, block_hash, local, space.keyspace.block_size)
                for parent, children in domain.waiting.items()
                for block_hash, (local, space) in children.items()
            ],
            domain.parents and {h: parent for h, parent in domain.parents.items() if h not in of_others},
            [block_hash for block_hash in domain.dead if block_hash not in of_others],
            share.truncated,
        )
    )


def unpack(packed: bytes) -> _Snapshot:
    """Raise ValueError unless the bytes are a snapshot of this version."""
    try:
        found = _decode(packed)
    except (msgspec.MsgspecError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a snapshot: {error}") from None
    if found.version != VERSION:
        raise ValueError(f"snapshot of layout {found.version}, this program reads {VERSION}")
    return found


def restore(share: Share, contents: _Snapshot, space_for: Callable[[Keyspace], Space]) -> None:
    """Fill an empty share."""
    domain = share.domain

    def space(block_size: int) -> Space:
        return space_for(share.space.keyspace._replace(block_size=block_size))

    if contents.parents is not None:
        domain.parents = {**(domain.parents or {}), **contents.parents}
    for binding in contents.bindings:
        for block_hash, key in binding.keys.items():
            domain.bind(block_hash, key, space(binding.block_size))
    for link in contents.links:
        domain.bind_behind(link.parent, link.block_hash, link.local, space(link.block_size))
    for block_hash in contents.dead:
        domain.bury(block_hash)
    share.truncated = contents.truncated
    for saved in contents.places:
        name = PlaceName(saved.rank, saved.group, saved.tier, saved.ownership, saved.block_size)
        place = share.place(name, space(saved.block_size))
        share.witness(place, None if saved.rule is None else GroupRule(*saved.rule))
        place.copies.update(saved.copies)
        for block_hash in saved.copies:
            known = domain.bindings.get(block_hash)
            if known is None:
                domain.unbound[block_hash] = None
            else:
                place.show(block_hash, known, domain)
