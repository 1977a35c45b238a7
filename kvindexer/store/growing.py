"""Giving a shard more buckets: Redis copies its records by itself, into a generation beside the old one.

    buckets of old   0   1   2   3
                     ├───┼───┼───┼──► 0  4  8  12     a piece of them a call,
                     .   ├───┼───┼──► 1  5  9  13     the last call puts the new ones in place
                     .   .   ├───┼──► 2  6  10 14

Nothing changes in the shard meanwhile, or the copy is refused: it is fenced by (epoch, next) like everything else.
What the source says in that time waits in the journal, for the next flush.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Final

from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Leftover
from kvindexer.store.server import Refusal, ShardServer
from kvindexer.store.shard import Grow

_log = logging.getLogger(__name__)

_PIECE_BUCKETS: Final = 64
"""Buckets a call: some 5,000 records, ten milliseconds of a server."""


async def grow(
    server: ShardServer,
    kept: KeptSource,
    step: Grow,
    clock: Callable[[], float] = time.monotonic,
    piece_buckets: int = _PIECE_BUCKETS,
) -> Refusal | None:
    """Move a shard into `step.buckets` buckets.  Raises StoreError."""
    meta, life = step.meta, kept.life
    wider = meta._replace(generation=secrets.token_hex(4), buckets=step.buckets)
    for first in range(0, meta.buckets, piece_buckets):
        numbers = range(first, min(first + piece_buckets, meta.buckets))
        answer = await server.grow(kept.tag, kept.shard.registration, meta, wider, numbers)
        if kept.dropped or kept.life != life:
            return Refusal.LOST
        if answer is Refusal.LOST:
            _log.warning("source %s: Redis has not all of its records, they are written anew", kept.source)
            kept.shard.divergent = True
        if isinstance(answer, Refusal):
            return answer
    kept.shard.stored(wider, clock())
    await server.sweep(kept.tag, Leftover(meta.generation, meta.buckets, 0))
    return None
