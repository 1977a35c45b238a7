"""What a fake engine says about its cache, before any engine's wire format is put on it.

Invariant: an event tells the whole truth (full digests, tokens, extra keys); a dialect may only leave things
out or spell them another way. Field names are vLLM's, so that a dialect's table can name them.
"""

from __future__ import annotations

from dataclasses import dataclass

Digest = bytes
"""A block's full 32-byte hash; what of it goes on the wire is the dialect's business."""

ExtraKey = str | bytes | tuple[str, int]
"""LoRA name or cache salt (str), embedding digest (bytes), multimodal item (identifier, offset in the block)."""

GPU = "GPU"
CPU = "CPU"
FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A run of consecutive full blocks of one request became readable on `medium`."""

    block_hashes: tuple[Digest, ...]
    parent_block_hash: Digest | None
    token_ids: tuple[int, ...]
    block_size: int
    base_block_idx: int
    medium: str = GPU
    lora_id: int | None = None
    lora_name: str | None = None
    extra_keys: tuple[tuple[ExtraKey, ...] | None, ...] = ()
    group_idx: int = 0
    kv_cache_spec_kind: str | None = FULL_ATTENTION
    kv_cache_spec_sliding_window: int | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    """Also among the extra keys of block 0; here on every run of a salted prompt."""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """One physical copy of each listed block is gone from `medium`."""

    block_hashes: tuple[Digest, ...]
    medium: str = GPU
    group_idx: int = 0


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The GPU cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared
