"""What is known of instances and one prompt: from index and fleet to the situations that `api.reasons` explains.

    first missing block ─► who else holds it, other ranks, cache groups     Index.locate
                        ─► was it stored before?                            Index.remembers
    other block sizes, other LoRAs ─► would more match?                     Index.match
    sources ─► state, flags, orphans, what was ever heard                   Fleet.reports

Looked up is what the caller could ask for without another tenant, cache salt or deployment salt, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from msgspec.structs import replace

from kvindexer.api.fleet import Fleet, InstanceStatus, SourceReport
from kvindexer.api.lookup import Found, find
from kvindexer.api.prompt import Prompt, TokenPrompt
from kvindexer.api.reasons import Situation
from kvindexer.api.sizes import BlockSizes
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.index.topology import is_store, reads
from kvindexer.types import Keyspace, SourceSpec

MOST_OTHERS: Final = 8
"""Other holders of a block that are named."""

MOST_LORAS: Final = 4
"""Other LoRAs that are tried."""

_MAX_WHY: Final = 200


class Best(NamedTuple):
    """An instance, in the keyspace where its best rank holds most, or should."""

    instance: str
    space: Keyspace
    match: HolderMatch | None

    @property
    def held(self) -> int:
        """Leading blocks that are held."""
        return 0 if self.match is None else self.match.held

    @property
    def tokens(self) -> tuple[int, int, int]:
        """What makes it better than others: cached, matched and held tokens."""
        if self.match is None:
            return (0, 0, 0)
        size = self.space.block_size
        return (self.match.cached * size, self.match.usable * size, self.match.held * size)


def best(found: Iterable[Found]) -> dict[str, Best]:
    """Each instance's best rank, of those that hold something."""
    chosen: dict[str, Best] = {}
    for space, matches in found:
        for match in sorted(matches, key=lambda match: match.rank):
            one = Best(match.instance, space, match)
            if match.instance not in chosen or one.tokens > chosen[match.instance].tokens:
                chosen[match.instance] = one
    return chosen


class Family(NamedTuple):
    """Everything that is registered for the model, as far as the question may look."""

    reports: list[SourceReport]
    of_instance: Mapping[str, list[SourceReport]]
    stores: Mapping[str, SourceSpec]
    """By source."""

    def loras(self, given: str | None) -> list[str | None]:
        """LoRAs that the caller may have forgotten, or given too much: none, and those of registrations."""
        names = {report.spec.lora or None: None for report in self.reports}
        others = [name for name in (None, *names) if name != (given or None)]
        return list(dict.fromkeys(others))[:MOST_LORAS]


def family(fleet: Fleet, tenant: str, model: str, salt: str | None) -> Family:
    """The sources of a tenant's model; `salt`: of one deployment only."""
    reports = [
        report
        for report in fleet.reports()
        if (report.spec.tenant, report.spec.model) == (tenant, model) and salt in (None, report.spec.additional_salt)
    ]
    of_instance: dict[str, list[SourceReport]] = {}
    stores = {}
    for report in reports:
        if is_store(report.spec):
            stores[report.source] = report.spec
        else:
            of_instance.setdefault(report.spec.instance, []).append(report)
    return Family(reports, of_instance, stores)


class _Holders(NamedTuple):
    """Who holds one block."""

    ranks: dict[str, set[int]]
    """By instance."""
    stores: dict[str, SourceSpec]
    """By name."""


class Situations:
    """The situations of all instances in one answer."""

    def __init__(self, index: Index, known: Family, prompt: Prompt) -> None:
        self._index = index
        self._known = known
        self._prompt = prompt
        self._sizes = BlockSizes(index)
        self._holders: dict[tuple[Keyspace, int], _Holders] = {}
        self._other_sizes: dict[str, Best] = {}
        self._other_loras: dict[str, int] = {}

    def look_at_sizes(self, spaces: list[Keyspace], instances: Collection[str] | None) -> None:
        """Match in keyspaces that were not asked for; of keys there is only one size."""
        if spaces and isinstance(self._prompt, TokenPrompt):
            self._other_sizes = best(find(self._index, spaces, self._prompt, instances))

    def look_at_lora(self, lora: str | None, spaces: list[Keyspace], instances: Collection[str] | None) -> None:
        """Match for another LoRA, all else being the same; of keys there is only one LoRA."""
        if isinstance(self._prompt, TokenPrompt):
            for name, one in best(find(self._index, spaces, self._prompt.with_lora(lora), instances)).items():
                self._other_loras[name] = max(one.tokens[1], self._other_loras.get(name, 0))

    def of(self, one: Best, status: InstanceStatus, *, meets: bool) -> Situation:
        """Everything about one instance."""
        size, match = one.space.block_size, one.match
        prompt = self._prompt
        keys = prompt.keys(size)
        reports = self._known.of_instance.get(one.instance, [])
        registered = tuple(sorted({report.spec.block_size for report in reports}))
        seen = {size for report in reports for size in self._sizes.of(report.spec)}.difference(registered)
        troubled = [it.why for it in reports if it.why and (it.state != "live" or not (it.sound and it.complete))]
        matched = one.tokens[1]
        other = self._other_sizes.get(one.instance)
        situation = Situation(
            blocks=len(keys),
            block_size=size,
            held=one.held,
            usable=0 if match is None else match.usable,
            cached=0 if match is None else match.cached,
            rank=None if match is None else match.rank,
            meets=meets,
            heard=any(report.batches or any(report.blocks) for report in reports),
            shared=any(reads(one.instance, store) for store in self._known.stores.values()),
            other_size=(
                (other.space.block_size, other.tokens[1]) if other is not None and other.tokens[1] > matched else None
            ),
            other_lora=tokens if (tokens := self._other_loras.get(one.instance, 0)) > matched else 0,
            registered=registered,
            seen=tuple(sorted(seen)),
            orphans=sum(report.orphans for report in reports),
            chunk=max((report.spec.offload_blocks_per_chunk for report in reports), default=1),
            unknown_group=match is not None and match.unknown_group,
            extras=("none" if prompt.plain else "some") if isinstance(prompt, TokenPrompt) else "in keys",
            state=status.state,
            sound=status.sound,
            complete=status.complete,
            why=troubled[0][:_MAX_WHY] if troubled else "",
            lag_ms=status.lag_ms,
        )
        if one.held >= len(keys):
            return situation
        return self._with_holders(situation, one, keys[one.held])

    def remembered(self, one: Best, situation: Situation) -> Situation:
        """The same situation, and whether the first missing block was stored before; this takes a while."""
        if situation.held >= situation.blocks:
            return situation
        key = self._prompt.keys(one.space.block_size)[situation.held]
        reports = self._known.of_instance.get(one.instance, ())
        if any(self._remembered(report.source, key) for report in reports):
            return replace(situation, remembered=True, heard=True)
        return situation

    def _with_holders(self, situation: Situation, one: Best, key: int) -> Situation:
        """The same situation, and who holds the first block that is missing."""
        holders = self._held_by(one.space, key)
        ranks = holders.ranks.get(one.instance, set())
        rank = None if one.match is None else one.match.rank
        others = [name for name in holders.ranks if name != one.instance]
        read = False
        for name, store in holders.stores.items():
            if reads(one.instance, store):
                read = True
            else:
                others.append(name)
        return replace(
            situation,
            others=tuple(others[:MOST_OTHERS]),
            ranks=() if rank is None else tuple(sorted(ranks - {rank})),
            partly=read or rank in ranks or (rank is None and bool(ranks)),
        )

    def _held_by(self, space: Keyspace, key: int) -> _Holders:
        found = self._holders.get((space, key))
        if found is None:
            found = self._holders[space, key] = _Holders({}, {})
            (holdings,) = self._index.locate(space, [key])
            for holding in sorted(holdings, key=lambda holding: (holding.instance, holding.rank)):
                store = self._known.stores.get(holding.source)
                if store is None:
                    found.ranks.setdefault(holding.instance, set()).add(holding.rank)
                else:
                    found.stores[holding.instance] = store
        return found

    def _remembered(self, source: str, key: int) -> bool:
        with suppress(KeyError):  # unregistered meanwhile, or an engine that has not listed its publishers
            return self._index.remembers(source, key)
        return False
