"""A naive index, the judge of the real one: plain dictionaries and sets, all worked out anew after each change.

    held     per source: (rank, group, tier, ownership, hash) -> copies
    said     per hash domain: hash -> what a store said of it: (parent, tokens and extras, block size)
    path     what a hash means: the blocks of the prompt up to and with its own, found by going back from parent to
             parent; two hashes name one block if their paths are equal, token by token

Nothing is interned, hashed or kept up to date here, and no code is shared with `kvindexer.index`.  Events are the
maps of vLLM's wire before they are packed; hashes are unsigned integers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.tokenization.extras import prompt_extras
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier

Event = dict[str, Any]
Blocks = tuple[tuple[object, ...], ...]
"""Consecutive blocks of one prompt from its first one on, each as (tokens, LoRA, what else it depends on)."""

TIER_OF = {"GPU": Tier.GPU, "CPU": Tier.CPU, "STORAGE": Tier.DISK, "OBJ": Tier.REMOTE}
EVERY_BLOCK = 0


class Prompt(NamedTuple):
    """What a query asks for."""

    tokens: tuple[int, ...]
    lora: str | None = None
    salt: str | None = None

    def blocks(self, size: int) -> Blocks:
        """Its full blocks."""
        return tuple(
            (self.tokens[at : at + size], self.lora, (("salt", self.salt),) if self.salt and not at else ())
            for at in range(0, len(self.tokens) - size + 1, size)
        )

    def keys(self, size: int) -> list[int]:
        """What the real index is asked with."""
        extras = prompt_extras(len(self.tokens) // size, size, lora=self.lora, cache_salt=self.salt)
        return prompt_keys(pack_tokens(self.tokens), size, extras)

    def extra_keys(self, start: int, end: int) -> list[list[str] | None]:
        """What an event says of these blocks beside their tokens."""
        names = [self.lora] if self.lora else []
        return [[*names, *([self.salt] if self.salt and block == 0 else [])] or None for block in range(start, end)]


def payload(events: Iterable[Event], rank: int | None = None, *, ts: float = 1.5) -> bytes:
    """One message, as vLLM 0.32 packs it."""
    packed: bytes = msgpack.packb([ts, list(events), rank])
    return packed


def stored(
    prompt: Prompt, hashes: Sequence[int], *, size: int, start: int = 0, parent: int | None = None, **more: Any
) -> Event:
    """A store of the prompt's blocks from `start` on, that says everything; `more` overrides fields."""
    end = start + len(hashes)
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(prompt.tokens[start * size : end * size]),
        "block_size": size,
        "lora_id": None if prompt.lora is None else 1,
        "medium": "GPU",
        "lora_name": prompt.lora,
        "extra_keys": prompt.extra_keys(start, end),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        "kv_cache_spec_sliding_window": None,
    } | more


def placeholder(hashes: Sequence[int], **more: Any) -> Event:
    """A store that only names hashes, as CPU offload and stores send it."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 0,
        "lora_id": None,
        "medium": "CPU",
        "lora_name": None,
    } | more


def removed(hashes: Sequence[int], **more: Any) -> Event:
    """The removal of one copy of each hash."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0} | more


def cleared() -> Event:
    """The reset of a cache."""
    return {"type": "AllBlocksCleared"}


class Entry(NamedTuple):
    """One block at one place of a source."""

    rank: int
    group: int
    tier: Tier
    ownership: str | None
    block_hash: int


class Fact(NamedTuple):
    """What a store said of one hash."""

    parent: int | None
    block: tuple[object, ...]
    size: int


class Kind(NamedTuple):
    """What an engine needs of a group: all blocks, or that many at the end of the prefix."""

    tail: int
    known: bool


class Part(NamedTuple):
    """One group of one rank of a source, in one block size."""

    rank: int
    group: int
    size: int


class Answer(NamedTuple):
    """The oracle's `HolderMatch`, field by field."""

    instance: str
    rank: int
    held: int
    usable: int
    cached: int
    alone: tuple[int, ...]
    cumulative: tuple[int, ...]
    unknown_group: bool


@dataclass
class Source:
    """All that is known of one source."""

    spec: SourceSpec
    said: dict[int, Fact]
    held: dict[Entry, int] = field(default_factory=dict)
    named: dict[Entry, int] = field(default_factory=dict)
    """The block size that a held hash was announced with: tells its part while the hash means nothing yet."""
    seen: dict[Part, Kind | None] = field(default_factory=dict)
    """Parts that stores have named, and what their events said of the group."""
    lower: set[Part] = field(default_factory=set)
    """Parts with a store below the GPU."""
    shown: dict[tuple[Part, Tier], set[Blocks]] = field(default_factory=dict)
    """`blocks()` since the last change."""

    @property
    def is_store(self) -> bool:
        return self.spec.type == "store" or bool(self.spec.readers)

    def is_read_by(self, instance: str) -> bool:
        return self.is_store and ("*" in self.spec.readers or instance in self.spec.readers)

    def meaning(self, block_hash: int) -> tuple[int, Blocks] | None:
        """Block size and path of a hash; None as long as a piece is missing."""
        path: list[tuple[object, ...]] = []
        size = 0
        seen = set()
        current: int | None = block_hash
        while current is not None:
            fact = self.said.get(current)
            if fact is None or current in seen:
                return None
            seen.add(current)
            path.append(fact.block)
            size = size or fact.size
            current = fact.parent
        return size, tuple(reversed(path))

    def part(self, entry: Entry) -> Part:
        """Where an entry counts."""
        meaning = self.meaning(entry.block_hash)
        return Part(entry.rank, entry.group, meaning[0] if meaning else self.named[entry])

    def blocks(self) -> dict[tuple[Part, Tier], set[Blocks]]:
        """The blocks that each part has on each tier."""
        found: dict[tuple[Part, Tier], set[Blocks]] = {}
        for entry in self.held:
            if meaning := self.meaning(entry.block_hash):
                size, path = meaning
                span = 1 if entry.tier is Tier.GPU else self.spec.offload_blocks_per_chunk
                blocks = found.setdefault((Part(entry.rank, entry.group, size), entry.tier), set())
                blocks |= {path[: len(path) - back] for back in range(min(span, len(path)))}
        return found


class Oracle:
    """The index as its documentation tells it."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def attach(self, name: str, spec: SourceSpec) -> None:
        """A source comes; a store and its readers tell each other what their hashes mean."""
        self.detach(name)
        new = Source(spec, {})
        for other in self.sources.values():
            if _keyspace(other.spec) == _keyspace(spec) and (
                other.is_read_by(spec.instance) or new.is_read_by(other.spec.instance)
            ):
                merged = {**new.said, **other.said}
                former = (new.said, other.said)
                new.said = merged
                for each in self.sources.values():
                    if any(each.said is said for said in former):
                        each.said = merged
        self.sources[name] = new
        self._look_again()

    def detach(self, name: str) -> None:
        """It leaves with all that it holds; what it said stays with those it shares hashes with."""
        self.sources.pop(name, None)

    def apply(self, name: str, events: Iterable[Event], rank: int | None = None) -> None:
        """One batch."""
        source = self.sources.get(name)
        if source is None:
            return
        rank = source.spec.rank if rank is None else rank
        for event in events:
            if event["type"] == "BlockStored":
                self._store(source, event, rank)
            elif event["type"] == "BlockRemoved":
                for block_hash in event["block_hashes"]:
                    entry = _entry(event, rank, block_hash)
                    copies = source.held.pop(entry, 0)
                    if copies > 1:
                        source.held[entry] = copies - 1
            else:
                lower = source.is_store or source.spec.clear_lower_tiers
                for entry in list(source.held):
                    if (lower or entry.tier is Tier.GPU) and (source.is_store or entry.rank == rank):
                        del source.held[entry]
        self._look_again()

    def _store(self, source: Source, event: Event, rank: int) -> None:
        spec = source.spec
        tier = TIER_OF[event["medium"]]
        chunk = tier is not Tier.GPU and spec.offload_blocks_per_chunk > 1
        size = spec.block_size if chunk else event["block_size"] or spec.block_size
        part = Part(rank, event.get("group_idx") or 0, size)
        kind = _kind(event, size)
        source.seen[part] = kind or source.seen.get(part)
        if tier is not Tier.GPU:
            source.lower.add(part)
        hashes = event["block_hashes"]
        tells_all = event["block_size"] and len(event["token_ids"]) == len(hashes) * event["block_size"]
        if tells_all and not chunk and (tier is Tier.GPU or event.get("extra_keys") is not None):
            parent = event["parent_block_hash"]
            for number, block_hash in enumerate(hashes):
                source.said.setdefault(block_hash, Fact(parent, _block(event, number), size))
                parent = block_hash
        counted = tier is Tier.GPU and spec.type == "vllm" and spec.report_mode == "normal" and not spec.readers
        for block_hash in hashes:
            entry = _entry(event, rank, block_hash)
            if entry not in source.held:
                source.named[entry] = size
            source.held[entry] = source.held.get(entry, 0) + 1 if counted else 1

    def _look_again(self) -> None:
        """Work out again what is where; a hash whose meaning has become known counts in its own block size."""
        for source in self.sources.values():
            for entry in source.held:
                part = source.part(entry)
                source.seen.setdefault(part, source.seen.get(part._replace(size=source.named[entry])))
                if entry.tier is not Tier.GPU:
                    source.lower.add(part)
            source.shown = source.blocks()

    def withdraw(self, name: str, tiers: Collection[Tier] = TIERS) -> None:
        """Drop these tiers; what a part said of itself is forgotten with its last entry."""
        source = self.sources[name]
        source.held = {entry: n for entry, n in source.held.items() if entry.tier not in tiers}
        left = {source.part(entry) for entry in source.held}
        source.seen = {part: kind for part, kind in source.seen.items() if part in left}
        source.lower = {source.part(entry) for entry in source.held if entry.tier is not Tier.GPU}
        source.shown = source.blocks()

    def copies(self, name: str) -> dict[Entry, int]:
        return dict(self.sources[name].held)

    def orphans(self, name: str) -> int:
        source = self.sources[name]
        return sum(source.meaning(entry.block_hash) is None for entry in source.held)

    def locate(self, keyspace: Keyspace, path: Blocks) -> set[tuple[str, str, int, Tier, tuple[int, ...]]]:
        """(source, instance, rank, tier, groups) of everybody who holds the last block of the path."""
        groups: dict[tuple[str, str, int, Tier], set[int]] = {}
        for name, source in self.sources.items():
            if _same_family(keyspace, source.spec):
                for (part, tier), blocks in source.shown.items():
                    if part.size == keyspace.block_size and path in blocks:
                        groups.setdefault((name, source.spec.instance, part.rank, tier), set()).add(part.group)
        return {(*place, tuple(sorted(found))) for place, found in groups.items()}

    def match(self, keyspace: Keyspace, prompt: Prompt, candidates: Collection[str] | None = None) -> list[Answer]:
        """What every rank of these instances holds of the prompt, in order of instance and rank."""
        size = keyspace.block_size
        family = [source for source in self.sources.values() if _same_family(keyspace, source.spec)]
        stores = [source for source in family if source.is_store]
        ranks: dict[tuple[str, int], list[tuple[Source, Part]]] = {}
        for source in family:
            if source.is_store:
                continue
            parts = [part for part in source.seen if part.size == size]
            if size == source.spec.block_size:  # even unheard of, it may read from stores
                parts.append(Part(source.spec.rank, 0, size))
            for part in dict.fromkeys(parts):
                ranks.setdefault((source.spec.instance, part.rank), []).append((source, part))
        answers = []
        for (instance, rank), known in sorted(ranks.items()):
            if candidates is None or instance in candidates:
                read = [store for store in stores if store.is_read_by(instance) and _parts(store, size)]
                heard = [(source, part) for source, part in known if part in source.seen]
                chosen = heard or (known if read else [])
                answers.append(self._match(_Rank(instance, rank, chosen, read), keyspace, prompt))
        return [answer for answer in answers if answer is not None]

    def _match(self, rank: _Rank, keyspace: Keyspace, prompt: Prompt) -> Answer | None:
        size = keyspace.block_size
        view = _View(rank.kinds(), rank.contents(size), prompt.blocks(size))
        held = view.depth(TIERS) if rank.parts else 0
        if not held:
            return None
        spec = min(rank.parts, key=lambda each: each[1].group)[0].spec
        usable = view.usable(held, TIERS)
        cap = (len(prompt.tokens) - 1) // size
        cached = max(0, view.usable(min(view.depth([Tier.GPU]), cap), [Tier.GPU]) - spec.speculative_blocks)
        connector = spec.offload_connector
        if connector is None:
            connector = bool(rank.stores) or any(part in source.lower for source, part in rank.parts)
        while connector and cached < usable and view.has_block(cached, TIERS[1:]):
            cached += 1
        return Answer(
            rank.instance,
            rank.rank,
            held,
            usable,
            cached,
            tuple(view.depth([tier]) for tier in TIERS),
            tuple(view.depth(TIERS[: n + 1]) for n in range(len(TIERS))),
            any(not kind.known if kind else len(view.kinds) > 1 for kind in view.kinds.values()),
        )


class _Rank(NamedTuple):
    """One rank of an instance: the parts that events have named, and the stores it reads."""

    instance: str
    rank: int
    parts: list[tuple[Source, Part]]
    stores: list[Source]

    def kinds(self) -> dict[int, Kind | None]:
        """What each group needs, as far as any source has said it."""
        found: dict[int, Kind | None] = {}
        for source, part in self.parts:
            found[part.group] = found.get(part.group) or source.seen.get(part)
        return found

    def contents(self, size: int) -> dict[tuple[int, Tier], set[Blocks]]:
        """Blocks of each group on each tier; a store knows no groups unless the engine has several."""
        kinds = self.kinds()
        has: dict[tuple[int, Tier], set[Blocks]] = {(group, tier): set() for group in kinds for tier in TIERS}
        lent = [
            (store, part, part.group if len(kinds) > 1 else group)
            for store in self.stores
            for part in _parts(store, size)
            for group in list(kinds)[:1]
        ]
        for source, part, group in [*((s, p, p.group) for s, p in self.parts), *lent]:
            for (its_part, tier), blocks in source.shown.items():
                if its_part == part and group in kinds:
                    has[group, tier] |= blocks
        return has


class _View(NamedTuple):
    """One prompt, as one rank of an instance sees it."""

    kinds: dict[int, Kind | None]
    has: dict[tuple[int, Tier], set[Blocks]]
    blocks: Blocks

    def group_has(self, group: int, block: int, tiers: Sequence[Tier]) -> bool:
        return any(self.blocks[: block + 1] in self.has[group, tier] for tier in tiers)

    def tail(self, group: int) -> int:
        kind = self.kinds[group]
        return kind.tail if kind else EVERY_BLOCK

    @property
    def whole_groups(self) -> list[int]:
        return [group for group in self.kinds if self.tail(group) == EVERY_BLOCK]

    def has_block(self, block: int, tiers: Sequence[Tier]) -> bool:
        """Whether every group that must have all blocks has this one; without such a group, every group."""
        return all(self.group_has(group, block, tiers) for group in self.whole_groups or self.kinds)

    def depth(self, tiers: Sequence[Tier]) -> int:
        """Leading blocks on any of the tiers."""
        if not self.whole_groups:
            return self.usable(len(self.blocks), tiers)
        return next((b for b in range(len(self.blocks)) if not self.has_block(b, tiers)), len(self.blocks))

    def usable(self, most: int, tiers: Sequence[Tier]) -> int:
        """The longest prefix of at most so many blocks whose end every sliding group has."""
        for length in range(most, 0, -1):
            if all(
                self.group_has(group, block, tiers)
                for group in self.kinds
                for block in range(max(0, length - self.tail(group)), length)
                if self.tail(group) != EVERY_BLOCK
            ):
                return length
        return 0


def _parts(source: Source, size: int) -> list[Part]:
    """The parts of a store in one block size; one that was not heard of yet has one."""
    own = [Part(source.spec.rank, 0, size)] if size == source.spec.block_size else []
    return list(dict.fromkeys([*own, *(part for part in source.seen if part.size == size)]))


def _keyspace(spec: SourceSpec) -> Keyspace:
    return Keyspace(spec.tenant, spec.model, spec.additional_salt, spec.block_size)


def _same_family(keyspace: Keyspace, spec: SourceSpec) -> bool:
    return keyspace == _keyspace(spec)._replace(block_size=keyspace.block_size)


def _entry(event: Event, rank: int, block_hash: int) -> Entry:
    return Entry(rank, event.get("group_idx") or 0, TIER_OF[event["medium"]], event.get("ownership"), block_hash)


def _block(event: Event, number: int) -> tuple[object, ...]:
    size = event["block_size"]
    rest = list((event["extra_keys"] or [])[number] or ()) if event["extra_keys"] else []
    if event["lora_name"] in rest:
        rest.remove(event["lora_name"])
    first = event["parent_block_hash"] is None and number == 0
    extras = (*(("bare", text) for text in rest[:-1]), ("salt" if first else "bare", rest[-1])) if rest else ()
    return tuple(event["token_ids"][number * size : (number + 1) * size]), event["lora_name"], extras


def _kind(event: Event, size: int) -> Kind | None:
    kind, window = event.get("kv_cache_spec_kind"), event.get("kv_cache_spec_sliding_window")
    if kind is None:
        return None
    if kind == "full_attention":
        return Kind(EVERY_BLOCK, known=True)
    if kind == "mamba":
        return Kind(1, known=True)
    if kind == "sliding_window" and window:
        tail = 0
        while tail * size < window - 1:
            tail += 1
        return Kind(max(tail, 1), known=True)
    return Kind(EVERY_BLOCK, known=False)
