"""One source's share of the index: what it holds, place by place.

    place      = (rank, group, tier, ownership, keyspace)
    copies     engine hash -> physical copies            counted on a vLLM GPU, 1 elsewhere
    covers     engine hash -> keys shown for it          only where an offload chunk covers several blocks

Invariant: a place shows the key of every hash in `copies` that its domain has bound, once, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from kvindexer.index.domain import Domain
from kvindexer.index.space import Space
from kvindexer.index.topology import Slot
from kvindexer.tiering.groups import GroupRule
from kvindexer.types import TIERS, SourceSpec, Tier

MOST_PLACES: Final = 4096
"""Places a source: each rank and group is a bit in every mask, so one that invents them would slow all others."""


class PlaceName(NamedTuple):
    """Where inside a source a block lies."""

    rank: int
    group: int
    tier: Tier
    ownership: str | None
    block_size: int


class Place:
    """The blocks of one place."""

    __slots__ = ("copies", "counted", "covers", "name", "slot", "space", "span")

    def __init__(self, name: PlaceName, slot: Slot, *, counted: bool, span: int) -> None:
        self.name = name
        self.slot = slot
        self.space = slot.space
        self.counted = counted
        self.span = span
        """How many blocks one hash stands for, itself and those before it."""
        self.copies: dict[int, int] = {}
        self.covers: dict[int, tuple[int, ...]] = {}

    def show(self, block_hash: int, key: int, domain: Domain) -> None:
        """A held hash has become, or was, bound to this key."""
        self.space.show(self.slot, self.name.tier, key)
        if self.span > 1:
            covered = tuple(_keys_before(block_hash, self.span - 1, domain))
            self.covers[block_hash] = covered
            for before in covered:
                self.space.show(self.slot, self.name.tier, before)

    def cover_more(self, domain: Domain) -> None:
        """Show what the chunks that are held here cover by what the domain knows now."""
        if self.span <= 1:
            return
        for block_hash in self.copies:
            covered = self.covers.get(block_hash, ())
            if block_hash in domain.bindings and len(covered) < self.span - 1:
                more = tuple(_keys_before(block_hash, self.span - 1, domain))[len(covered) :]
                self.covers[block_hash] = covered + more
                for before in more:
                    self.space.show(self.slot, self.name.tier, before)

    def hide(self, block_hash: int, key: int) -> None:
        """A bound hash is held here no more."""
        self.space.hide(self.slot, self.name.tier, key)
        if self.span > 1:
            for before in self.covers.pop(block_hash, ()):
                self.space.hide(self.slot, self.name.tier, before)


def _keys_before(block_hash: int, count: int, domain: Domain) -> Iterator[int]:
    parents = domain.parents or {}
    for _ in range(count):
        parent = parents.get(block_hash)
        key = None if parent is None else domain.bindings.get(parent)
        if parent is None or key is None:
            return
        yield key
        block_hash = parent


class Share:
    """Everything one source holds."""

    def __init__(self, source: str, spec: SourceSpec, space: Space) -> None:
        self.source = source
        self.spec = spec
        self.space = space
        """The keyspace it was registered for."""
        self.domain = Domain(space)
        self.domain.join([self])
        if spec.offload_blocks_per_chunk > 1:
            self.domain.parents = {}
        self.places: dict[PlaceName, Place] = {}
        self.slots: dict[tuple[int, int, int], Slot] = {}
        self.block_sizes = [space.keyspace.block_size]
        """The registered one first, then the others that places have had."""
        self.entries = 0
        self.truncated = False
        self._first = self.slot(spec.rank, 0, space)

    def slot(self, rank: int, group: int, space: Space) -> Slot:
        """The bit of one of its ranks' groups."""
        name = (rank, group, space.keyspace.block_size)
        found = self.slots.get(name)
        if found is None:
            found = self.slots[name] = space.open_slot(self.source, self.spec, rank, group)
        return found

    def has_room_for(self, name: PlaceName) -> bool:
        """Whether the place exists or may be made; if not, what was meant for it is missing from now on."""
        room = len(self.places) < MOST_PLACES or name in self.places
        self.truncated = self.truncated or not room
        return room

    def place(self, name: PlaceName, space: Space) -> Place:
        """The named place, made at its first use; `space` is the keyspace of its block size."""
        found = self.places.get(name)
        if found is None:
            spec, gpu = self.spec, name.tier is Tier.GPU
            counted = gpu and spec.type == "vllm" and spec.report_mode == "normal" and not spec.readers
            span = 1 if gpu else spec.offload_blocks_per_chunk
            slot = self.slot(name.rank, name.group, space)
            found = self.places[name] = Place(name, slot, counted=counted, span=span)
            if name.block_size not in self.block_sizes:
                self.block_sizes.append(name.block_size)
        return found

    def place_in(self, space: Space, place: Place) -> Place:
        """The same place in another keyspace."""
        return self.place(place.name._replace(block_size=space.keyspace.block_size), space)

    def place_of(self, block_hash: int, rank: int, group: int, tier: Tier, ownership: str | None) -> Place | None:
        """The place with a copy of the hash, whatever its block size; None if there is no copy."""
        for block_size in self.block_sizes:
            place = self.places.get(PlaceName(rank, group, tier, ownership, block_size))
            if place is not None and block_hash in place.copies:
                return place
        return None

    def witness(self, place: Place, rule: GroupRule | None) -> None:
        """An event has named this place."""
        place.slot.witness(place.name.tier, rule)

    def holds(self, block_hash: int) -> bool:
        """Whether any place has a copy."""
        return any(block_hash in place.copies for place in self.places.values())

    def bound(self, block_hash: int, key: int, space: Space) -> None:
        """The domain has learnt a key: every place that holds the hash, and has not shown it, shows it."""
        holding = [place for place in self.places.values() if block_hash in place.copies]
        for place in holding:
            if place.space is space:
                place.show(block_hash, key, self.domain)
        for place in holding:
            if place.space is not space:
                self._move(block_hash, key, place, space)

    def _move(self, block_hash: int, key: int, place: Place, space: Space) -> None:
        """The same place in the keyspace that the hash has turned out to belong to."""
        copies = place.copies.pop(block_hash)
        target = self.place_in(space, place)
        self.witness(target, place.slot.rule)
        if block_hash in target.copies:
            target.copies[block_hash] += copies if target.counted else 0
            return
        target.copies[block_hash] = copies
        target.show(block_hash, key, self.domain)

    def hashes(self) -> Iterator[int]:
        """Every held hash, once a place."""
        for place in self.places.values():
            yield from place.copies

    def hide_all(self) -> Iterator[int]:
        """Stop showing anything, hold everything; yields the held hashes."""
        for place in self.places.values():
            for block_hash in place.copies:
                key = self.domain.bindings.get(block_hash)
                if key is not None:
                    place.hide(block_hash, key)
                yield block_hash

    def drop(self, place: Place, block_hash: int) -> None:
        """Forget the last copy of a hash at this place."""
        del place.copies[block_hash]
        domain = self.domain
        key = domain.bindings.get(block_hash)
        if key is not None:
            place.hide(block_hash, key)
            domain.bury(block_hash)
        elif not domain.holds(block_hash):
            domain.unbound.pop(block_hash, None)

    def empty(self, tiers: Collection[Tier], rank: int | None = None) -> list[int]:
        """Forget everything on these tiers (of this rank, if given); returns the hashes that went."""
        gone: list[int] = []
        for place in self.places.values():
            if place.name.tier in tiers and rank in (None, place.name.rank):
                hashes = list(place.copies)
                if place.span > 1:
                    for block_hash in hashes:
                        self.drop(place, block_hash)
                else:
                    self._empty(place, hashes)
                place.copies.clear()  # a dict that was emptied key by key keeps its table
                place.space.tidy()
                gone += hashes
        return gone

    def _empty(self, place: Place, hashes: Sequence[int]) -> None:
        """`drop` all that the place holds: an engine's restart must not hold up queries for a second."""
        domain = self.domain
        place.copies.clear()
        keys = list(map(domain.bindings.get, hashes))
        place.space.hide_all(place.slot, place.name.tier, [key for key in keys if key is not None])
        if None in keys:
            orphans = [block_hash for block_hash, key in zip(hashes, keys, strict=True) if key is None]
            for block_hash in orphans:
                if not domain.holds(block_hash):
                    domain.unbound.pop(block_hash, None)
            hashes = [block_hash for block_hash, key in zip(hashes, keys, strict=True) if key is not None]
        if domain.members:  # else the domain goes as well
            domain.bury_all(hashes)

    def forget_places(self) -> None:
        """Forget the places where nothing is left, and what events have said of their groups."""
        self.places = {name: place for name, place in self.places.items() if place.copies}
        rules = {place.slot: place.slot.rule for place in self.places.values()}
        for name, slot in list(self.slots.items()):
            slot.forget()
            if slot not in rules and slot is not self._first:
                slot.space.close_slot(slot)
                del self.slots[name]
        for place in self.places.values():
            self.witness(place, rules[place.slot])

    def recount(self) -> int:
        """Bring `entries` up to date; returns by how much it changed."""
        before = self.entries
        self.entries = sum(len(place.copies) for place in self.places.values())
        return self.entries - before

    def blocks(self) -> tuple[int, int, int, int]:
        """Entries per tier, in the order of `TIERS`."""
        totals = [0] * len(TIERS)
        for name, place in self.places.items():
            totals[name.tier] += len(place.copies)
        return totals[0], totals[1], totals[2], totals[3]

    def drop_orphans(self, count: int) -> list[int]:
        """Forget up to so many hashes without a key, oldest first; returns the entries that went."""
        hashes = islice(filter(self.holds, self.domain.unbound), count)
        return self._drop_all([entry for block_hash in hashes for entry in self._places_with(block_hash)])

    def drop_oldest(self, count: int) -> list[int]:
        """Forget so many entries, orphans first, then those that were stored first, farthest from the GPU first."""
        chosen = list(islice(self._orphans(), count))
        return self._drop_all(chosen + list(islice(self._bound(), count - len(chosen))))

    def _drop_all(self, chosen: list[tuple[Place, int]]) -> list[int]:
        for place, block_hash in chosen:
            self.drop(place, block_hash)
        self.truncated = self.truncated or bool(chosen)
        return [block_hash for _, block_hash in chosen]

    def _orphans(self) -> Iterator[tuple[Place, int]]:
        for block_hash in self.domain.unbound:
            yield from self._places_with(block_hash)

    def _places_with(self, block_hash: int) -> Iterator[tuple[Place, int]]:
        return ((place, block_hash) for place in self.places.values() if block_hash in place.copies)

    def _bound(self) -> Iterator[tuple[Place, int]]:
        bindings = self.domain.bindings
        for place in sorted(self.places.values(), key=lambda place: -place.name.tier):
            yield from ((place, block_hash) for block_hash in place.copies if block_hash in bindings)

    def close(self) -> None:
        """Leave the index without a trace."""
        self.domain.leave(self)
        self.empty(TIERS)
        for slot in self.slots.values():
            slot.space.close_slot(slot)
