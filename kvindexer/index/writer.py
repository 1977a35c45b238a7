"""One batch of events into a source's share: who each event belongs to, what it binds, what it counts.

    BlockStored       place it, bind its hashes if its tokens may do that, one more copy of each
    BlockRemoved      one copy less of each
    AllBlocksCleared  nothing left on the tiers that it means

Invariant: an event that can't be used has no effect at all, and is counted by its reason.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from kvindexer.events.wire import NO_MEDIUM, AllBlocksCleared, BlockRemoved, BlockStored
from kvindexer.index.seam import Change
from kvindexer.index.share import Place, PlaceName, Share
from kvindexer.index.space import Space
from kvindexer.index.topology import is_store
from kvindexer.tiering.groups import EVERY_BLOCK, GroupRule, group_rule
from kvindexer.tiering.media import MediaTable, tier_named
from kvindexer.tokenization.blocks import chain_keys, local_hashes, pack_tokens
from kvindexer.tokenization.extras import event_extras, lora_extras
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier

_BELOW_GPU = tuple(tier for tier in TIERS if tier is not Tier.GPU)


class BatchWriter:
    """One batch on its way into a share, and what it has done so far."""

    def __init__(
        self,
        share: Share,
        rank: int,
        media: MediaTable,
        space_for: Callable[[Keyspace], Space],
        skipped: dict[str, int],
    ) -> None:
        self.share = share
        self.rank = rank
        self.stored = self.removed = self.events = 0
        self.cleared: tuple[Tier, ...] = ()
        self.uncertain: tuple[Tier, ...] = ()
        self.touched = array("Q")
        self._skipped = skipped
        self._media = media
        self._space_for = space_for

    def store(self, event: BlockStored) -> None:
        """Blocks became available."""
        share, spec = self.share, self.share.spec
        tier = self.tier(event.medium, event.locality)
        chunked = tier is not Tier.GPU and spec.offload_blocks_per_chunk > 1
        block_size = spec.block_size if chunked or not event.block_size else event.block_size
        name = PlaceName(self.rank, event.group, tier, event.ownership, block_size)
        if not share.has_room_for(name):
            self.skip("over_bound", len(event.hashes))
            return
        space = share.space
        if block_size != spec.block_size:
            space = self._space_for(space.keyspace._replace(block_size=block_size))
            self.skip("other_block_size", 0)
        rule = group_rule(event.kind, event.window, space.keyspace.block_size)
        place = share.place(name, space)
        share.witness(place, None if event.kind is None else rule)
        if event.keyed:
            _bind_keyed(share, event.hashes, space)
        elif not chunked and _says_enough(event, tier, rule):
            try:
                _bind(share, event, space)
            except (ValueError, OverflowError, TypeError):
                self.skip("bad_event")
                return
        self.stored += len(event.hashes)
        self.events += 1
        self.touched.extend(event.hashes)
        _count_in(share, place, event.hashes)

    def remove(self, event: BlockRemoved) -> None:
        """One copy of each block is gone."""
        share = self.share
        tier = self.tier(event.medium, event.locality)
        self.events += 1
        self.touched.extend(event.hashes)
        for block_hash in event.hashes:
            place = share.place_of(block_hash, self.rank, event.group, tier, event.ownership)
            if place is None:
                self.skip("not_held")
                continue
            self.removed += 1
            copies = place.copies[block_hash]
            if copies > 1:
                place.copies[block_hash] = copies - 1
            else:
                share.drop(place, block_hash)

    def clear(self, event: AllBlocksCleared) -> None:
        """The publisher's cache was reset."""
        share, spec = self.share, self.share.spec
        if is_store(spec) or spec.type == "mooncake":
            tiers: tuple[Tier, ...] = TIERS if event.medium is None else (self.tier(event.medium, None),)
            rank = None
        else:
            tiers = TIERS if spec.clear_lower_tiers else (Tier.GPU,)
            rank = self.rank
            if not spec.clear_lower_tiers:
                blocks = share.blocks()
                self.uncertain += tuple(tier for tier in _BELOW_GPU if blocks[tier])
        gone = share.empty(tiers, rank)
        if not any(place.copies for place in share.places.values()):
            share.truncated = False
        self.events += 1
        self.cleared += tiers
        self.touched.extend(gone)

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

    def change(self, touched_of: Mapping[str, array[int]]) -> Change:
        """The whole, as the caller sees it; `touched_of`: what has changed for other sources."""
        return Change(
            self.stored,
            self.removed,
            self.events,
            self.cleared,
            self.uncertain,
            self.touched,
            self._skipped,
            touched_of,
        )


def _bind(share: Share, event: BlockStored, space: Space) -> None:
    """Bind the hashes of a store whose tokens are known; what hangs on an unknown parent waits for it."""
    domain = share.domain
    bindings = domain.bindings
    hashes, parent = event.hashes, event.parent
    locals_ = local_hashes(pack_tokens(event.tokens), event.block_size, _extras(event, share.spec))
    del locals_[len(hashes) :]
    domain.follow(hashes, parent)  # before anything is bound: a chunk that waits for it shows what it covers
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
