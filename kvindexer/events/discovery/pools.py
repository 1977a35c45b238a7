"""The pods of an InferencePool: the pool is watched for its selector, and the pods that it selects are watched too.

    pool changes its labels ─► watch the new ones; their pods take over when they were listed once
    pool changes its ports  ─► the same pods, read anew
    pool is deleted         ─► it selects no pods any more

Invariant: until the pods of a new selector are known, those of the one before stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol, cast

from kvindexer.events.discovery.collection import ClusterError, Collection, Event, Listed
from kvindexer.events.discovery.plan import Chosen
from kvindexer.events.discovery.pods import Metadata, Pod, Pool, read_pool
from kvindexer.events.discovery.selectors import Requirement
from kvindexer.events.discovery.watching import Keeping, Watched
from kvindexer.events.finding import FindingProblem

ABSENT_S: Final = 10.0
"""A pool that isn't there is looked for so often: it may come as either kind."""


class PoolObject(Protocol):
    """An InferencePool of whichever kind."""

    @property
    def metadata(self) -> Metadata:
        """Who it is."""

    @property
    def spec(self) -> Any:
        """What it says."""


class EitherKind:
    """The pool of one name, of the kind that there is: `Collection` of none or one."""

    def __init__(self, kinds: Sequence[Collection[Any]]) -> None:
        self._kinds = kinds
        self._present: Collection[Any] | None = None

    async def list(self) -> Listed[Any]:
        """See `Collection.list`."""
        self._present = None
        empty: Listed[Any] | None = None
        refusals: list[ClusterError] = []
        for kind in self._kinds:
            try:
                listed = await kind.list()
            except ClusterError as error:
                if error.reason not in {"not_found", "forbidden"}:
                    raise
                refusals.append(error)
                continue
            if listed.objects:
                self._present = kind
                return listed
            empty = empty or listed
        if empty is None:
            raise next((one for one in refusals if one.reason == "forbidden"), refusals[0])
        return empty

    async def watch(self, version: str) -> AsyncIterator[Event[Any]]:
        """See `Collection.watch`."""
        if self._present is None:
            await asyncio.sleep(ABSENT_S)
            raise ClusterError("expired", "it may have come")
        async with aclosing(cast("Any", self._present.watch(version))) as events:
            async for event in events:
                yield event
                if event.kind == "DELETED":
                    raise ClusterError("expired", "it may have come back as the other kind")


class PoolPods:
    """One InferencePool and its pods."""

    def __init__(
        self,
        kinds: Sequence[Collection[Any]],
        pods: Callable[[Sequence[Requirement]], Collection[Pod]],
        where: str,
        keeping: Keeping,
    ) -> None:
        self.where = where
        self._pods = pods
        self._changed = keeping.changed
        self._keeping = keeping._replace(changed=self._pods_changed)
        self._pool: Watched[PoolObject] = Watched(
            EitherKind(kinds), where, keeping._replace(changed=self._pool_changed)
        )
        self._read: Pool | None = None
        self._unusable: FindingProblem | None = None
        self._members: Watched[Pod] | None = None
        self._next: Watched[Pod] | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Keep both up to date, until cancelled."""
        try:
            await self._pool.run()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @property
    def listed(self) -> bool:
        """Whether it is known which pods the pool has."""
        settled = self._read is None or (self._members is not None and self._members.listed)
        return self._pool.listed and settled

    @property
    def missing(self) -> bool:
        """Whether there is no such pool."""
        return self._pool.listed and not self._pool.objects

    @property
    def chosen(self) -> Chosen:
        """The pool's pods."""
        pods = self._members.objects.values() if self._members is not None else ()
        return Chosen(tuple(pods), self._read.ports if self._read is not None else ())

    def watched(self) -> Iterator[Watched[Any]]:
        """What is read from the API server for this."""
        yield self._pool
        for members in (self._members, self._next):
            if members is not None:
                yield members

    def problems(self) -> Iterator[FindingProblem]:
        """What is wrong."""
        yield from (watched.problem for watched in self.watched() if watched.problem is not None)
        if self._unusable is not None:
            yield self._unusable

    def _pool_changed(self) -> None:
        pool = next(iter(self._pool.objects.values()), None)
        try:
            read = None if pool is None else read_pool(pool.spec)
            self._unusable = None
        except ValueError as error:
            hint = "pods stay those of its last good selector"
            self._unusable = FindingProblem("bad_pool", self.where, f"InferencePool: {error}", hint)
            read = self._read
        before, self._read = self._read, read
        if read is None:
            self._drop("_members")
            self._drop("_next")
        elif before is None or before.labels != read.labels or self._members is None:
            self._follow(read)
        self._changed()

    def _follow(self, pool: Pool) -> None:
        """Watch the pods of this selector; those of the one before stay until they are listed."""
        self._drop("_next")
        selector = [Requirement(key, "=", (value,)) for key, value in pool.labels]
        where = f"pods of {self.where}"
        self._next = Watched(self._pods(selector), where, self._keeping)
        self._tasks[id(self._next)] = asyncio.create_task(self._next.run(), name=f"kvindexer-discovery {where}")

    def _pods_changed(self) -> None:
        if self._next is not None and self._next.listed:
            self._drop("_members")
            self._members, self._next = self._next, None
        self._changed()

    def _drop(self, name: str) -> None:
        watched: Watched[Pod] | None = getattr(self, name)
        if watched is not None:
            self._tasks.pop(id(watched)).cancel()
            setattr(self, name, None)
