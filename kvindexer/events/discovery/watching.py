"""One list of the API server, kept up to date.

    list ─► watch ─► ended, cut ──────────► watch from the last version
                  ─► expired (410) ───────► list
                  ─► anything else ───────► list, after a pause that doubles with every failure

A list replaces what was known: what it does not name any more is gone, whether we heard of that or not.

Invariant: `objects` is what the API server last said.  While it can't be asked, that stays.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, cast

from kvindexer.events.discovery.collection import ClusterError, Collection, Event, Object
from kvindexer.events.finding import FindingProblem

_log = logging.getLogger(__name__)

RETRY_MIN_S: Final = 0.25
SETTLED_S: Final = 5.0
"""A watch that was open for so long was a good one, also if it told nothing."""
_OFTEN: Final = 3
"""Broken connections in a row from which on they are a problem."""
_EXPECTED: Final = ("ended", "expired")
"""What happens to every watch, sooner or later."""


@dataclass
class Tally:
    """What has happened to all lists together."""

    relists: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Keeping(NamedTuple):
    """What all lists are kept up to date with."""

    retry_max_s: float
    tally: Tally
    changed: Callable[[], None]
    """Called whenever objects, or what is wrong with their list, may have changed."""


class Watched(Generic[Object]):
    """The objects of one collection."""

    def __init__(self, collection: Collection[Object], where: str, keeping: Keeping) -> None:
        self.objects: dict[str, Object] = {}
        """By name, which a namespace gives once at a time."""
        self.listed = False
        """Whether it was ever read."""
        self.problem: FindingProblem | None = None
        self.contact_at: float | None = None
        self._collection = collection
        self._where = where
        self._retry_max_s, self._tally, self._changed = keeping
        self._version = ""
        self._failures = 0
        self._cuts = 0

    async def run(self) -> None:
        """Keep it up to date, until cancelled."""
        while True:
            began_at = time.monotonic()
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ClusterError as error:
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - one slip of ours must not end the search; it is logged
                _log.exception("discovery: %s", self._where)
                self._failed(ClusterError("unreadable", f"{type(error).__name__}", "see the log"))
            if time.monotonic() - began_at >= SETTLED_S:
                self._failures = 0
            await asyncio.sleep(self._pause_s())

    async def _list(self) -> None:
        listed = await self._collection.list()
        if not listed.version:
            raise ClusterError("unreadable", "a list without a resourceVersion")
        self._tally.relists += self.listed
        self.objects = {one.metadata.name: one for one in listed.objects}
        self._version, self.listed = listed.version, True
        self._heard()
        if self.problem is not None:
            _log.info("discovery: %s: all is well again", self._where)
            self.problem = None
        self._changed()

    async def _watch(self) -> None:
        async with aclosing(cast("Any", self._collection.watch(self._version))) as events:
            async for event in events:
                self._take(event)

    def _take(self, event: Event[Object]) -> None:
        metadata = event.object.metadata
        self._heard()
        if event.kind in {"ADDED", "MODIFIED"}:
            self.objects[metadata.name] = event.object
        elif event.kind == "DELETED":
            self.objects.pop(metadata.name, None)
        elif event.kind != "BOOKMARK":
            raise ClusterError("unreadable", f"a watch event of the type {event.kind[:20]!r}")
        self._version = metadata.resourceVersion or self._version
        self._failures = self._cuts = 0
        if event.kind != "BOOKMARK":
            self._changed()

    def _heard(self) -> None:
        self.contact_at = time.monotonic()

    def _failed(self, error: ClusterError) -> None:
        self._failures += 1
        self._cuts = self._cuts + 1 if error.reason == "cut" else 0
        often = self._cuts > _OFTEN
        if error.reason not in {"ended", "cut"} or often:
            self._version = ""
        if error.reason in _EXPECTED:
            self._heard()
            return
        self._tally.errors[error.reason] += 1
        if error.reason == "cut" and not often:
            return
        if self.problem is None or self.problem.reason != error.reason:
            _log.warning("discovery: %s: %s; %s", self._where, error, error.hint)
        self.problem = FindingProblem(error.reason, self._where, error.message, error.hint)
        self._changed()

    def _pause_s(self) -> float:
        """Longer with every failure in a row, and never the same for all replicas."""
        longest_s: float = min(self._retry_max_s, RETRY_MIN_S * 2 ** min(self._failures, 20))
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing
