"""Packed records into a share: what another index knew, counted in as if the events had come here.

Nearly all records of a source have a key and end in one of a few byte strings that say where the block lies.  They
are put together by those ends and counted in many at a time; the rest, and whatever is known here already, goes one
by one.

Records may come in any order and in parts.  Until all are in, offload chunks may cover less than they will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct

from kvindexer.index.records import KEYED, KEYED_BYTES, Record, Spot, read, read_spots
from kvindexer.index.share import Place, Share
from kvindexer.index.space import Space


class Loader:
    """Records on their way into a share; `space_for` finds the keyspace of a block size."""

    def __init__(self, share: Share, space_for: Callable[[int], Space]) -> None:
        self.share = share
        self._space_for = space_for

    def load(self, hashes: Sequence[int], records: Sequence[bytes]) -> None:
        """Count in a part of the records.  Raises ValueError, and changes nothing, if one is damaged."""
        own = self.share.space.keyspace.block_size
        alike: dict[bytes, tuple[list[int], list[bytes]]] = {}
        others: list[tuple[int, Record]] = []
        for block_hash, record in zip(hashes, records, strict=True):
            if len(record) >= KEYED_BYTES and record[0] == KEYED:
                end = record[KEYED_BYTES:]
                group = alike.get(end)
                if group is None:
                    group = alike[end] = ([], [])
                group[0].append(block_hash)
                group[1].append(record)
            elif record:
                others.append((block_hash, read(record, own)))
        groups = [(read_spots(end, own), len(end), *group) for end, group in alike.items()]
        for spots, length, its_hashes, its_records in groups:
            keys = [key for (key,) in Struct(f"<xQ{length}x").iter_unpack(b"".join(its_records))]
            self._count_group(its_hashes, keys, spots)
        for block_hash, read_record in others:
            self._count_one(block_hash, read_record)

    def finish(self) -> None:
        """All records are in: offload chunks cover what they cover, also those of sources that share the hashes."""
        domain = self.share.domain
        if domain.parents is not None:
            for member in domain.members:
                for place in member.places.values():
                    place.cover_more(domain)

    def _place(self, spot: Spot) -> Place | None:
        """The place that a record speaks of; None if the source has too many."""
        share = self.share
        if not share.has_room_for(spot.name):
            return None
        place = share.place(spot.name, self._space_for(spot.name.block_size))
        share.witness(place, None)
        return place

    def _count_group(self, hashes: list[int], keys: list[int], spots: tuple[Spot, ...]) -> None:
        """Bound hashes that lie at the same places."""
        share, domain = self.share, self.share.domain
        places = [(self._place(spot), spot.copies) for spot in spots]
        found = [(place, copies) for place, copies in places if place is not None]
        if not self._are_new(hashes, [place for place, _ in found]):
            own = share.space.keyspace.block_size
            for block_hash, key in zip(hashes, keys, strict=True):
                self._count_one(block_hash, Record(key, None, None, own, spots))
            return
        bound = list(map(domain.bindings.setdefault, hashes, keys))
        if bound != keys:
            domain.conflicts += sum(map(int.__ne__, bound, keys))
        for place, copies in found:
            place.copies.update(dict.fromkeys(hashes, copies if place.counted else 1))
            place.space.show_all(place.slot, place.name.tier, bound)
        if not found:
            for block_hash in hashes:
                domain.bury(block_hash)

    def _are_new(self, hashes: list[int], places: list[Place]) -> bool:
        """Whether nobody waits for these hashes, and nothing is known of them but perhaps the key."""
        domain = self.share.domain
        return (
            len(set(hashes)) == len(hashes)
            and not any(
                known and not known.keys().isdisjoint(hashes)
                for known in (domain.unbound, domain.waiting, domain.waits_for, domain.elsewhere)
            )
            and all(place.space is domain.space and place.copies.keys().isdisjoint(hashes) for place in places)
        )

    def _count_one(self, block_hash: int, record: Record) -> None:
        share, domain = self.share, self.share.domain
        space = self._space_for(record.block_size)
        if record.parent is not None:
            domain.follow((block_hash,), record.parent)
        if record.key is not None:
            domain.bind(block_hash, record.key, space)
        elif record.link is not None and block_hash not in domain.bindings:
            domain.bind_behind(record.link.parent, block_hash, record.link.local, space)
        key = domain.bindings.get(block_hash)
        for spot in record.spots:
            place = self._place(spot)
            if place is not None and key is not None and place.space is not domain.space_of(block_hash):
                place = share.place_in(domain.space_of(block_hash), place)
                share.witness(place, None)
            if place is None or block_hash in place.copies:
                continue
            place.copies[block_hash] = spot.copies if place.counted else 1
            if key is None:
                domain.unbound[block_hash] = None
            else:
                place.show(block_hash, key, domain)
        if key is not None and not share.holds(block_hash):
            domain.bury(block_hash)
