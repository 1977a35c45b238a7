"""The words of the domain as types.  Nothing here does anything; every room may import it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, NewType

EngineHash = NewType("EngineHash", int)
"""An engine's own hash of a block, unsigned 64 bits; means something only inside its hash domain."""

BlockKey = NewType("BlockKey", int)
"""Our canonical key of a block at its place in a prompt, unsigned 64 bits (see `tokenization.blocks`)."""

LocalHash = NewType("LocalHash", int)
"""Hash of one block's tokens and extras, wherever the block stands, unsigned 64 bits."""

Seq = NewType("Seq", int)
"""A publisher's message number inside an epoch."""

Epoch = NewType("Epoch", int)
"""One life of a source, counted from 1."""

SourceType = Literal["vllm", "sglang", "mooncake", "store"]
"""Who publishes: decides how copies are counted and which dialect a field without a name belongs to."""

SOURCE_TYPES: tuple[SourceType, ...] = ("vllm", "sglang", "mooncake", "store")


class Tier(IntEnum):
    """Where a block lies, nearest to the GPU first; the order is the order of cumulative depths."""

    GPU = 0
    CPU = 1
    DISK = 2
    REMOTE = 3

    @property
    def label(self) -> str:
        """The tier's name in answers, metrics and settings."""
        return self.name.lower()


TIERS: tuple[Tier, ...] = tuple(Tier)


class Keyspace(NamedTuple):
    """Blocks of two keyspaces never match."""

    tenant: str
    model: str
    additional_salt: str
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A source as it was registered: by flag, configuration file or HTTP.

    The identity of a source is `endpoint`: what we dial, never what a message claims.
    """

    instance: str
    """The routable server its blocks belong to; for a store the store's own name."""
    model: str
    block_size: int
    """Tokens a block; an event that says otherwise wins."""
    endpoint: str
    """Where the publisher's PUB socket listens, `tcp://host:port`."""
    replay: str | None = None
    """Where its replay ROUTER listens; without one, losses can be seen but not repaired."""
    rank: int = 0
    """Data-parallel rank, unless a batch names its own."""
    type: SourceType = "vllm"
    tenant: str = "default"
    topic: str = ""
    """Prefix of the topics to subscribe to; empty: all."""
    lora: str | None = None
    """LoRA of events that carry none."""
    additional_salt: str = ""
    """Salt of the deployment: part of the keyspace."""
    tier: str | None = None
    """Tier of events without a medium (stores); engines default to `gpu`."""
    readers: tuple[str, ...] = ()
    """Stores only: the instances that can load its blocks; `*` for all instances of the model."""
    report_mode: Literal["normal", "full"] = "normal"
    """`full`: requests re-announce reused blocks (vLLM's kv_cache_report_mode), so copies can't be counted."""
    offload_blocks_per_chunk: int = 1
    """GPU blocks that one offloaded chunk covers."""
    offload_connector: bool | None = None
    """Whether the engine loads from lower tiers, which lifts its "last block is always recomputed" rule.
    None: yes as soon as it has announced a block below the GPU."""
    speculative_blocks: int = 0
    """Blocks that the engine drops from a hit for speculative decoding (1 for EAGLE and MTP)."""
    clear_lower_tiers: bool = False
    """Whether AllBlocksCleared also empties the tiers below the GPU."""
    durable_tiers: tuple[str, ...] = ("disk", "remote")
    """Tiers whose entries survive a restart of the engine (shown as unverified until announced again)."""
    aliases: tuple[str, ...] = ()
    """Further names that callers may give the instance: an address, a URL, the name of its pod."""
    block_bytes: int | None = None
    """Bytes of one block of `block_size` tokens, all layers together; None: not known."""
    curve_server_key: str | None = None
    """CURVE public key of the publisher, 40 characters of Z85; None: its events come in clear text."""
    life: str = ""
    """Which life of the publisher this is, if whoever names the source can tell; nothing of another one counts."""
