"""Bytes of a publisher -> events: every dialect of vLLM 0.9 to 0.33, SGLang, RFC #1527, llm-d's file backend.

A batch is a msgpack array `[ts, [event, ...], data_parallel_rank?]`.  An event is a tagged array
`["BlockStored", ...]` (vLLM to 0.23, SGLang), a tagged map `{"type": "BlockStored", ...}` (vLLM from 0.24), a map
of RFC #1527 `{"event_type": "stored", ...}` (Mooncake), or any of these packed once more into a msgpack bin
(llm-d).  The first byte of an event tells which, so one batch may mix them.

Each event is decoded by itself: one that can't be read, or has an unknown tag, is counted in `Batch.skipped` and
costs nothing else.  Unknown fields and positions are ignored, missing ones have their defaults.  An empty LoRA
name is none, as it is in queries and registrations.

Invariant: whatever the bytes, `decode_batch` returns a batch or raises `WireError`, nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from kvindexer.errors import WireError
from kvindexer.types import SourceType

_HASH_MASK: Final = 2**64 - 1
_HASH_BYTES: Final = 8
_MAX_HASH_BYTES: Final = 64
_MAX_BLOCK_SIZE: Final = 2**20
_MAX_RANK: Final = 2**16
_MAX_GROUP: Final = 2**16
_MAX_DEPTH: Final = 2
_MAX_NAME: Final = 4096

NO_MEDIUM: Final = "GPU"
"""The medium of an event that names none: vLLM below 0.10.2 knew only the GPU."""


class BlockStored(Struct, frozen=True, gc=False):
    """Consecutive blocks of one request became available; `hashes` are unsigned 64-bit engine hashes."""

    hashes: list[int]
    parent: int | None = None
    """Hash of the block before the first one; None: they begin a prompt."""
    tokens: list[int] = []
    block_size: int = 0
    """Tokens a block; 0 in placeholders that only name hashes."""
    lora_id: int | None = None
    lora_name: str | None = None
    medium: str | None = None
    extra_keys: list[Any] | None = None
    """One entry a block: what else its content depends on; None: the publisher says nothing about it."""
    group: int = 0
    kind: str | None = None
    window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    keyed: bool = False
    """The hashes are block keys themselves (`seq_hashes` of RFC #1527)."""


class BlockRemoved(Struct, frozen=True, gc=False):
    """One copy of each of these blocks is gone from a medium."""

    hashes: list[int]
    medium: str | None = None
    group: int = 0
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(Struct, frozen=True, gc=False):
    """The publisher's cache was reset; `medium` is None for engines, which mean the GPU."""

    medium: str | None = None


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(NamedTuple):
    """The events of one message, in order."""

    rank: int | None
    events: list[Event]
    skipped: dict[str, int]
    """How many events had no effect, by reason."""


# What stands on the wire -------------------------------------------------------------------------------------

_Hash = int | bytes
_Name = Annotated[str, Meta(max_length=_MAX_NAME)]
_BlockSize = Annotated[int, Meta(ge=0, le=_MAX_BLOCK_SIZE)]
_Group = Annotated[int, Meta(ge=0, le=_MAX_GROUP)]


class _Batch(Struct, array_like=True, gc=False):
    ts: Raw
    events: list[Raw]
    data_parallel_rank: Annotated[int, Meta(ge=0, le=_MAX_RANK)] | None = None


class _StoredFields(Struct, gc=False):
    """vLLM's fields in vLLM's order of positions, as far as they matter here."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None = None
    token_ids: list[int] | None = None
    block_size: _BlockSize | None = None
    lora_id: int | None = None
    medium: _Name | None = None
    lora_name: _Name | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: _Group | None = None
    kv_cache_spec_kind: _Name | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: _Name | None = None
    ownership: _Name | None = None


class _StoredMap(_StoredFields, tag_field="type", tag="BlockStored", gc=False):
    cache_salt: Any = None
    """SGLang's; in maps only, for the position behind `ownership` is vLLM's session."""


class _RemovedMap(Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: list[_Hash]
    medium: _Name | None = None
    group_idx: _Group | None = None
    locality: _Name | None = None
    ownership: _Name | None = None


class _ClearedMap(Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    medium: _Name | None = None


class _StoredArray(_StoredFields, array_like=True, tag="BlockStored", gc=False):
    """The same fields, by position."""


class _RemovedArray(_RemovedMap, array_like=True, tag="BlockRemoved", gc=False):
    """The same fields, by position."""


class _ClearedArray(Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    """No fields."""


class _SglangStoredArray(Struct, array_like=True, tag="BlockStored", gc=False):
    """SGLang's positions are vLLM's up to the medium; what follows changed its meaning between releases."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None = None
    token_ids: list[int] | None = None
    block_size: _BlockSize | None = None
    lora_id: int | None = None
    medium: _Name | None = None
    field_7: Any = None
    field_8: Any = None
    field_9: Any = None


class _SglangRemovedArray(Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: list[_Hash]
    medium: _Name | None = None


class _Rfc1527(Struct, gc=False):
    event_type: str | None = None
    type: str | None = None
    seq_hashes: list[_Hash] | None = None
    block_hashes: list[_Hash] | None = None
    parent_hash: _Hash | None = None
    parent_block_hash: _Hash | None = None
    token_ids: list[int] | None = None
    block_size: _BlockSize | None = None
    lora_name: _Name | None = None
    medium: _Name | None = None
    backend_id: Any = None
    group_id: Any = None
    group_idx: _Group | None = None


_decode_outer = msgspec.msgpack.Decoder(_Batch).decode
_decode_bin = msgspec.msgpack.Decoder(bytes).decode
_decode_tagged = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap).decode
_decode_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray).decode
_decode_sglang = msgspec.msgpack.Decoder(_SglangStoredArray | _SglangRemovedArray | _ClearedArray).decode
_decode_rfc1527 = msgspec.msgpack.Decoder(_Rfc1527).decode
_decode_tag = msgspec.msgpack.Decoder(dict[str, Any] | list[Any] | bytes).decode

_FORMS: Final = {
    **dict.fromkeys([*range(0x80, 0x90), 0xDE, 0xDF], "map"),
    **dict.fromkeys([*range(0x90, 0xA0), 0xDC, 0xDD], "array"),
    **dict.fromkeys([0xC4, 0xC5, 0xC6], "bin"),
}
"""What the first byte of a msgpack value says it is."""
_TAGS: Final = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared", "stored", "removed", "cleared"})
_UNREADABLE: Final = (ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError)


def batch_rank(payload: bytes) -> int | None:
    """The rank that a batch names.  Raises WireError if the payload is no batch."""
    try:
        return _decode_outer(payload).data_parallel_rank
    except _UNREADABLE as error:
        raise WireError("bad_batch", type(error).__name__) from None


def decode_batch(payload: bytes, dialect: SourceType = "vllm") -> Batch:
    """Events of one message.  `dialect` is the registered type of the source.

    Raises WireError if the payload is no batch; a bad event inside a batch is skipped and counted.
    """
    try:
        outer = _decode_outer(payload)
    except _UNREADABLE as error:
        raise WireError("bad_batch", type(error).__name__) from None
    events: list[Event] = []
    skipped: dict[str, int] = {}
    for raw in outer.events:
        try:
            event = _decode_event(raw, dialect, 0)
        except WireError as error:
            skipped[error.reason] = skipped.get(error.reason, 0) + 1
        except _UNREADABLE:
            reason = _why_unreadable(raw)
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            events.append(event)
    return Batch(outer.data_parallel_rank, events, skipped)


def _decode_event(raw: Raw | bytes, dialect: SourceType, depth: int) -> Event:
    form = _FORMS.get(memoryview(raw)[0]) if raw else None
    if form == "map":
        if dialect == "mooncake":
            return _from_rfc1527(_decode_rfc1527(raw))
        return _from_wire(_decode_tagged(raw))
    if form == "array":
        if dialect == "sglang":
            return _from_sglang(_decode_sglang(raw))
        return _from_wire(_decode_array(raw))
    if form == "bin" and depth < _MAX_DEPTH:
        return _decode_event(_decode_bin(raw), dialect, depth + 1)
    raise WireError("bad_event")


def _why_unreadable(raw: Raw | bytes, depth: int = 0) -> str:
    """Whether an event has a tag that we do not know, or is broken."""
    try:
        value = _decode_tag(raw)
    except _UNREADABLE:
        return "bad_event"
    if isinstance(value, bytes):
        return _why_unreadable(value, depth + 1) if depth < _MAX_DEPTH else "bad_event"
    tag = value.get("type", value.get("event_type")) if isinstance(value, dict) else value[0] if value else None
    return "unknown_event" if isinstance(tag, str) and tag not in _TAGS else "bad_event"


def _hash(value: _Hash) -> int:
    """One engine hash as an unsigned 64-bit integer.

    Bytes are cut to their last 8, big-endian, as vLLM does itself when it publishes integers; negative integers
    (vLLM 0.9's Python hashes) are taken modulo 2**64.
    """
    if isinstance(value, int):
        return value & _HASH_MASK
    if not _HASH_BYTES <= len(value) <= _MAX_HASH_BYTES:
        raise WireError("bad_event", "hash length")
    return int.from_bytes(value[-_HASH_BYTES:], "big")


def _hashes(values: list[_Hash]) -> list[int]:
    return [value if type(value) is int and value >= 0 else _hash(value) for value in values]


def _parent(value: _Hash | None) -> int | None:
    """The parent's hash; 0 is how llm-d's simulator says that there is none."""
    return None if value is None else _hash(value) or None


def _from_wire(event: _StoredMap | _RemovedMap | _ClearedMap | _StoredArray | _RemovedArray | _ClearedArray) -> Event:
    if isinstance(event, _RemovedMap):
        return BlockRemoved(
            _hashes(event.block_hashes), event.medium, event.group_idx or 0, event.locality, event.ownership
        )
    if isinstance(event, _ClearedMap):
        return AllBlocksCleared(event.medium)
    if isinstance(event, _ClearedArray):
        return AllBlocksCleared()
    parent = _parent(event.parent_block_hash)
    extra_keys = event.extra_keys
    if isinstance(event, _StoredMap) and event.cache_salt is not None:
        extra_keys = _salted(event.cache_salt, len(event.block_hashes), parent)
    return BlockStored(
        _hashes(event.block_hashes),
        parent,
        event.token_ids or [],
        event.block_size or 0,
        event.lora_id,
        event.lora_name or None,
        event.medium,
        extra_keys,
        event.group_idx or 0,
        event.kv_cache_spec_kind,
        event.kv_cache_spec_sliding_window,
        event.locality,
        event.ownership,
    )


def _salted(salt: object, blocks: int, parent: int | None) -> list[Any] | None:
    """SGLang's salt as extra keys of a prompt's first block.

    A salt that is no plain text is kept as opaque bytes: such a block matches nobody who does not know them.  An
    empty text is no salt, here as in queries.
    """
    if isinstance(salt, dict):
        salt = salt.get("cache_salt", salt or None)
    if salt is None or salt == "" or parent is not None or not blocks:
        return None
    key = salt if isinstance(salt, str) else msgspec.msgpack.encode(salt)
    return [[key]] + [None] * (blocks - 1)


def _from_sglang(event: _SglangStoredArray | _SglangRemovedArray | _ClearedArray) -> Event:
    if isinstance(event, _SglangRemovedArray):
        return BlockRemoved(_hashes(event.block_hashes), event.medium)
    if isinstance(event, _ClearedArray):
        return AllBlocksCleared()
    parent = _parent(event.parent_block_hash)
    salts = (field for field in (event.field_7, event.field_8, event.field_9) if isinstance(field, dict))
    return BlockStored(
        _hashes(event.block_hashes),
        parent,
        event.token_ids or [],
        event.block_size or 0,
        event.lora_id,
        medium=event.medium,
        extra_keys=_salted(next(salts, None), len(event.block_hashes), parent),
    )


def _from_rfc1527(event: _Rfc1527) -> Event:
    values = event.block_hashes if event.seq_hashes is None else event.seq_hashes
    ownership = None if event.backend_id is None else str(event.backend_id)[:_MAX_NAME]
    match event.event_type or event.type:
        case "stored" | "BlockStored" if values is not None:
            parent = event.parent_block_hash if event.parent_hash is None else event.parent_hash
            return BlockStored(
                _hashes(values),
                _parent(parent),
                event.token_ids or [],
                event.block_size or 0,
                lora_name=event.lora_name or None,
                medium=event.medium,
                group=event.group_idx or 0,
                ownership=ownership,
                keyed=event.seq_hashes is not None,
            )
        case "removed" | "BlockRemoved" if values is not None:
            return BlockRemoved(_hashes(values), event.medium, event.group_idx or 0, ownership=ownership)
        case "cleared" | "AllBlocksCleared":
            return AllBlocksCleared(event.medium)
        case "stored" | "BlockStored" | "removed" | "BlockRemoved":
            raise WireError("bad_event", "no hashes")
        case _:
            raise WireError("unknown_event")
