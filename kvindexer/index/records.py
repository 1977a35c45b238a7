"""Packed records: all that a source's index knows of one engine hash, in a few bytes.

Little-endian, and canonical: equal states give equal bytes.

    flags u8    1 a key follows               2 a link follows (it waits for its parent's key)
                4 its parent follows          8 the block size of its key or link follows
    [key u64]   [link: parent hash u64, local hash u64]   [parent hash u64]   [block size uvarint]
    places, until the end, sorted by rank, group, tier, ownership and block size:
      head u8   bits 0-1 tier, 4 rank, 8 group, 16 ownership, 32 copies, 64 block size follow
      [rank uvarint] [group uvarint] [ownership: length uvarint, UTF-8] [copies uvarint] [block size uvarint]

What does not follow is rank 0, group 0, no ownership, one copy, the registered block size.  So the usual record (a
bound block at one place, one copy) is 10 bytes: flags, key, head.  A uvarint has seven bits a byte, the lowest first,
and a set eighth bit if more follow.  The parent is there only where offload chunks cover several blocks.

Whose record knows what: the places are the source's own.  The key or link stands in the records of every source that
holds the hash; if no member of its domain does, in that of the domain's keeper (`index.domain`), without places.
Where a source has nothing to say of a hash, the record is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from struct import Struct
from typing import Final, NamedTuple

from kvindexer.index.domain import in_none
from kvindexer.index.share import PlaceName, Share
from kvindexer.types import Tier

KEYED: Final = 1
"""Flags of a record that has a key and nothing unusual: its places begin at byte `KEYED_BYTES`."""
KEYED_BYTES: Final = 9

_LINKED, _BEHIND, _SIZED = 2, 4, 8
_TIER, _RANK, _GROUP, _OWNED, _COPIES, _PLACE_SIZED = 3, 4, 8, 16, 32, 64
_WORD: Final = 8
_MOST: Final = 2**64 - 1
_MORE: Final = 128
_ANY_FLAG: Final = KEYED | _LINKED | _BEHIND | _SIZED

_pack_keyed = Struct("<BQ").pack


class Spot(NamedTuple):
    """Copies at one place, as a record tells them."""

    name: PlaceName
    copies: int


class Link(NamedTuple):
    """What a hash waits for."""

    parent: int
    local: int


class Record(NamedTuple):
    """A record, read; a hash has a key or a link or neither."""

    key: int | None
    link: Link | None
    parent: int | None
    block_size: int
    spots: tuple[Spot, ...]


class _Packer(NamedTuple):
    """One place, ready to be written."""

    copies_of: Callable[[int], int | None]
    one: bytes
    """The whole, for one copy."""
    before: bytes
    """What stands before the number of copies, if there are more."""
    after: bytes


# Writing


def known(share: Share) -> list[int]:
    """Every engine hash of which the source has a record, once.

    It is one piece of work, and queries wait: the largest place is copied as it is (4 ms a million), only the hashes
    of others are looked up, in those that are larger.
    """
    domain = share.domain
    hashes: list[int] = []
    larger: list[Container[int]] = []
    for place in sorted(share.places.values(), key=lambda place: len(place.copies), reverse=True):
        hashes += in_none(larger, place.copies)
        larger.append(place.copies)
    if share is domain.keeper:
        hashes += domain.holds_none(domain.dead)
        hashes += domain.holds_none(domain.waits_for)
    return hashes


def pack(share: Share, hashes: Collection[int]) -> list[bytes]:
    """The record of each hash."""
    domain = share.domain
    find, elsewhere = domain.bindings.get, domain.elsewhere
    keeps, simple = share is domain.keeper, domain.parents is None
    places = _packers(share)
    if len(places) == 1 and simple and not elsewhere:
        copies_of, one, *_ = places[0]
        keys = list(map(find, hashes))
        if None not in keys and list(map(copies_of, hashes)).count(1) == len(keys):
            return [_pack_keyed(KEYED, key) + one for key in keys]
    records: list[bytes] = []
    for block_hash in hashes:
        spots = b""
        for copies_of, one, before, after in places:
            copies = copies_of(block_hash)
            if copies is not None:
                spots += one if copies == 1 else before + _uvarint(copies) + after
        if not spots and not (keeps and _known_to_nobody_else(share, block_hash)):
            records.append(b"")
            continue
        key = find(block_hash)
        if key is not None and simple and block_hash not in elsewhere:
            records.append(_pack_keyed(KEYED, key) + spots)
        else:
            records.append(_knowledge(share, block_hash, key) + spots)
    return records


def _known_to_nobody_else(share: Share, block_hash: int) -> bool:
    domain = share.domain
    if block_hash not in domain.bindings and block_hash not in domain.waits_for:
        return False
    return len(domain.members) == 1 or not domain.holds(block_hash)


def _knowledge(share: Share, block_hash: int, key: int | None) -> bytes:
    """All of a record that stands before its places."""
    domain = share.domain
    flags, body, space = 0, b"", domain.space
    if key is not None:
        flags, body, space = KEYED, key.to_bytes(_WORD, "little"), domain.space_of(block_hash)
    elif block_hash in domain.waits_for:
        parent = domain.waits_for[block_hash]
        local, space = domain.waiting[parent][block_hash]
        flags, body = _LINKED, parent.to_bytes(_WORD, "little") + local.to_bytes(_WORD, "little")
    before = None if domain.parents is None else domain.parents.get(block_hash)
    if before is not None:
        flags |= _BEHIND
        body += before.to_bytes(_WORD, "little")
    if space is not share.space:
        flags |= _SIZED
        body += _uvarint(space.keyspace.block_size)
    return bytes((flags,)) + body


def _packers(share: Share) -> list[_Packer]:
    """How each place is written, in the order of a record."""
    own = share.space.keyspace.block_size
    packers = []
    for name in sorted(share.places, key=_order):
        copies = share.places[name].copies
        if not copies:
            continue
        head, before, after = int(name.tier), b"", b""
        if name.rank:
            head, before = head | _RANK, _uvarint(name.rank)
        if name.group:
            head, before = head | _GROUP, before + _uvarint(name.group)
        if name.ownership is not None:
            owner = name.ownership.encode()
            head, before = head | _OWNED, before + _uvarint(len(owner)) + owner
        if name.block_size != own:
            head, after = head | _PLACE_SIZED, _uvarint(name.block_size)
        packers.append(_Packer(copies.get, bytes((head,)) + before + after, bytes((head | _COPIES,)) + before, after))
    return packers


def _order(name: PlaceName) -> tuple[int, int, Tier, str, int, bool]:
    return name.rank, name.group, name.tier, name.ownership or "", name.block_size, name.ownership is not None


def _uvarint(number: int) -> bytes:
    packed = bytearray()
    while number > _MORE - 1:
        packed.append(number & (_MORE - 1) | _MORE)
        number >>= 7
    packed.append(number)
    return bytes(packed)


# Reading


def read(record: bytes, own_size: int) -> Record:
    """Read a record of a source whose registered block size is `own_size`.  Raises ValueError if it is damaged."""
    if not record or record[0] > _ANY_FLAG or record[0] & (KEYED | _LINKED) == KEYED | _LINKED:
        raise ValueError("damaged record: no such flags")
    reader = _Reader(record, 1)
    flags = record[0]
    key = reader.word() if flags & KEYED else None
    link = Link(reader.word(), reader.word()) if flags & _LINKED else None
    parent = reader.word() if flags & _BEHIND else None
    block_size = reader.size() if flags & _SIZED else own_size
    spots = read_spots(record, own_size, reader.at)
    if key is None and link is None and (not spots or flags):
        raise ValueError("damaged record: it says nothing, or what it says is of nothing")
    return Record(key, link, parent, block_size, spots)


def read_spots(record: bytes, own_size: int, start: int = 0) -> tuple[Spot, ...]:
    """Read the places of a record, from byte `start` to its end.  Raises ValueError if it is damaged."""
    reader = _Reader(record, start)
    spots = []
    while reader.at < len(record):
        head = reader.byte()
        if head & _MORE:
            raise ValueError("damaged record: no such place")
        rank = reader.number() if head & _RANK else 0
        group = reader.number() if head & _GROUP else 0
        ownership = reader.text() if head & _OWNED else None
        copies = reader.size() if head & _COPIES else 1
        block_size = reader.size() if head & _PLACE_SIZED else own_size
        spots.append(Spot(PlaceName(rank, group, Tier(head & _TIER), ownership, block_size), copies))
    return tuple(spots)


class _Reader:
    """Bytes of a record, one field after the other; every method raises ValueError where they end too early."""

    def __init__(self, record: bytes, at: int) -> None:
        self.record = record
        self.at = at

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, count: int) -> bytes:
        found = self.record[self.at : self.at + count]
        if len(found) < count:
            raise ValueError("damaged record: it ends too early")
        self.at += count
        return found

    def word(self) -> int:
        return int.from_bytes(self.take(_WORD), "little")

    def number(self) -> int:
        found = shift = 0
        while True:
            byte = self.byte()
            found |= (byte & (_MORE - 1)) << shift
            shift += 7
            if found > _MOST:
                raise ValueError("damaged record: a number is too large")
            if byte < _MORE:
                return found

    def size(self) -> int:
        """A number that is never zero."""
        found = self.number()
        if not found:
            raise ValueError("damaged record: nothing of something")
        return found

    def text(self) -> str:
        return self.take(self.number()).decode()
