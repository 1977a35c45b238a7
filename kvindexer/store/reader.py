"""Reading the index in Redis from outside, without a running service; `kvindexer inspect` shows it.

Nothing is written, and no more than a page of records is held at once.  Sources are found by the directory, never by
looking through the server's keys.

A shard that is being written changes while it is read.  A page is then simply a little newer than the page before;
only when the shard was written anew its old buckets may have gone in the middle, which `changed` tells.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Final, NamedTuple

from kvindexer.errors import StoreError
from kvindexer.index.records import KEYED, Record, read
from kvindexer.store.digest import Digest, digest_of
from kvindexer.store.directory import Kind, Line, read_lines
from kvindexer.store.layout import Found, Meta, UnreadableError, shard_tag, unpack_spec
from kvindexer.store.server import ShardServer
from kvindexer.types import SourceSpec, Tier

_TRIES: Final = 4
_KEY: Final = slice(1, 9)
"""Where the block key stands in a record that has one."""


class Listed(NamedTuple):
    """One source of the directory, and what Redis holds of it."""

    source: str
    kind: Kind | None
    registration: int
    """Generation of its line in the directory."""
    spec: SourceSpec | None
    tag: str
    meta: Meta | None
    """None: Redis holds nothing of it."""
    problem: str
    """Why it can't be shown as it should; empty if it can."""


class Entry(NamedTuple):
    """One record."""

    block_hash: int
    record: Record


class Held(NamedTuple):
    """A block that was asked for, as one source has it."""

    key: int
    """The one that was asked for; a chunk covers blocks of other keys than its own."""
    listed: Listed
    block_hash: int
    record: Record


class Whole(NamedTuple):
    """All of a shard."""

    digest: Digest
    meta: Meta
    moving: bool
    """It was written while it was read: the digest is of no single moment."""


class Reader:
    """Reads what the replicas of one deployment keep in Redis.  Every method raises StoreError."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server

    async def sources(self, chosen: Callable[[SourceSpec], bool] | None = None) -> list[Listed]:
        """All sources of the directory, or those whose registration fits; in the order of their names."""
        listed = []
        for source, line in read_lines(await self._server.lines()):
            one = _listed(source, line)
            if chosen is None or (one.spec is not None and chosen(one.spec)):
                listed.append(one)
        listed.sort(key=lambda one: one.source)
        with_shard = [one for one in listed if one.tag]
        found = dict(zip((one.tag for one in with_shard), await self._read(with_shard), strict=True))
        return [_with_content(one, found.get(one.tag)) for one in listed]

    async def _read(self, listed: list[Listed]) -> list[Found | UnreadableError]:
        return await self._server.read([one.tag for one in listed])

    async def whole(self, listed: Listed, meta: Meta) -> Whole:
        """Read all of a shard for its digest: of one moment, if it holds still for one of some tries."""
        for _ in range(_TRIES):
            digest = Digest()
            async for _, hashes, records in self._server.buckets(listed.tag, meta):
                digest += digest_of(zip(hashes, records, strict=True))
            after = await self._meta(listed)
            if after == meta:
                return Whole(digest, meta, moving=False)
            if after is None:
                raise StoreError("changed", f"{listed.source} was taken out while it was read", "try again")
            meta = after
        return Whole(digest, meta, moving=True)

    async def memory(self, listed: Listed, meta: Meta) -> int | None:
        """Bytes that Redis needs for a shard; None if it doesn't let us ask."""
        return await self._server.memory(listed.tag, meta)

    async def entries(self, listed: Listed, meta: Meta) -> AsyncIterator[list[Entry]]:
        """All records of a shard, page by page.  Raises StoreError at one that is damaged."""
        async for _, hashes, records in self._server.buckets(listed.tag, meta):
            yield [Entry(h, _decoded(listed, h, record)) for h, record in zip(hashes, records, strict=True)]

    async def changed(self, listed: Listed, meta: Meta) -> bool:
        """Whether a shard has other buckets than when `meta` was read: then pages since may lack records."""
        after = await self._meta(listed)
        return after is None or after.generation != meta.generation

    async def holders(self, listed: Listed, keys: Collection[int]) -> list[Held]:
        """Who holds these blocks, of one source; it is read from its beginning to its end."""
        meta = listed.meta
        for _ in range(_TRIES):
            if meta is None:
                return []
            found = await self._look(listed, meta, keys)
            after = await self._meta(listed)
            if after is None or after.generation == meta.generation:
                return found if after is not None else []
            meta = after
        raise StoreError("changed", f"{listed.source} is written anew faster than it can be read", "try again")

    async def _look(self, listed: Listed, meta: Meta, keys: Collection[int]) -> list[Held]:
        """Records that have one of these keys; and, where chunks cover several blocks, those that cover it."""
        wanted = {key.to_bytes(8, "little") for key in keys}
        known: dict[int, int] = {}
        found = []
        async for _, hashes, records in self._server.buckets(listed.tag, meta):
            for block_hash, packed in zip(hashes, records, strict=True):
                if packed[_KEY] in wanted and packed[0] & KEYED:
                    record = _decoded(listed, block_hash, packed)
                    key = known[block_hash] = int.from_bytes(packed[_KEY], "little")
                    found.append(Held(key, listed, block_hash, record))
        for _ in range(1, listed.spec.offload_blocks_per_chunk if listed.spec is not None else 1):
            behind = await self._behind(listed, meta, known) if known else []
            found += behind
            known = {held.block_hash: held.key for held in behind}
        return [held for held in found if held.record.spots]

    async def _behind(self, listed: Listed, meta: Meta, known: Mapping[int, int]) -> list[Held]:
        """Blocks whose parents these are; on lower tiers their chunks cover these as well."""
        found = []
        async for page in self.entries(listed, meta):
            for block_hash, record in page:
                key = None if record.parent is None or record.key is None else known.get(record.parent)
                if key is not None:
                    lower = tuple(spot for spot in record.spots if spot.name.tier is not Tier.GPU)
                    found.append(Held(key, listed, block_hash, record._replace(spots=lower)))
        return found

    async def _meta(self, listed: Listed) -> Meta | None:
        (found,) = await self._read([listed])
        if isinstance(found, UnreadableError):
            raise StoreError("foreign", f"the shard of {listed.source}: {found}", "is another program at work?")
        return found.meta


def _listed(source: str, line: Line | UnreadableError) -> Listed:
    if isinstance(line, UnreadableError):
        return Listed(source, None, 0, None, "", None, str(line))
    if not line.spec:
        return Listed(source, line.kind, line.generation, None, "", None, "")
    try:
        spec = unpack_spec(line.spec)
    except UnreadableError as error:
        return Listed(source, line.kind, line.generation, None, "", None, str(error))
    return Listed(source, line.kind, line.generation, spec, shard_tag(source, spec), None, "")


def _with_content(one: Listed, found: Found | UnreadableError | None) -> Listed:
    match found:
        case None:
            return one
        case Found(meta):
            return one._replace(meta=meta)
        case _:
            return one._replace(problem=str(found))


def _decoded(listed: Listed, block_hash: int, packed: bytes) -> Record:
    own_size = 0 if listed.spec is None else listed.spec.block_size
    try:
        return read(packed, own_size)
    except ValueError as error:
        message = f"{listed.source}: the record of {block_hash:#018x} can't be read: {error}"
        raise StoreError("foreign", message, "a running replica repairs it with its next check") from None
