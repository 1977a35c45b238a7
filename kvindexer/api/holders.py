"""Blocks as callers name them, and who holds each: what the routes under /v1/blocks and /v1/offload have in common.

    engine hashes ─► the hash domain of the source they are from ─► Named (key, keyspaces)
    keys          ─► every keyspace of the model                 ─► Named
    Named ─► Index.locate ─► copies, owners and those who can read them apart, with how far they can be trusted

An engine hash means nothing outside its domain, so it is never looked up anywhere else.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from time import perf_counter
from typing import Annotated, Final, NamedTuple

from msgspec import Meta

from kvindexer.api.fleet import Fleet, InstanceStatus
from kvindexer.api.identities import Identities
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.index.seam import Holding, Index
from kvindexer.index.topology import is_store, reads
from kvindexer.settings import Settings
from kvindexer.tiering.nearness import Copy
from kvindexer.types import Keyspace, SourceSpec

EngineHashes = Annotated[
    list[
        Annotated[
            int | str,
            Meta(extra_json_schema={"anyOf": [{"type": "integer"}, {"type": "string", "minLength": 12}]}),
        ]
    ],
    Meta(
        description="Hashes as the engine spells them: 64-bit integers, or bytes as hexadecimal digits or base64, "
        "of which the last 8 count."
    ),
]

CHUNK: Final = 32
"""Blocks that are looked up before others may have a turn."""

_HEX: Final = re.compile(r"(?:0[xX])?((?:[0-9a-fA-F]{2})+)")
_HEX_LENGTHS: Final = frozenset({16, 32, 40, 64, 96, 128})
"""Digits of digests; no base64 of a digest is as long."""
_HASH_BYTES: Final = 8
_MAX_HASH_BYTES: Final = 64


class Named(NamedTuple):
    """One block that is asked about."""

    hash: int | None
    key: int | None
    """None: the hash is not known."""
    spaces: tuple[Keyspace, ...]
    """Where it may be held."""


class Publisher(NamedTuple):
    """A source that hashes are from."""

    source: str
    spec: SourceSpec


class Holders:
    """Looks blocks up."""

    def __init__(self, settings: Settings, index: Index, fleet: Fleet) -> None:
        self._index = index
        self._fleet = fleet
        self._identities = Identities(fleet, settings.bind_endpoints)
        self._max_blocks = settings.max_blocks
        self._slice_s = settings.slice_ms / 1000
        self._generation = -1
        self._sources: Mapping[str, SourceSpec] = {}

    def sources(self) -> Mapping[str, SourceSpec]:
        """All sources, looked at anew when one has come or gone."""
        if self._generation != self._fleet.generation:
            self._generation = self._fleet.generation
            self._sources = self._fleet.sources()
        return self._sources

    def check(self, count: int) -> None:
        """Raise TooLargeError if so many blocks are too many for one request."""
        if count > self._max_blocks:
            raise TooLargeError("blocks", count, self._max_blocks, "max_blocks")

    # Who is meant

    def publishers(
        self, *, tenant: str, model: str | None, salt: str | None, source: str | None, instance: str | None
    ) -> list[Publisher]:
        """The sources that hashes are from: one, or all of an instance or store.  Raises RequestError."""
        family = [
            Publisher(name, spec)
            for name, spec in self.sources().items()
            if spec.tenant == tenant and model in (None, spec.model) and salt in (None, spec.additional_salt)
        ]
        if source is not None:
            found = [each for each in family if each.source == source]
            if not found:
                raise RequestError("unknown_source", "no such source is registered", "see /v1/sources", status=404)
            return found
        if instance is None:
            raise RequestError(
                "invalid_request", "hashes mean something only inside a source", "give source or instance", status=422
            )
        owners = {each.spec.instance for each in family}
        name = instance
        if name not in owners and family:
            models = {each.spec.model for each in family}
            meant = {self.meant(instance, tenant=tenant, model=each, salt=salt, among=owners) for each in models}
            name = next((each for each in meant if each is not None), name)
        found = [each for each in family if each.spec.instance == name]
        if not found:
            raise unknown_instance()
        return found

    def meant(self, name: str, *, tenant: str, model: str, salt: str | None, among: set[str]) -> str | None:
        """The one instance that a name means, as candidates of /v1/match are read."""
        spelled = self._identities.resolve([name], (tenant, model, salt), among).spelled
        return next(iter(spelled), None)

    # What is meant

    def by_hash(self, publishers: Sequence[Publisher], hashes: Sequence[int]) -> list[Named]:
        """Blocks by engine hashes.  A hash that two of the sources use for different blocks is not known."""
        spaces: dict[tuple[SourceSpec, int], tuple[Keyspace]] = {}
        found: list[Named | None] = [None] * len(hashes)
        for source, spec in publishers:
            for n, binding in enumerate(self._index.resolve(source, hashes)):
                if binding is None:
                    continue
                key, size = binding
                space = spaces.get((spec, size))
                if space is None:
                    space = spaces[spec, size] = (Keyspace(spec.tenant, spec.model, spec.additional_salt, size),)
                named = Named(hashes[n], key, space)
                before = found[n]
                found[n] = named if before is None or before == named else Named(hashes[n], None, ())
        return [
            Named(block_hash, None, ()) if named is None else named
            for block_hash, named in zip(hashes, found, strict=True)
        ]

    # Who holds it

    async def copies(self, blocks: Sequence[Named]) -> AsyncIterator[tuple[Named, tuple[Copy, ...]]]:
        """Every copy of each block, in no particular order; others have their turns in between.

        What is said of one block is of one moment.  Neighbours with the same holders are given the same tuple.
        """
        since = perf_counter()
        for start in range(0, len(blocks), CHUNK):
            if perf_counter() - since >= self._slice_s:
                await asyncio.sleep(0)
                since = perf_counter()
            chunk = blocks[start : start + CHUNK]
            places: list[list[tuple[Keyspace, list[Holding]]]] = [[] for _ in chunk]
            for space in dict.fromkeys(space for block in chunk for space in block.spaces):
                there = [n for n, block in enumerate(chunk) if space in block.spaces]
                keys = [key for n in there if (key := chunk[n].key) is not None]
                for n, holdings in zip(there, self._index.locate(space, keys), strict=True):
                    places[n].append((space, holdings))
            known: dict[tuple[int, ...], tuple[Copy, ...]] = {}
            statuses: dict[str, InstanceStatus] = {}
            for block, found in zip(chunk, places, strict=True):
                name = tuple([id(holdings) for _, holdings in found])
                copies = known.get(name)
                if copies is None:
                    copies = known[name] = tuple(
                        self._copy(space, holding, statuses) for space, holdings in found for holding in holdings
                    )
                yield block, copies

    def _copy(self, space: Keyspace, holding: Holding, statuses: dict[str, InstanceStatus]) -> Copy:
        owner = holding.instance
        if owner not in statuses:
            statuses[owner] = self._fleet.status(owner)
        status = statuses[owner]
        spec = self.sources().get(holding.source)
        store = spec is not None and is_store(spec)
        readers = (
            tuple(sorted(name for name in self._index.instances(space) if reads(name, spec)))
            if spec is not None and store
            else ()
        )
        certain = status.state == "live" and status.sound
        return Copy(owner, store, readers, holding.rank, holding.tier, certain, holding.groups)


def unknown_instance() -> RequestError:
    """No instance or store of that name, as far as the caller may know."""
    return RequestError(
        "unknown_instance",
        "no source of this instance is registered",
        "see /v1/sources for those that are",
        status=404,
    )


def engine_hash(given: int | str) -> int:
    """An engine's hash as an unsigned 64-bit integer.  Raises RequestError.

    Of bytes the last 8 count, big-endian, as for hashes in events.
    """
    if isinstance(given, int):
        if not -(2**63) <= given < 2**64:
            raise _no_hash()
        return given & (2**64 - 1)
    digits = _HEX.fullmatch(given)
    if digits and (len(digits[1]) in _HEX_LENGTHS or len(digits[1]) < len(given)):
        packed = bytes.fromhex(digits[1])
    else:
        try:
            packed = base64.b64decode(given.replace("-", "+").replace("_", "/"), validate=True)
        except (ValueError, binascii.Error):
            raise _no_hash() from None
    if not _HASH_BYTES <= len(packed) <= _MAX_HASH_BYTES:
        raise _no_hash()
    return int.from_bytes(packed[-_HASH_BYTES:], "big")


def _no_hash() -> RequestError:
    return RequestError(
        "invalid_request",
        "hashes: a value is no engine hash",
        "integers of 64 bits, or 8 to 64 bytes as hexadecimal digits or base64",
        status=422,
    )
