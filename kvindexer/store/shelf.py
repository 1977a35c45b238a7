"""The sources whose copies one replica keeps, whose turn each of them is, and whether Redis is there at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.store.kept import KeptSource
from kvindexer.store.turns import turn

_log = logging.getLogger(__name__)

AT_A_TIME: Final = 16
"""Shards that are looked at between two turns of queries."""
_LEAST_PENDING_BYTES: Final = 64 * 1024


class Shelf:
    """What the parts of a keeper have in common."""

    def __init__(self, settings: Settings, replica: str, lull: Lull) -> None:
        self.replica = replica
        self.lull = lull
        """When to go on with what can wait."""
        self.replicas: tuple[str, ...] = (replica,)
        """Those that were heard lately, with this one."""
        self.reachable = False
        """Whether the last beat came through: without one, nothing else is tried."""
        self.sources: dict[str, KeptSource] = {}
        self.wake = asyncio.Event()
        """There is something that may have to be written."""
        self._max_pending_bytes = settings.store_pending_max_bytes

    def put(self, kept: KeptSource) -> None:
        """Keep a source, or keep it anew."""
        self.sources[kept.source] = kept
        self.share_out()

    def take(self, source: str) -> KeptSource | None:
        """Keep a source no longer."""
        kept = self.sources.pop(source, None)
        if kept is not None:
            kept.dropped = True
            self.share_out()
        return kept

    def heard(self, replicas: Sequence[str]) -> None:
        """These replicas are alive."""
        now = tuple(sorted({*replicas, self.replica}))
        if now != self.replicas:
            _log.info("the store: replicas are %s", ", ".join(now))
            self.replicas = now
            self.share_out()

    def mine(self, tag: str) -> bool:
        """Whether a shard is first this replica's to write."""
        return turn(self.replica, self.replicas, tag) == 0

    def share_out(self) -> None:
        """Divide the room for what waits among the sources, and the turns among the replicas."""
        share = max(_LEAST_PENDING_BYTES, self._max_pending_bytes // max(1, len(self.sources)))
        for kept in self.sources.values():
            kept.shard.max_pending_bytes = share
            kept.shard.turn = turn(self.replica, self.replicas, kept.tag)
