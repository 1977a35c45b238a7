"""Who could hold a prefix: slots put together to holders, with the rules of their engines.

A holder is one rank of an instance.  Normally it has one slot; a hybrid model has one a group, an instance with
several publishers one a publisher, and the stores that it reads lend it theirs.  To walk masks with plain ANDs,
each holder has one *primary* slot a group, and `feeds` says which other slots count for which primaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from kvindexer.tiering.groups import EVERY_BLOCK, GroupRule
from kvindexer.types import TIERS, SourceSpec, Tier

if TYPE_CHECKING:
    from kvindexer.index.seam import HolderMatch
    from kvindexer.index.space import Space

EVERY_READER: Final = "*"
MAX_MATCHES: Final = 16_384
"""Most matches of one keyspace that are kept, but for those of one more prompt."""


def is_store(spec: SourceSpec) -> bool:
    """Whether a source is a store: it belongs to no instance and is never a routing target."""
    return spec.type == "store" or bool(spec.readers)


def reads(instance: str, store: SourceSpec) -> bool:
    """Whether an instance can load a store's blocks."""
    return instance in store.readers or EVERY_READER in store.readers


class Slot:
    """One group of one rank of a source: a bit in the masks of a keyspace."""

    __slots__ = ("aliases", "bit", "group", "number", "rank", "rule", "seen", "seen_lower", "source", "space", "spec")

    def __init__(self, space: Space, number: int, source: str, spec: SourceSpec, *, rank: int, group: int) -> None:
        self.space = space
        self.number = number
        self.bit = 1 << number
        self.source = source
        self.spec = spec
        self.rank = rank
        self.group = group
        self.rule: GroupRule | None = None
        """What the engine needs of this group; None: the events do not say."""
        self.seen = False
        """Whether an event has named the group."""
        self.seen_lower = False
        """Whether an event has put a block of it below the GPU."""
        self.aliases: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)
        """Per tier: block key -> how many more engine hashes than one name it."""

    def forget(self) -> None:
        """Unlearn what events have said: a next life of the engine may differ."""
        self.seen, self.seen_lower, self.rule = False, False, None
        self.space.changed()

    def witness(self, tier: Tier, rule: GroupRule | None) -> None:
        """An event has stored blocks of this slot."""
        lower = self.seen_lower or tier is not Tier.GPU
        rule = rule or self.rule
        if not self.seen or self.rule != rule or self.seen_lower != lower:
            self.seen, self.seen_lower, self.rule = True, lower, rule
            self.space.changed()


class Tail(NamedTuple):
    """A group of which a prefix needs only its last blocks."""

    number: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Holder:
    """One rank of an instance, and what its engine can reuse."""

    instance: str
    rank: int
    prefix: tuple[int, ...]
    """Numbers of the primary slots of which every block is needed."""
    tails: tuple[Tail, ...]
    unknown_group: bool
    connector: bool
    """It loads from below the GPU."""
    speculative_blocks: int
    bits: int
    """All its primary slots."""


class Topology:
    """All holders of a keyspace."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        engines: list[Slot] = []
        stores: list[Slot] = []
        for slot in slots:
            (stores if is_store(slot.spec) else engines).append(slot)
        self.feeds: list[tuple[int, int]] = []
        """(bit of a slot, bits of the primary slots that it counts for)"""
        self.holders: list[Holder] = []
        self.instances = {slot.spec.instance for slot in engines}
        lent: dict[int, int] = {}
        engines.sort(key=lambda slot: (slot.spec.instance, slot.rank, slot.group, slot.number))
        for (instance, rank), members in groupby(engines, key=lambda slot: (slot.spec.instance, slot.rank)):
            read = [store for store in stores if reads(instance, store.spec)]
            self._add(instance, rank, list(members), read, lent)
        self.feeds += lent.items()
        self.tail_only = any(not holder.prefix for holder in self.holders)
        self.bits = 0
        """All holders' primary slots."""
        for holder in self.holders:
            self.bits |= holder.bits
        self.holder_of = {holder.bits: holder for holder in self.holders}
        """By bits: the holder; by one bit if it is `plain`."""
        self.plain = all(len(holder.prefix) == 1 and not holder.tails for holder in self.holders)
        """Every holder is one slot, of which every block is needed."""
        self.kept: dict[tuple[int, int], dict[int, HolderMatch]] = {}
        """Matches that were made before, by depth and how much of it may be reused, then by the holder's bits."""
        self.room = MAX_MATCHES
        """For how many more of them there is room."""

    def matches(self, depth: int, reusable: int) -> dict[int, HolderMatch]:
        """Those of this depth, to add to; prompts share beginnings, so most come again."""
        matches = self.kept.get((depth, reusable))
        if matches is None:
            if self.room <= 0:
                self.kept.clear()
                self.room = MAX_MATCHES
            matches = self.kept[depth, reusable] = {}
        return matches

    def _add(self, instance: str, rank: int, slots: list[Slot], stores: list[Slot], lent: dict[int, int]) -> None:
        slots = [slot for slot in slots if slot.seen] or (slots if stores else [])
        if not slots:
            return
        primaries: dict[int, Slot] = {}
        for slot in slots:
            primary = primaries.setdefault(slot.group, slot)
            if primary is not slot:
                lent[slot.bit] = lent.get(slot.bit, 0) | primary.bit
        for store in stores:
            group = store.group if len(primaries) > 1 else next(iter(primaries))
            if group in primaries:
                lent[store.bit] = lent.get(store.bit, 0) | primaries[group].bit
        rules = {
            primary.number: next((slot.rule for slot in slots if slot.group == group and slot.rule), None)
            for group, primary in primaries.items()
        }
        connector = slots[0].spec.offload_connector
        if connector is None:
            connector = bool(stores) or any(slot.seen_lower for slot in slots)
        prefix = tuple(n for n, rule in rules.items() if rule is None or rule.tail_blocks == EVERY_BLOCK)
        self.holders.append(
            Holder(
                instance,
                rank,
                prefix,
                tuple(Tail(n, rule.tail_blocks) for n, rule in rules.items() if rule and rule.tail_blocks),
                any(not rule.known if rule else len(rules) > 1 for rule in rules.values()),
                connector,
                slots[0].spec.speculative_blocks,
                sum(primary.bit for primary in primaries.values()),
            )
        )
