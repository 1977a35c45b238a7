"""Where things lie in Redis: names of keys, buckets, and a shard's meta hash.  docs/redis.md is this for readers.

    {kvindexer}:sources                hash   source -> generation, kind, spec              (store.registry)
    {kvindexer}:replicas               zset   replica -> when it was last heard
    {kvindexer:6f0c...}:meta           hash   checkpoint, coverage, which buckets are the content
    {kvindexer:6f0c...}:1a2b3c4d:17    hash   engine hash (8 bytes, little-endian) -> record (index.records)

One source is one shard; its keys share a hash tag, so that a write is one atomic script in one slot of a cluster and
shards spread over it.  A generation of buckets is written once in full and then changed in place; when a shard has
to be written anew, or outgrows its buckets, a new generation is staged beside the old one and takes its place.

Seqs are stored as `next`, the seq that is expected: 0 before the first message, so that it is never negative.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Final, NamedTuple

from xxhash import xxh3_64_hexdigest

from kvindexer.errors import SettingsError
from kvindexer.settings.source import source_of
from kvindexer.types import SourceSpec

LAYOUT: Final = 1
"""Version of all this; a program that finds another one leaves it alone."""

BUCKET_ENTRIES: Final = 80
"""Entries a bucket, on average, above which a shard gets more buckets: Redis packs hashes tightly up to 128."""
_FRESH_BUCKET_ENTRIES: Final = 48
"""Entries a bucket of a generation that is written anew, at most; buckets are a power of two, so mostly fewer."""
_GROWTH: Final = 4
MAX_BUCKETS: Final = 2**20
MAX_RECORD_BYTES: Final = 2**16 - 1

_BUCKET_HEAD: Final = struct.Struct("<II")
_RECORD_HEAD: Final = struct.Struct("<QH")

# What of a source decides what its events mean: another value makes another shard.  Readers, for instance, do not.
_MEANING: Final = (
    "endpoint", "topic", "rank", "model", "block_size", "tenant", "type", "lora", "additional_salt", "tier",
    "report_mode", "offload_blocks_per_chunk", "clear_lower_tiers",
)  # fmt: skip


class Coverage(NamedTuple):
    """How much of the truth a share is.  Compare with `better_than`."""

    level: int
    """2: sound and complete; 1: sound, joined late; 0: something was lost."""
    first: int
    """The first message that is in it."""

    def better_than(self, other: Coverage) -> bool:
        """Whether it takes precedence over the other one."""
        return (self.level, -self.first) > (other.level, -other.first)


class Checkpoint(NamedTuple):
    """Up to where a source's stream is in a share, and which life of it."""

    epoch: int
    next: int
    """The seq behind the last one that is in it."""
    digest: bytes
    """Of the last message, XXH3-128 of its payload; empty if there is none."""
    birth: bytes
    """Of the life's first message; empty if nobody has seen that."""
    coverage: Coverage


class Meta(NamedTuple):
    """A shard's content, as its meta hash describes it."""

    checkpoint: Checkpoint
    generation: str
    buckets: int
    entries: int
    facts: bytes
    writer: str
    source: str
    spec: bytes
    registration: int


class Leftover(NamedTuple):
    """Buckets that are no content: staged by somebody who may be gone, or replaced."""

    generation: str
    buckets: int
    since_s: int
    """When somebody last wrote to them, in the server's seconds; 0 if they were replaced."""


class Found(NamedTuple):
    """What a read of a meta hash says."""

    meta: Meta | None
    removed: int | None
    """The registration that was ended, if one was."""
    leftovers: tuple[Leftover, ...] = ()


class UnreadableError(ValueError):
    """A key of ours holds what this program does not understand."""


class Names:
    """Names of all keys of a deployment."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.sources = f"{{{namespace}}}:sources"
        self.replicas = f"{{{namespace}}}:replicas"

    def meta(self, tag: str) -> str:
        """The meta hash of a shard."""
        return f"{{{self.namespace}:{tag}}}:meta"

    def hold(self, tag: str) -> str:
        """While it exists, nobody writes the shard: somebody reads all of it."""
        return f"{{{self.namespace}:{tag}}}:hold"

    def bucket(self, tag: str, generation: str, bucket: int) -> str:
        """One bucket of a shard."""
        return f"{{{self.namespace}:{tag}}}:{generation}:{bucket}"


def shard_tag(source: str, spec: SourceSpec) -> str:
    """The shard of a source: 16 hexadecimal digits of its identity and of all that its blocks' meaning depends on."""
    meaning = [source, *(getattr(spec, name) for name in _MEANING), *([spec.life] if spec.life else [])]
    return xxh3_64_hexdigest(json.dumps(meaning).encode())


def pack_spec(spec: SourceSpec) -> bytes:
    """A registration as JSON, without what is as it is by default."""
    defaults = SourceSpec(instance="", model="", block_size=0, endpoint="")
    return json.dumps({k: v for k, v in asdict(spec).items() if v != getattr(defaults, k)}, sort_keys=True).encode()


def unpack_spec(packed: bytes) -> SourceSpec:
    """Raise UnreadableError unless it is a registration that we can follow."""
    try:
        values = json.loads(packed)
        if not isinstance(values, dict):
            raise UnreadableError("a registration is a JSON object")
        return source_of(values, "source")
    except (ValueError, RecursionError, SettingsError) as error:
        raise UnreadableError(f"not a registration: {error}") from None


def buckets_for(entries: int) -> int:
    """Buckets of a generation that is written anew with so many entries: a power of two."""
    return min(MAX_BUCKETS, 1 << max(0, -(-entries // _FRESH_BUCKET_ENTRIES) - 1).bit_length())


def more_buckets(entries: int, buckets: int) -> int:
    """Buckets for a shard that is overfull: four times as many at least, for while it grows that copies all of it."""
    return max(buckets_for(entries), min(MAX_BUCKETS, _GROWTH * buckets))


def overfull(entries: int, buckets: int) -> bool:
    """Whether a shard should get more buckets."""
    return entries > BUCKET_ENTRIES * buckets and buckets < MAX_BUCKETS


class Packing:
    """Records on their way into one command, ordered by bucket, as the scripts read them (see lua/common.lua).

    A hash is packed once; an empty record takes one away.
    """

    def __init__(self, buckets: int) -> None:
        self._mask = buckets - 1
        self._by_bucket: dict[int, bytearray] = defaultdict(bytearray)

    def add(self, hashes: Sequence[int], records: Sequence[bytes]) -> None:
        """Some more."""
        by_bucket, mask, pack_head = self._by_bucket, self._mask, _RECORD_HEAD.pack
        for block_hash, record in zip(hashes, records, strict=True):
            by_bucket[block_hash & mask] += pack_head(block_hash, len(record)) + record

    def packed(self) -> bytes:
        """All of it."""
        return b"".join(
            part
            for bucket, packed in self._by_bucket.items()
            for part in (_BUCKET_HEAD.pack(bucket, len(packed)), packed)
        )


def pack_records(hashes: Sequence[int], records: Sequence[bytes], buckets: int) -> bytes:
    """Pack records that are at hand all at once."""
    packing = Packing(buckets)
    packing.add(hashes, records)
    return packing.packed()


def read_meta(values: Mapping[bytes, bytes]) -> Found:
    """What a meta hash says.  Raises UnreadableError if it is not one of ours, or of another layout."""
    if not values:
        return Found(None, None)
    layout = values.get(b"layout")
    if layout != b"%d" % LAYOUT:
        shown = "no layout" if layout is None else f"layout {layout.decode(errors='replace')[:20]}"
        raise UnreadableError(f"it has {shown}, this program reads layout {LAYOUT}")
    try:
        removed = values.get(b"removed")
        return Found(
            _read_content(values) if b"generation" in values else None,
            None if removed is None else _number(removed),
            tuple(_read_leftovers(values)),
        )
    except (KeyError, ValueError) as error:
        raise UnreadableError(f"its meta hash is damaged ({error})") from None


def _read_content(values: Mapping[bytes, bytes]) -> Meta:
    buckets = _number(values[b"buckets"])
    if buckets not in (1 << n for n in range(MAX_BUCKETS.bit_length())):
        raise ValueError(f"{buckets} buckets")
    return Meta(
        Checkpoint(
            _number(values[b"epoch"]),
            _number(values[b"next"]),
            values[b"digest"],
            values[b"birth"],
            Coverage(_number(values[b"level"]), _number(values[b"first"])),
        ),
        values[b"generation"].decode("ascii"),
        buckets,
        _number(values[b"entries"]),
        values[b"facts"],
        values[b"writer"].decode(errors="replace"),
        values[b"source"].decode(),
        values[b"spec"],
        _number(values[b"registration"]),
    )


def _read_leftovers(values: Mapping[bytes, bytes]) -> Iterable[Leftover]:
    for name, value in values.items():
        if name.startswith(b"stage:"):
            buckets, _, since = value.partition(b":")
            yield Leftover(name[6:].decode("ascii"), min(_number(buckets), MAX_BUCKETS), _number(since))


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:  # noqa: PLR2004 - digits of 2^64
        raise ValueError(f"{text[:20]!r} is no number")
    return int(text)
