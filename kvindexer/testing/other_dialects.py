"""Wire formats of engines and stores other than vLLM.

Invariant, as in `dialects`: spelling and omissions only. None of these keeps several copies under one hash on the
wire. Of these publishers only SGLang serves a replay: give the others `replay_endpoint=None`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from kvindexer.testing.dialects import HashForm, Traits, WireHash
from kvindexer.testing.events import CPU, GPU, AllBlocksCleared, BlockStored
from kvindexer.testing.packing import pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvindexer.testing.events import Digest, Event

SGLANG_MEDIA: Mapping[str, str] = {GPU: "GPU", CPU: "CPU_PINNED"}
NO_PARENT = 0


@dataclass(frozen=True)
class Sglang:
    """SGLang: positional arrays of seven elements, or maps; salts in a dict of their own, never extra keys.

    In arrays the dict stands where vLLM has `lora_name`.
    """

    maps: bool = False
    hash_form: HashForm = HashForm.INT64

    @property
    def traits(self) -> Traits:
        """Set-like; replay answers without the topic."""
        return Traits("sglang", set_like=True, replay_has_topic=False)

    def wire_hash(self, digest: Digest, medium: str) -> WireHash:  # noqa: ARG002 -- one form for every medium
        """Spell a digest."""
        return self.hash_form.write(digest)

    def encode(self, events: Sequence[Event], ts: float, rank: int | None) -> bytes:
        """Encode a batch."""
        spelled = [self._values(event) for event in events]
        return pack([ts, spelled if self.maps else [list(values.values()) for values in spelled], rank])

    def _values(self, event: Event) -> dict[str, Any]:
        values: dict[str, Any] = {"type": type(event).__name__}
        if isinstance(event, AllBlocksCleared):
            return values
        values["block_hashes"] = [self.hash_form.write(each) for each in event.block_hashes]
        if isinstance(event, BlockStored):
            parent = event.parent_block_hash
            values["parent_block_hash"] = parent and self.hash_form.write(parent)
            values["token_ids"] = event.token_ids
            values["block_size"] = event.block_size
            values["lora_id"] = event.lora_id
        values["medium"] = SGLANG_MEDIA[event.medium]
        if isinstance(event, BlockStored) and event.cache_salt is not None:
            values["cache_salt"] = {"cache_salt": event.cache_salt}
        return values


@dataclass(frozen=True)
class MooncakeStore:
    """The publisher of a Mooncake store master: maps of RFC #1527, `aliases` adds vLLM's names beside them.

    The store knows neither tokens nor parents unless `describing`; its time stamps are whole milliseconds.
    """

    backend_id: str = "mooncake-0"
    medium: str = "cpu"
    model_name: str | None = None
    tenant_id: str = "default"
    describing: bool = False
    aliases: bool = True
    _event_ids: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def traits(self) -> Traits:
        """Set-like."""
        return Traits("mooncake", set_like=True)

    def wire_hash(self, digest: Digest, medium: str) -> WireHash:  # noqa: ARG002 -- one form for every medium
        """Spell a digest: unsigned."""
        return HashForm.UINT64.write(digest)

    def encode(self, events: Sequence[Event], ts: float, rank: int | None) -> bytes:
        """Encode a batch."""
        stamp = int(ts * 1000)
        return pack([stamp, [self._spell(event, stamp, rank) for event in events], rank])

    def _spell(self, event: Event, stamp: int, rank: int | None) -> dict[str, Any]:
        stored = event if isinstance(event, BlockStored) else None
        values: dict[str, Any] = {
            "event_id": next(self._event_ids),
            "timestamp": stamp,
            "event_type": {"BlockStored": "stored", "BlockRemoved": "removed"}.get(type(event).__name__, "cleared"),
            "model_name": self.model_name,
            "block_size": stored and stored.block_size,
            "additional_salt": None,
            "lora_name": stored and stored.lora_name,
            "tenant_id": self.tenant_id,
            "backend_id": self.backend_id,
            "medium": self.medium,
            "dp_rank": rank,
        }
        if self.aliases:
            values["type"] = type(event).__name__
        if isinstance(event, AllBlocksCleared):
            return values
        known = stored if self.describing else None
        values["seq_hashes"] = [HashForm.UINT64.write(each) for each in event.block_hashes]
        values["base_block_idx"] = known and known.base_block_idx
        if stored:
            values["parent_hash"] = (
                HashForm.UINT64.write(known.parent_block_hash) if known and known.parent_block_hash else None
            )
            values["token_ids"] = known and known.token_ids
        if self.aliases:
            values["block_hashes"] = values["seq_hashes"]
            if stored:
                values["parent_block_hash"] = values["parent_hash"]
        return values


@dataclass(frozen=True)
class LlmdFs:
    """llm-d's filesystem backend: each event packed by itself, as bin, in a batch of two; hashes and medium only."""

    medium: str = "SHARED_STORAGE"

    @property
    def traits(self) -> Traits:
        """Set-like; its first message is number 1."""
        return Traits("store", set_like=True, first_seq=1)

    def wire_hash(self, digest: Digest, medium: str) -> WireHash:  # noqa: ARG002 -- one form for every medium
        """Spell a digest: the low 64 bits of vLLM's."""
        return HashForm.UINT64.write(digest)

    def encode(self, events: Sequence[Event], ts: float, rank: int | None) -> bytes:  # noqa: ARG002 -- has no ranks
        """Encode a batch."""
        return pack([ts, [pack(self._spell(event)) for event in events]])

    def _spell(self, event: Event) -> list[Any]:
        tag = type(event).__name__
        if isinstance(event, AllBlocksCleared):
            return [tag]
        hashes = [HashForm.UINT64.write(each) for each in event.block_hashes]
        if isinstance(event, BlockStored):
            return [tag, hashes, NO_PARENT, [], 0, None, self.medium]
        return [tag, hashes, self.medium]
