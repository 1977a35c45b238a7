"""What else than tokens a block's content depends on, as bytes: LoRA, salt, images, prompt embeddings.

Each item is `tag (1 byte) || length (u32, little-endian) || payload`; items stand in the order of `_Tag`, several
of one tag in the order they have in the prompt.  A block without extras has no bytes.  Since a block's tokens
have a fixed length inside a keyspace, no two lists of extras give the same bytes.

Two sources of the same list must agree: events (`event_extras`, from a store's `extra_keys` and LoRA) and
queries (`prompt_extras`, from what the caller says of the prompt).  Which wire type of which vLLM version
becomes which tag stands in `docs/extras.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

_pack_header = Struct("<BI").pack
_pack_offset = Struct("<q").pack


_OFFSET_LIMIT = 2**63


class _Tag(IntEnum):
    LORA_NAME = 1
    LORA_ID = 2  # vLLM below 0.14 names no adapter: never equal to any query's extras
    MULTIMODAL = 3
    PROMPT_EMBEDS = 4
    BARE = 5  # a string that may be an image or something unknown: never equal to any query's extras
    SALT = 6


class MultimodalItem(NamedTuple):
    """An image or the like in a prompt: its hash, and the tokens [offset, offset + length) it takes."""

    hash: str
    offset: int
    length: int


def _item(tag: _Tag, payload: bytes) -> bytes:
    return _pack_header(tag, len(payload)) + payload


def _multimodal(identity: str, offset: int) -> bytes:
    """An item and where it begins, relative to the block's first token (negative: in a block before)."""
    if not -_OFFSET_LIMIT <= offset < _OFFSET_LIMIT:
        raise ValueError("multimodal offset outside 64 bits")
    return _item(_Tag.MULTIMODAL, _pack_offset(offset) + identity.encode())


def lora_extras(lora: str | None, lora_id: int | None = None) -> bytes:
    """The extras that every block of a LoRA's prompt has."""
    if lora is not None:
        return _item(_Tag.LORA_NAME, lora.encode())
    if lora_id is not None:
        return _item(_Tag.LORA_ID, str(lora_id).encode())
    return b""


def event_extras(keys: Sequence[object] | None, lora: str | None, lora_part: bytes, *, first: bool) -> bytes:
    """Extras of one stored block, from its entry of `extra_keys`.

    `lora_part` comes from `lora_extras`; `first` says whether the block begins its prompt.  The LoRA name stands
    among the keys once more: its first occurrence is left out, so that a salt of the same text survives.  A bare
    string is a salt if it is the last one in a prompt's first block, otherwise it may be anything.  Raises
    ValueError for a key of a type, or with an offset, that no version sends.
    """
    if not keys:
        return lora_part
    items: list[tuple[_Tag, bytes]] = []
    strings: list[str] = []
    lora_seen = lora is None
    for key in keys:
        match key:
            case str() if not lora_seen and key == lora:
                lora_seen = True
            case str():
                strings.append(key)
            case bytes():
                items.append((_Tag.PROMPT_EMBEDS, _item(_Tag.PROMPT_EMBEDS, key)))
            case [str() as identity, int() as offset]:
                items.append((_Tag.MULTIMODAL, _multimodal(identity, offset)))
            case _:
                raise ValueError(f"extra key of type {type(key).__name__}")
    if strings and first:
        items.append((_Tag.SALT, _item(_Tag.SALT, strings.pop().encode())))
    items += [(_Tag.BARE, _item(_Tag.BARE, text.encode())) for text in strings]
    items.sort(key=lambda item: item[0])
    return lora_part + b"".join(encoded for _, encoded in items)


def prompt_extras(
    blocks: int,
    block_size: int,
    *,
    lora: str | None = None,
    cache_salt: str | None = None,
    multimodal: Iterable[MultimodalItem] = (),
) -> dict[int, bytes]:
    """Extras of a query's prompt: block number -> bytes, only for blocks that have some.

    An item belongs to every block that it overlaps.
    """
    items = sorted(multimodal, key=lambda item: item.offset)
    if lora is None and cache_salt is None and not items:
        return {}
    lora_part = lora_extras(lora)
    parts = {block: [lora_part] for block in range(blocks)} if lora_part else {}
    for item in items:
        first = max(0, item.offset // block_size)
        last = min(blocks, -(-(item.offset + item.length) // block_size))
        for block in range(first, last):
            encoded = _multimodal(item.hash, item.offset - block * block_size)
            parts.setdefault(block, [b""]).append(encoded)
    if cache_salt is not None and blocks:
        parts.setdefault(0, [b""]).append(_item(_Tag.SALT, cache_salt.encode()))
    return {block: b"".join(encoded) for block, encoded in parts.items()}
