"""The Python engine of the index: the readable specification behind the seam.

    payload ── decode ──► events ── attribute ──► (rank, group, tier, ownership) = a place of the source's share
                              │                                    │
                              └── bind: parent's key + tokens + extras -> key      (index.domain)
                                                                   │
                                       count copies at the place, show its key     (index.share)
                                                                   │
                           key -> mask of all slots that hold it, per tier         (index.space)
                                                                   │
    query keys ─────────────────────────────────── walk runs of equal masks        (index.walk)

Invariant, proved by recordings of real engines: after every batch the copies per (rank, group, tier, ownership,
engine hash) are what the engine holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from kvindexer.events.wire import NO_MEDIUM, AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from kvindexer.index import snapshot
from kvindexer.index.seam import Change, HolderMatch, Holding, IndexLimits, SourceStats
from kvindexer.index.share import Place, PlaceName, Share
from kvindexer.index.space import Space
from kvindexer.index.topology import is_store, reads
from kvindexer.index.walk import match
from kvindexer.tiering.groups import EVERY_BLOCK, GroupRule, group_rule
from kvindexer.tiering.media import MediaTable, tier_named
from kvindexer.tokenization.blocks import chain_keys, local_hashes, pack_tokens
from kvindexer.tokenization.extras import event_extras, lora_extras
from kvindexer.types import TIERS, EngineHash, Keyspace, SourceSpec, Tier

_BELOW_GPU = tuple(tier for tier in TIERS if tier is not Tier.GPU)

_MOST_PLACES: Final = 4096
"""Places a source: each rank and group is a bit in every mask, so one that invents them would slow all others."""

_SLACK: Final = 256
"""At a bound a 256th more goes than must, so that the oldest need not be searched for at every batch."""


def keyspace_of(spec: SourceSpec) -> Keyspace:
    """The keyspace that a source is registered for."""
    return Keyspace(spec.tenant, spec.model, spec.additional_salt, spec.block_size)


class PyIndex:
    """The index in plain Python dictionaries; see `index.seam.Index` for what each call does.

    `media` are extra rows of the media table; `least_trusted` names sources in the order in which their entries
    may go when `limits.max_entries` is reached (default: the source that wants more room).
    """

    def __init__(
        self,
        limits: IndexLimits | None = None,
        media: Mapping[str, str] | None = None,
        least_trusted: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._limits = limits or IndexLimits()
        self._media = MediaTable(media)
        self._least_trusted = least_trusted
        self._shares: dict[str, Share] = {}
        self._spaces: dict[Keyspace, Space] = {}
        self._entries = 0

    # Sources

    def attach(self, source: str, spec: SourceSpec) -> None:
        """See `Index.attach`."""
        self.detach(source)
        share = Share(source, spec, self._space(keyspace_of(spec)))
        for other in self._shares.values():
            if other.space is share.space and _share_hashes(spec, other.spec):
                one, two = share.domain, other.domain
                larger, smaller = (one, two) if len(one.bindings) > len(two.bindings) else (two, one)
                larger.absorb(smaller)
        self._shares[source] = share

    def detach(self, source: str) -> None:
        """See `Index.detach`."""
        share = self._shares.pop(source, None)
        if share is None:
            return
        self._entries -= share.entries
        share.close()
        self._forget(share)
        family = [space for keyspace, space in self._spaces.items() if keyspace[:3] == share.space.keyspace[:3]]
        if not any(space.in_use for space in family):  # until then hashes of the family may be bound in any of them
            for space in family:
                del self._spaces[space.keyspace]

    def withdraw(self, source: str, tiers: Collection[Tier] = TIERS) -> int:
        """See `Index.withdraw`."""
        share = self._shares[source]
        gone = share.empty(tiers)
        share.forget_places()
        self._recount(share)
        self._forget(share)
        return len(gone)

    def _recount(self, share: Share) -> None:
        self._entries += share.recount()
        share.truncated = share.truncated and share.entries > 0

    def _space(self, keyspace: Keyspace) -> Space:
        found = self._spaces.get(keyspace)
        if found is None:
            found = self._spaces[keyspace] = Space(keyspace)
        return found

    # Events

    def apply(self, source: str, payload: bytes) -> Change:
        """See `Index.apply`."""
        share = self._shares.get(source)
        if share is None:
            return Change(skipped={"unknown_source": 1})
        batch = decode_batch(payload, share.spec.type)
        work = _Work(share, share.spec.rank if batch.rank is None else batch.rank, self._media, batch.skipped)
        for event in batch.events:
            match event:
                case BlockStored():
                    self._store(work, event)
                case BlockRemoved():
                    self._remove(work, event)
                case AllBlocksCleared():
                    self._clear(work, event)
        self._entries += share.recount()
        dropped, others = self._shed(share)
        bindings, links = self._forget(share)
        work.touched.extend(dropped)
        for reason, count in (
            ("over_bound", len(dropped)),
            ("made_room", others),
            ("binding_forgotten", bindings),
            ("link_forgotten", links),
        ):
            if count:
                work.skip(reason, count)
        return work.change()

    def _store(self, work: _Work, event: BlockStored) -> None:
        share, spec = work.share, work.share.spec
        tier = work.tier(event.medium, event.locality)
        chunked = tier is not Tier.GPU and spec.offload_blocks_per_chunk > 1
        block_size = spec.block_size if chunked or not event.block_size else event.block_size
        name = PlaceName(work.rank, event.group, tier, event.ownership, block_size)
        if len(share.places) >= _MOST_PLACES and name not in share.places:
            share.truncated = True
            work.skip("over_bound", len(event.hashes))
            return
        space = share.space
        if block_size != spec.block_size:
            space = self._space(space.keyspace._replace(block_size=block_size))
            work.skip("other_block_size", 0)
        rule = group_rule(event.kind, event.window, space.keyspace.block_size)
        place = share.place(name, space)
        share.witness(place, None if event.kind is None else rule)
        if event.keyed:
            _bind_keyed(share, event.hashes, space)
        elif not chunked and _says_enough(event, tier, rule):
            try:
                self._bind(share, event, space)
            except (ValueError, OverflowError, TypeError):
                work.skip("bad_event")
                return
        work.stored += len(event.hashes)
        work.events += 1
        work.touched.extend(event.hashes)
        _count_in(share, place, event.hashes)

    def _bind(self, share: Share, event: BlockStored, space: Space) -> None:
        """Bind the hashes of a store whose tokens are known; what hangs on an unknown parent waits for it."""
        domain = share.domain
        bindings = domain.bindings
        hashes, parent = event.hashes, event.parent
        locals_ = local_hashes(pack_tokens(event.tokens), event.block_size, _extras(event, share.spec))
        del locals_[len(hashes) :]
        if domain.parents is not None:  # before anything is bound: a chunk that waits for it shows what it covers
            before = [parent, *hashes[:-1]]
            domain.parents |= {h: p for h, p in zip(hashes, before, strict=True) if p is not None}
        parent_key = None if parent is None else bindings.get(parent)
        if parent is not None and parent_key is None:
            for block_hash, local in zip(hashes, locals_, strict=True):
                if block_hash not in bindings:
                    domain.bind_behind(parent, block_hash, local, space)
                parent = block_hash
        else:
            keys = chain_keys(parent_key, locals_)
            if domain.unbound or domain.waiting or space is not domain.space:
                for block_hash, key in zip(hashes, keys, strict=True):
                    domain.bind(block_hash, key, space)
            else:
                for block_hash, key in zip(hashes, keys, strict=True):
                    if bindings.setdefault(block_hash, key) != key:
                        domain.conflicts += 1

    def _remove(self, work: _Work, event: BlockRemoved) -> None:
        share = work.share
        tier = work.tier(event.medium, event.locality)
        work.events += 1
        work.touched.extend(event.hashes)
        for block_hash in event.hashes:
            place = share.place_of(block_hash, work.rank, event.group, tier, event.ownership)
            if place is None:
                work.skip("not_held")
                continue
            work.removed += 1
            copies = place.copies[block_hash]
            if copies > 1:
                place.copies[block_hash] = copies - 1
            else:
                share.drop(place, block_hash)

    def _clear(self, work: _Work, event: AllBlocksCleared) -> None:
        share, spec = work.share, work.share.spec
        if is_store(spec) or spec.type == "mooncake":
            tiers: tuple[Tier, ...] = TIERS if event.medium is None else (work.tier(event.medium, None),)
            rank = None
        else:
            tiers = TIERS if spec.clear_lower_tiers else (Tier.GPU,)
            rank = work.rank
            if not spec.clear_lower_tiers:
                blocks = share.blocks()
                work.uncertain += tuple(tier for tier in _BELOW_GPU if blocks[tier])
        gone = share.empty(tiers, rank)
        self._recount(share)
        work.events += 1
        work.cleared += tiers
        work.touched.extend(gone)

    # Bounds

    def _forget(self, share: Share) -> tuple[int, int]:
        """Bring a domain's memory back under its bounds; returns how many bindings and waiting links went."""
        domain = share.domain
        members = len(domain.members)
        if not members or not (domain.dead or domain.waiting_links):
            return 0, 0
        return domain.forget_dead(
            self._limits.max_dead_bindings_per_source * members, self._limits.max_orphans_per_source * members
        )

    def _shed(self, share: Share) -> tuple[list[int], int]:
        """Bring entries back under their bounds: orphans first, then the oldest of the least trusted source.

        Returns which entries of this share went, and how many of others.
        """
        domain, limits = share.domain, self._limits
        gone: list[int] = []
        most_orphans = limits.max_orphans_per_source * len(domain.members)
        while len(domain.unbound) > most_orphans:
            dropped = share.drop_orphans(len(domain.unbound) - most_orphans)
            if not dropped:
                break
            gone += dropped
        self._entries += share.recount()
        gone += self._drop_oldest(share, share.entries, limits.max_entries_per_source)
        others = 0
        if self._entries > limits.max_entries:
            for name in (*self._least_trusted(), share.source):
                victim = self._shares.get(name)
                if victim is None:
                    continue
                dropped = self._drop_oldest(victim, self._entries, limits.max_entries)
                if victim is share:
                    gone += dropped
                else:
                    others += len(dropped)
                    self._forget(victim)
        return gone, others

    def _drop_oldest(self, share: Share, entries: int, limit: int) -> list[int]:
        """Drop the share's oldest entries if there are more than the limit."""
        if entries <= limit:
            return []
        gone = share.drop_oldest(entries - limit + limit // _SLACK)
        self._entries += share.recount()
        return gone

    # Questions

    def match(
        self, keyspace: Keyspace, keys: array[int], prompt_tokens: int, candidates: Collection[str] | None = None
    ) -> list[HolderMatch]:
        """See `Index.match`."""
        space = self._spaces.get(keyspace)
        if space is None or not keys:
            return []
        holders, wanted = space.topology.holders, space.topology.bits
        if candidates is not None:
            holders = [holder for holder in holders if holder.instance in candidates]
            wanted = 0
            for holder in holders:
                wanted |= holder.bits
        return match(space, keys, prompt_tokens, holders, wanted)

    def locate(self, keyspace: Keyspace, keys: Sequence[int]) -> list[list[Holding]]:
        """See `Index.locate`."""
        space = self._spaces.get(keyspace)
        if space is None:
            return [[] for _ in keys]
        return [
            list(
                dict.fromkeys(  # the groups of a hybrid model are one holding
                    Holding(slot.source, slot.spec.instance, slot.rank, tier)
                    for tier in TIERS
                    for slot in space.holders(tier, key)
                )
            )
            for key in keys
        ]

    def keyspaces(self, tenant: str, model: str, additional_salt: str | None = None) -> list[Keyspace]:
        """See `Index.keyspaces`."""
        return [
            keyspace
            for keyspace in self._spaces
            if keyspace.tenant == tenant
            and keyspace.model == model
            and additional_salt in (None, keyspace.additional_salt)
        ]

    def instances(self, keyspace: Keyspace) -> Collection[str]:
        """See `Index.instances`."""
        space = self._spaces.get(keyspace)
        return space.topology.instances if space is not None else ()

    def stats(self, source: str) -> SourceStats:
        """See `Index.stats`."""
        share = self._shares[source]
        places = share.places.values()
        orphans = sum(block_hash in place.copies for block_hash in share.domain.unbound for place in places)
        return SourceStats(share.blocks(), len(share.domain.bindings), orphans, share.truncated)

    def truncated(self, source: str) -> bool:
        """See `Index.truncated`."""
        return self._shares[source].truncated

    def copies(self, source: str) -> dict[tuple[int, int, Tier, str | None, EngineHash], int]:
        """See `Index.copies`."""
        return {
            (name.rank, name.group, name.tier, name.ownership, EngineHash(block_hash)): copies
            for name, place in self._shares[source].places.items()
            for block_hash, copies in place.copies.items()
        }

    def export(self, source: str) -> bytes:
        """See `Index.export`."""
        return snapshot.pack(self._shares[source])

    def load(self, source: str, packed: bytes) -> None:
        """See `Index.load`."""
        contents = snapshot.unpack(packed)
        spec = self._shares[source].spec
        self.attach(source, spec)
        share = self._shares[source]
        snapshot.restore(share, contents, self._space)
        self._entries += share.recount()
        self._shed(share)
        self._forget(share)


class _Work:
    """What one batch has done so far."""

    def __init__(self, share: Share, rank: int, media: MediaTable, skipped: dict[str, int]) -> None:
        self.share = share
        self.rank = rank
        self.stored = self.removed = self.events = 0
        self.cleared: tuple[Tier, ...] = ()
        self.uncertain: tuple[Tier, ...] = ()
        self.touched = array("Q")
        self._skipped = skipped
        self._media = media

    def tier(self, medium: str | None, locality: str | None) -> Tier:
        """The tier that an event speaks of."""
        spec = self.share.spec
        if medium is None and spec.tier is not None:
            return tier_named(spec.tier)
        tier, known = self._media.tier(medium or ("EXTERNAL" if is_store(spec) else NO_MEDIUM), locality)
        if not known:
            self.skip("unknown_medium", 0)
        return tier

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that had no effect, or (0) not the effect that the event asked for."""
        self._skipped[reason] = self._skipped.get(reason, 0) + (count or 1)

    def change(self) -> Change:
        """The whole, as the caller sees it."""
        return Change(
            self.stored, self.removed, self.events, self.cleared, self.uncertain, self.touched, self._skipped
        )


def _share_hashes(one: SourceSpec, other: SourceSpec) -> bool:
    """Whether one of the two is a store that the other reads."""
    return (is_store(one) and reads(other.instance, one)) or (is_store(other) and reads(one.instance, other))


def _says_enough(event: BlockStored, tier: Tier, rule: GroupRule) -> bool:
    """Whether a store's tokens may bind its hashes.

    Tokens are never cut by position unless every hash has its block of them (a partial tail behind the last one is
    fine where every block is listed).  Below the GPU an event without `extra_keys` may stand for a salted block.
    """
    if not event.hashes or not event.block_size or (tier is not Tier.GPU and event.extra_keys is None):
        return False
    rest = len(event.tokens) - len(event.hashes) * event.block_size
    return rest == 0 or (0 < rest < event.block_size and rule.known and rule.tail_blocks == EVERY_BLOCK)


def _extras(event: BlockStored, spec: SourceSpec) -> dict[int, bytes] | None:
    """Encoded extras of each block that has some.  Raises ValueError if the event's list does not fit."""
    keys = event.extra_keys
    lora = event.lora_name
    if lora is None and event.lora_id is None:
        lora = spec.lora
    if keys is not None and len(keys) != len(event.hashes):
        raise ValueError("extra_keys and block_hashes differ in length")
    if lora is None and event.lora_id is None and (keys is None or not any(keys)):
        return None
    part = lora_extras(lora, event.lora_id)
    return {
        block: event_extras(
            None if keys is None else keys[block], event.lora_name, part, first=event.parent is None and block == 0
        )
        for block in range(len(event.hashes))
    }


def _bind_keyed(share: Share, hashes: list[int], space: Space) -> None:
    for block_hash in hashes:
        if block_hash not in share.domain.bindings:
            share.domain.bind(block_hash, block_hash, space)


def _count_in(share: Share, place: Place, hashes: list[int]) -> None:
    """One more copy of each hash at the place; a hash that is new there is shown, or is an orphan."""
    copies, counted = place.copies, place.counted
    domain = share.domain
    find = domain.bindings.get
    mixed = len(share.block_sizes) > 1 or bool(domain.elsewhere)
    for block_hash in hashes:
        held = copies.get(block_hash)
        if held is not None:
            if counted:
                copies[block_hash] = held + 1
            continue
        key = find(block_hash)
        target = place
        if mixed:
            target = _place_in_its_size(share, place, block_hash)
            if block_hash in target.copies:
                target.copies[block_hash] += 1 if target.counted else 0
                continue
        target.copies[block_hash] = 1
        if key is None:
            domain.unbound[block_hash] = None
        else:
            target.show(block_hash, key, domain)


def _place_in_its_size(share: Share, place: Place, block_hash: int) -> Place:
    """The place of the block size that the hash is bound or already held in, whatever size the event named."""
    domain = share.domain
    if block_hash not in domain.bindings:
        return share.place_of(block_hash, *place.name[:4]) or place
    space = domain.space_of(block_hash)
    if space is place.space:
        return place
    target = share.place_in(space, place)
    share.witness(target, place.slot.rule)
    return target


__all__ = ["PyIndex", "keyspace_of"]
