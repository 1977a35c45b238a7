"""The Python engine of the index: the readable specification behind the seam.

    payload ── decode ──► events ── attribute ──► (rank, group, tier, ownership) = a place     (index.writer)
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

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from kvindexer.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from kvindexer.index import facts as source_facts
from kvindexer.index import records as packed_records
from kvindexer.index.loading import Loader
from kvindexer.index.seam import Binding, Change, HolderMatch, Holding, IndexLimits, SourceStats
from kvindexer.index.share import Share
from kvindexer.index.space import Space
from kvindexer.index.topology import is_store, reads
from kvindexer.index.touched import told
from kvindexer.index.walk import match
from kvindexer.index.writer import BatchWriter
from kvindexer.tiering.media import MediaTable
from kvindexer.types import TIERS, EngineHash, Keyspace, SourceSpec, Tier

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
        self._unsaid: list[tuple[Share, list[int]]] = []
        """Entries that went at a bound when records were loaded: the next batch names them."""

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
        if len(share.domain.members) > 1:
            share.domain.unheld += gone  # what nobody holds any more is the keeper's to tell of
        else:
            share.domain.unheld.clear()  # whoever copies the share has to copy it anew anyway
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
        rank = share.spec.rank if batch.rank is None else batch.rank
        work = BatchWriter(share, rank, self._media, self._space, batch.skipped)
        for event in batch.events:
            match event:
                case BlockStored():
                    work.store(event)
                case BlockRemoved():
                    work.remove(event)
                case AllBlocksCleared():
                    work.clear(event)
        self._entries += share.recount()
        dropped, victims = self._shed(share)
        bindings, links = self._forget(share)
        for reason, count in (
            ("over_bound", len(dropped)),
            ("made_room", sum(len(lost) for _, lost in victims)),
            ("binding_forgotten", bindings),
            ("link_forgotten", links),
        ):
            if count:
                work.skip(reason, count)
        losses = [(share, dropped), *victims]
        if self._unsaid:
            losses += [(loser, lost) for loser, lost in self._unsaid if self._shares.get(loser.source) is loser]
            self._unsaid.clear()
        return work.change(told(share, work.touched, losses))

    # Bounds

    def _forget(self, share: Share) -> tuple[int, int]:
        """Bring a domain's memory back under its bounds; returns how many bindings and waiting links went."""
        domain = share.domain
        members = len(domain.members)
        if not members or not (domain.dead or domain.waits_for):
            return 0, 0
        return domain.forget_dead(
            self._limits.max_dead_bindings_per_source * members, self._limits.max_orphans_per_source * members
        )

    def _shed(self, share: Share) -> tuple[list[int], list[tuple[Share, list[int]]]]:
        """Bring entries back under their bounds: orphans first, then the oldest of the least trusted source.

        Returns which entries of this share went, and which of others.
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
        others: list[tuple[Share, list[int]]] = []
        if self._entries > limits.max_entries:
            for name in (*self._least_trusted(), share.source):
                victim = self._shares.get(name)
                if victim is None:
                    continue
                dropped = self._drop_oldest(victim, self._entries, limits.max_entries)
                if victim is share:
                    gone += dropped
                elif dropped:
                    others.append((victim, dropped))
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
        self, keyspace: Keyspace, keys: Sequence[int], prompt_tokens: int, candidates: Collection[str] | None = None
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
        tiers = space.tiers
        known: dict[tuple[int, ...], list[Holding]] = {}  # blocks of one prompt mostly share one holder set
        located = []
        for key in keys:
            masks = tuple([holders.get(key, 0) for holders in tiers])
            found = known.get(masks)
            if found is None:
                found = known[masks] = _holdings(space, key)
            located.append(found)
        return located

    def resolve(self, source: str, hashes: Collection[int]) -> list[Binding | None]:
        """See `Index.resolve`."""
        domain = self._shares[source].domain
        find = domain.bindings.get
        return [
            None if key is None else Binding(key, domain.space_of(block_hash).keyspace.block_size)
            for block_hash, key in zip(hashes, map(find, hashes), strict=True)
        ]

    def remembers(self, source: str, key: int) -> bool:
        """See `Index.remembers`."""
        domain = self._shares[source].domain
        return key in map(domain.bindings.get, domain.dead)

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

    # Records

    def hashes(self, source: str) -> Sequence[int]:
        """See `Index.hashes`."""
        return packed_records.known(self._shares[source])

    def records(self, source: str, hashes: Collection[int]) -> list[bytes]:
        """See `Index.records`."""
        return packed_records.pack(self._shares[source], hashes)

    def facts(self, source: str) -> bytes:
        """See `Index.facts`."""
        return source_facts.pack(self._shares[source])

    def load(self, source: str, hashes: Sequence[int], records: Sequence[bytes]) -> None:
        """See `Index.load`."""
        share = self._shares[source]
        Loader(share, self._sizes_of(share)).load(hashes, records)
        self._entries += share.recount()

    def loaded(self, source: str, facts: bytes) -> None:
        """See `Index.loaded`."""
        share = self._shares[source]
        sizes = self._sizes_of(share)
        source_facts.learn(share, facts, sizes)
        Loader(share, sizes).finish()
        dropped, victims = self._shed(share)
        self._unsaid += [loss for loss in ((share, dropped), *victims) if loss[1]]
        self._forget(share)

    def _sizes_of(self, share: Share) -> Callable[[int], Space]:
        """The keyspaces of a source's blocks, by their size."""
        return lambda block_size: self._space(share.space.keyspace._replace(block_size=block_size))


def _holdings(space: Space, key: int) -> list[Holding]:
    """Who holds a block; the groups of a hybrid model are one holding."""
    found: dict[tuple[str, str, int, Tier], list[int]] = {}
    for tier in TIERS:
        for slot in space.holders(tier, key):
            found.setdefault((slot.source, slot.spec.instance, slot.rank, tier), []).append(slot.group)
    return [Holding(*place, tuple(sorted(groups))) for place, groups in found.items()]


def _share_hashes(one: SourceSpec, other: SourceSpec) -> bool:
    """Whether one of the two is a store that the other reads."""
    return (is_store(one) and reads(other.instance, one)) or (is_store(other) and reads(one.instance, other))


__all__ = ["PyIndex", "keyspace_of"]
