"""The narrow interface through which everybody uses the index.

Calls are coarse, what goes in is bytes or plain integers, what comes out is small immutable data, so that a
native engine can take the Python engine's place without an edit in `events/`, `api/` or `store/`.  One contract
test-suite runs over every engine; the Python engine (`index.engine`) is the specification.

An engine is used from one thread and never blocks, waits or reads a clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from kvindexer.types import TIERS, EngineHash, Keyspace, SourceSpec, Tier


class Change(NamedTuple):
    """What one payload did to the index."""

    stored: int = 0
    """Blocks announced as stored and counted."""
    removed: int = 0
    """Blocks announced as removed and counted."""
    events: int = 0
    """Events applied."""
    cleared: tuple[Tier, ...] = ()
    """Tiers that an AllBlocksCleared emptied."""
    uncertain: tuple[Tier, ...] = ()
    """Tiers of which that event leaves open whether the engine emptied them (kept, no longer sound)."""
    touched: array[int] = array("Q")
    """Engine hashes whose records of this source may differ from before, unsigned 64 bits, with repetitions: those of
    the events, of entries, bindings and links that went at a bound, and of blocks whose key has turned up."""
    skipped: Mapping[str, int] = {}
    """Events or blocks that had no effect, by reason."""
    touched_of: Mapping[str, array[int]] = {}
    """The same of other sources: those that made room at a bound, and those that share hashes with this one."""


class HolderMatch(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """How long a prefix one rank of an instance holds; all depths in blocks."""

    instance: str
    rank: int
    held: int
    """Leading blocks on any of its tiers or in a store it reads."""
    usable: int
    """The part of `held` that the rules of all its KV-cache groups allow to be reused."""
    cached: int
    """What the engine will report as cached for this prompt (its own rule, see `SourceSpec`)."""
    alone: tuple[int, int, int, int]
    """Leading blocks on each tier by itself, in the order of `TIERS`."""
    cumulative: tuple[int, int, int, int]
    """Leading blocks on this tier or a nearer one, in the order of `TIERS`."""
    unknown_group: bool = False
    """A KV-cache group of unknown kind takes part: its rule is not known, so `usable` is an upper bound."""


class Holding(NamedTuple):
    """One place where a block lies."""

    source: str
    instance: str
    rank: int
    tier: Tier
    groups: tuple[int, ...] = (0,)
    """The KV-cache groups of which the block lies there, in order; most models have one, 0."""


class Binding(NamedTuple):
    """Which block an engine hash is."""

    key: int
    block_size: int


class SourceStats(NamedTuple):
    """What the index holds of one source."""

    blocks: tuple[int, int, int, int]
    """Distinct entries a tier, in the order of `TIERS`."""
    bindings: int
    """Engine hashes whose block key is known, of held and of removed blocks."""
    orphans: int
    """Held engine hashes whose block key is not known yet."""
    truncated: bool
    """Entries were dropped at a bound: the source's index is not complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexLimits:
    """Bounds of the index; past them the least valuable is dropped and counted."""

    max_entries: int = 20_000_000
    """Entries (source, rank, group, tier, block) in all."""
    max_entries_per_source: int = 4_000_000
    max_orphans_per_source: int = 65_536
    max_dead_bindings_per_source: int = 65_536


class Index(Protocol):
    """An index engine.  `source` is a source's identity; unknown ones raise KeyError, except in `apply`, `detach`."""

    def attach(self, source: str, spec: SourceSpec) -> None:
        """Make a source known, empty; again with the same identity: forget it first."""

    def detach(self, source: str) -> None:
        """Forget a source with everything it holds; payloads that come later add nothing."""

    def apply(self, source: str, payload: bytes) -> Change:
        """Decode one batch and count it in.  Raises WireError if the payload is no batch at all."""

    def withdraw(self, source: str, tiers: Collection[Tier] = TIERS) -> int:
        """Drop the source's entries on these tiers; returns how many entries went."""

    def match(
        self,
        keyspace: Keyspace,
        keys: Sequence[int],
        prompt_tokens: int,
        candidates: Collection[str] | None = None,
    ) -> list[HolderMatch]:
        """Longest held prefix of every rank that holds a first block, in no particular order.

        `keys` are the block keys of the prompt's full blocks, unsigned 64 bits; `prompt_tokens` is its length in
        tokens.  `candidates` restricts the answer to these instances.
        """

    def locate(self, keyspace: Keyspace, keys: Sequence[int]) -> list[list[Holding]]:
        """Who holds each of these blocks, stores included; blocks with the same holders may share one list."""

    def resolve(self, source: str, hashes: Collection[int]) -> list[Binding | None]:
        """What each of these engine hashes means in the source's hash domain, held or not; None: not known."""

    def remembers(self, source: str, key: int) -> bool:
        """Whether the source's hash domain knows the hash of this block from an earlier copy that may be gone.

        Bounded, as what is remembered is; not cheap.
        """

    def keyspaces(self, tenant: str, model: str, additional_salt: str | None = None) -> list[Keyspace]:
        """Keyspaces of a model for which a source is registered, or blocks of another size were seen.

        `additional_salt=None` asks for those of every deployment salt.
        """

    def instances(self, keyspace: Keyspace) -> Collection[str]:
        """Instances that a match in this keyspace could name."""

    def stats(self, source: str) -> SourceStats:
        """Sizes of one source's share; may look at each of its orphans."""

    def truncated(self, source: str) -> bool:
        """Whether entries of this source were dropped at a bound; cheap."""

    def copies(self, source: str) -> dict[tuple[int, int, Tier, str | None, EngineHash], int]:
        """Every entry of a source: (rank, group, tier, ownership, engine hash) -> copies."""

    def hashes(self, source: str) -> Sequence[int]:
        """Every engine hash that has a record of this source, once."""

    def records(self, source: str, hashes: Collection[int]) -> list[bytes]:
        """What the index knows of each of these engine hashes by this source, packed as in `index.records`.

        Empty bytes where there is nothing (any more).  Records are absolute and canonical: `Change` names those that
        a batch may have changed; `attach`, `detach` and `withdraw` change records without naming them, of sources
        that share hashes with this one too.
        """

    def facts(self, source: str) -> bytes:
        """What events have said of the source beyond its blocks; equal states give equal bytes."""

    def load(self, source: str, hashes: Sequence[int], records: Sequence[bytes]) -> None:
        """Count records of another index into the source's share, in parts and in any order; `loaded` ends it.

        The share is meant to be new or withdrawn.  Raises ValueError if a record is damaged: then nothing of this
        part was counted.
        """

    def loaded(self, source: str, facts: bytes) -> None:
        """All records are in: take the facts over and go back under the bounds; the next batch names what went.

        Raises ValueError if the facts can't be read.
        """
