"""How the shards of one replica stand to what Redis holds: figures for health and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from kvindexer.events.keeping import Stored
from kvindexer.store.kept import KeptSource

SHARD_STATES: Final = ("in_step", "behind", "ahead", "absent", "other_life", "unread")
"""Redis holds what memory holds; less; more; nothing; another life of the engine; or it has not been read."""


class Shards(NamedTuple):
    """All shards, put together."""

    states: dict[str, int]
    lag_s: float
    """Age of the oldest change that is not in Redis, as far as is known."""
    pending_bytes: int


def shard_state(kept: KeptSource) -> str:
    """One of `SHARD_STATES`."""
    remote = kept.shard.remote
    if remote is None:
        return "unread"
    if remote.meta is None:
        return "absent"
    epoch, upto = remote.meta.checkpoint[:2]
    if epoch != kept.shard.epoch:
        return "other_life"
    if upto > kept.stream.next_seq:
        return "ahead"
    return "in_step" if upto == kept.stream.next_seq else "behind"


def shards(sources: Iterable[KeptSource], now: float) -> Shards:
    """Look at all of them."""
    states: Counter[str] = Counter()
    lag_s, pending_bytes = 0.0, 0
    for kept in sources:
        states[shard_state(kept)] += 1
        pending_bytes += kept.shard.pending_bytes
        if kept.shard.dirty_at is not None:
            lag_s = max(lag_s, now - kept.shard.dirty_at)
    return Shards({state: states[state] for state in SHARD_STATES}, lag_s, pending_bytes)


def stored(kept: KeptSource) -> Stored | None:
    """What Redis held of a source when it was last read or written."""
    meta = kept.shard.remote.meta if kept.shard.remote is not None else None
    if meta is None:
        return None
    return Stored(meta.checkpoint.epoch, meta.checkpoint.next - 1 if meta.checkpoint.next else None, meta.entries)
