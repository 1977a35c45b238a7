"""Every way in which engines and stores spell their events on the wire.

A dialect turns the neutral events of one step into one message payload. It may drop fields and change spellings,
never meaning. What differs between vLLM's versions is a table, `STORED_FIELDS` and its neighbours: a field, the
version that brought it, and whether it is left out when unset. Encoded with msgpack, not with the library that
kvindexer decodes with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvindexer.testing.events import CPU, AllBlocksCleared, BlockRemoved, BlockStored
from kvindexer.testing.packing import pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvindexer.testing.events import Digest, Event, ExtraKey

Version = tuple[int, ...]
"""(major, minor) or (major, minor, patch) of vLLM; (0, 10) is 0.10.0."""

WireHash = int | bytes
INT_HASH_BYTES = 8


class HashForm(Enum):
    """How a digest is written."""

    UINT64 = "unsigned: the last 8 bytes, big-endian"
    INT64 = "signed: the same bits"
    BYTES = "all 32 bytes"

    def write(self, digest: Digest) -> WireHash:
        """Spell a digest."""
        if self is HashForm.BYTES:
            return digest
        return int.from_bytes(digest[-INT_HASH_BYTES:], "big", signed=self is HashForm.INT64)


class Traits(NamedTuple):
    """Habits of an engine that show on the wire without being spelling."""

    type: str = "vllm"
    """As what such an engine is registered."""
    set_like: bool = False
    """A hash is announced once, however many copies there are."""
    reuse_empty_first: bool = True
    """Blocks without reusable content are allocated before all others."""
    replay_has_topic: bool = True
    """Replay answers carry the topic in a frame of its own."""
    first_seq: int = 0


class Dialect(Protocol):
    """What a fake engine needs to know of the engine that it imitates."""

    @property
    def traits(self) -> Traits:
        """Habits beside spelling."""

    def wire_hash(self, digest: Digest, medium: str) -> WireHash:
        """Spell a digest as events of this medium do."""

    def encode(self, events: Sequence[Event], ts: float, rank: int | None) -> bytes:
        """Return the payload of one message."""


class Field(NamedTuple):
    """A field of a vLLM event: since when, and whether maps leave it out when it is None."""

    name: str
    since: Version
    optional: bool = False


STORED_FIELDS = (
    Field("block_hashes", (0, 9)),
    Field("parent_block_hash", (0, 9)),
    Field("token_ids", (0, 9)),
    Field("block_size", (0, 9)),
    Field("lora_id", (0, 9)),
    Field("medium", (0, 10, 2)),
    Field("lora_name", (0, 14)),
    Field("extra_keys", (0, 17), optional=True),
    Field("group_idx", (0, 20), optional=True),
    Field("kv_cache_spec_kind", (0, 22), optional=True),
    Field("kv_cache_spec_sliding_window", (0, 22), optional=True),
    Field("locality", (0, 26), optional=True),
    Field("ownership", (0, 29), optional=True),
    Field("session_id", (0, 30), optional=True),
    Field("lookahead_token_ids", (0, 33), optional=True),
)
REMOVED_FIELDS = (
    Field("block_hashes", (0, 9)),
    Field("medium", (0, 10, 2)),
    Field("group_idx", (0, 20), optional=True),
    Field("locality", (0, 26), optional=True),
    Field("ownership", (0, 29), optional=True),
)
FIELDS: dict[type[Event], tuple[Field, ...]] = {
    BlockStored: STORED_FIELDS,
    BlockRemoved: REMOVED_FIELDS,
    AllBlocksCleared: (),
}

RANK_IN_BATCH: Version = (0, 9, 2)
OFFLOADING: Version = (0, 11)
UNSIGNED_HASHES: Version = (0, 10, 2)
MULTIMODAL_OFFSETS: Version = (0, 19)
ZERO_SIZED_PLACEHOLDERS: Version = (0, 20)
MAPS: Version = (0, 24)
REPLAY_TOPIC: Version = (0, 26)


@dataclass(frozen=True)
class Vllm:
    """vLLM 0.9.0.1 to 0.33, and engines that imitate it.

    `hash_form` defaults to what the version does unless told otherwise; `self_describing` is the offload connector's
    setting of that name (from 0.24). llm-d's simulator is `Vllm(no_parent=0, first_seq=1)`.
    """

    version: Version = (0, 33)
    hash_form: HashForm | None = None
    self_describing: bool = False
    no_parent: WireHash | None = None
    first_seq: int = 0

    @property
    def traits(self) -> Traits:
        """What changed with the versions beside the fields."""
        return Traits(
            set_like=False,
            reuse_empty_first=self.version >= MAPS,
            replay_has_topic=self.version >= REPLAY_TOPIC,
            first_seq=self.first_seq,
        )

    def wire_hash(self, digest: Digest, medium: str) -> WireHash:
        """Spell a digest; before 0.24 the offload connector sends bytes beside the GPU's ints."""
        if medium == CPU and self.version < MAPS:
            return digest
        usual = HashForm.UINT64 if self.version >= UNSIGNED_HASHES else HashForm.INT64
        return (self.hash_form or usual).write(digest)

    def encode(self, events: Sequence[Event], ts: float, rank: int | None) -> bytes:
        """Encode a batch: an array of time stamp, events, and since 0.9.2 the rank."""
        wire = [self._spell(event) for event in events]
        batch = [ts, wire, rank] if self.version >= RANK_IN_BATCH else [ts, wire]
        return pack(batch)

    def _spell(self, event: Event) -> list[Any] | dict[str, Any]:
        offload = not isinstance(event, AllBlocksCleared) and event.medium == CPU
        if offload and self.version < OFFLOADING:
            raise ValueError(f"vLLM {self.version} has no offload connector: use cpu_blocks=0")
        if isinstance(event, BlockStored) and offload:
            event = self._as_connector(event)
        tag = type(event).__name__
        values = self._values(event)
        if self.version < MAPS:
            return [tag, *values.values()]
        optional = {field.name for field in FIELDS[type(event)] if field.optional}
        return {"type": tag} | {k: v for k, v in values.items() if v is not None or k not in optional}

    def _values(self, event: Event) -> dict[str, Any]:
        values = {
            field.name: getattr(event, field.name, None)
            for field in FIELDS[type(event)]
            if self.version >= field.since
        }
        if not isinstance(event, AllBlocksCleared):
            values["block_hashes"] = [self.wire_hash(each, event.medium) for each in event.block_hashes]
        if isinstance(event, BlockStored):
            parent = event.parent_block_hash
            values["parent_block_hash"] = self.wire_hash(parent, event.medium) if parent else self.no_parent
            if "extra_keys" in values:
                values["extra_keys"] = [self._extra_keys(keys) for keys in event.extra_keys] or None
        return values

    def _extra_keys(self, keys: tuple[ExtraKey, ...] | None) -> list[ExtraKey] | None:
        if keys is None:
            return None
        offsets = self.version >= MULTIMODAL_OFFSETS
        return [key[0] if isinstance(key, tuple) and not offsets else key for key in keys]

    def _as_connector(self, event: BlockStored) -> BlockStored:
        """Leave out what the offload connector does not know: extra keys always, all but hashes in placeholders."""
        event = replace(event, extra_keys=(), session_id=None)
        if self.self_describing and self.version >= MAPS:
            return event
        return replace(
            event,
            parent_block_hash=None,
            token_ids=(),
            block_size=0 if self.version >= ZERO_SIZED_PLACEHOLDERS else event.block_size,
            lora_id=None,
            lora_name=None,
            kv_cache_spec_kind=None,
            kv_cache_spec_sliding_window=None,
        )
