"""Who is written when: each shard is asked what it wants, and a few at a time get it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from kvindexer.errors import StoreError
from kvindexer.settings import Settings
from kvindexer.store.growing import grow
from kvindexer.store.kept import KeptSource
from kvindexer.store.server import Refusal, ShardServer
from kvindexer.store.shard import IN_STEP, Flush, Grow, Load, Rewrite, Step, Wait
from kvindexer.store.shelf import AT_A_TIME, Shelf
from kvindexer.store.troubles import Troubles
from kvindexer.store.writing import Writing
from kvindexer.types import Epoch

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 4
"""Shards that are written or loaded at once."""
_SOON_S: Final = 3600.0
"""At the end nothing waits for more to come."""
_WRITE_PAUSE_S: Final = 0.02
"""Time between writes, of whatever source, unless a source has much to write."""


class Jobs:
    """Writes and loads of one replica; `spawn` starts a task, `follow_anew` follows a source from its copy."""

    def __init__(
        self,
        settings: Settings,
        server: ShardServer,
        shelf: Shelf,
        troubles: Troubles,
        writing: Writing,
        *,
        spawn: Callable[..., object],
        follow_anew: Callable[[str], None],
    ) -> None:
        self._flush_interval_s = settings.store_flush_interval_s
        self._most_interval_s = settings.store_takeover_s / 2
        self._look_every_s = min(settings.store_flush_interval_s, settings.store_poll_interval_s) / 2
        self._server = server
        self._shelf = shelf
        self._troubles = troubles
        self._writing = writing
        self._spawn = spawn
        self._follow_anew = follow_anew
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.writes = 0
        self.refusals = 0

    async def loop(self) -> None:
        """Decide now and then, and whenever there may be something to do."""
        wake = self._shelf.wake
        while True:
            try:
                async with asyncio.timeout(self._look_every_s):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()
            if self._shelf.reachable:
                await self._decide()

    async def warm(self, kept: KeptSource) -> None:
        """Load a source that has just been followed, if there is a copy; a failure is no reason not to follow it."""
        async with self._slots:
            try:
                await self._writing.load(kept)
            except StoreError as error:
                self._troubles.begin(kept.source, error)
            except Exception:  # noqa: BLE001 - a source that can't be warmed is followed all the same
                self._troubles.unexpected(kept.source, f"{kept.source}: a load failed")
            finally:
                kept.busy = False

    async def finish(self) -> None:
        """Write the last changes of what is ours to write."""
        ours = [kept for kept in self._shelf.sources.values() if not kept.busy and kept.shard.turn == 0]
        await asyncio.gather(*map(self._last_flush, ours))

    async def _last_flush(self, kept: KeptSource) -> None:
        step = kept.shard.decide(time.monotonic() + _SOON_S)
        if isinstance(step, Flush):
            await self._do(kept, step)

    async def _decide(self) -> None:
        now, interval_s = time.monotonic(), self._interval_s()
        for looked_at, kept in enumerate(list(self._shelf.sources.values())):
            if looked_at % AT_A_TIME == AT_A_TIME - 1:
                await self._shelf.lull.wait()
            kept.shard.flush_interval_s = interval_s
            if kept.busy or kept.dropped or not kept.dialled:
                continue
            step = kept.shard.decide(now)
            if kept.shard.epoch is not None:
                kept.stream.epoch = Epoch(kept.shard.epoch)
            if isinstance(step, Wait):
                if step is IN_STEP:
                    self._troubles.end(kept.source)
                continue
            kept.busy = True
            self._spawn(self._work(kept), "write")

    def _interval_s(self) -> float:
        """Longer with many sources at work, for a write costs as much as hundreds of records; others mustn't wait."""
        waiting = sum(kept.shard.pending_records > 0 for kept in self._shelf.sources.values())
        return max(self._flush_interval_s, min(_WRITE_PAUSE_S * waiting, self._most_interval_s))

    async def _work(self, kept: KeptSource) -> None:
        """Decide again when it is our turn, for what is written must be what is decided on."""
        async with self._slots:
            try:
                await self._shelf.lull.wait()
                await self._do(kept, kept.shard.decide(time.monotonic()))
            finally:
                kept.busy = False
        if kept.shard.eager:
            self._shelf.wake.set()

    async def _do(self, kept: KeptSource, step: Step) -> None:
        if kept.dropped or not self._shelf.reachable or isinstance(step, Wait):
            return
        if isinstance(step, Load):
            _log.info("source %s: its shard is loaded (%s)", kept.source, step.why)
            self._follow_anew(kept.source)
            return
        try:
            refusal = await self._written(kept, step)
        except StoreError as error:
            self._troubles.begin(kept.source, error)
            return
        except Exception:  # noqa: BLE001 - one bad shard must not stop the others; it is logged and shows in health
            self._troubles.unexpected(kept.source, f"{kept.source}: a write failed")
            return
        self.writes += 1
        if refusal is None:
            self._troubles.end(kept.source)
            return
        self.refusals += 1
        if refusal is not Refusal.HELD:
            kept.shard.remote = None  # what was decided on is not there any more: the next beat reads it

    async def _written(self, kept: KeptSource, step: Flush | Rewrite | Grow) -> Refusal | None:
        match step:
            case Flush():
                return await self._writing.flush(kept, step)
            case Rewrite():
                return await self._writing.rewrite(kept, step)
            case Grow():
                return await grow(self._server, kept, step)
