"""Finds the pods of engines, and keeps the fleet's found sources equal to them.

    Watched, PoolPods ── what the API server says ─┐
    Engines ── what the engines say ───────────────┴─► Planner ──► find and lose, with the fleet

Whatever changes wakes one loop, which makes the whole plan anew and gives the fleet the difference.  It does so from
time to time by itself too, for the fleet changes under it: what somebody names by hand is theirs, and ours again when
they have unregistered it.

Invariant: the fleet's found sources are those of the pods that the API server last told of; while it is away they
stay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from kvindexer.errors import ConflictError, KvIndexerError, RequestError
from kvindexer.events.discovery.collection import Collection
from kvindexer.events.discovery.engines import Engines
from kvindexer.events.discovery.plan import Chosen, Plan, Planner
from kvindexer.events.discovery.pods import Pod
from kvindexer.events.discovery.pools import PoolPods
from kvindexer.events.discovery.selectors import Requirement, parse_selector
from kvindexer.events.discovery.watching import Keeping, Tally, Watched
from kvindexer.events.finding import Findable, FindingFigures, FindingProblem
from kvindexer.settings.discovering import Discovering
from kvindexer.types import SourceSpec

_log = logging.getLogger(__name__)

EVERY_S: Final = 5.0
"""How often the fleet is looked at when nothing else happens."""
MAX_PROBLEMS: Final = 1000
"""Most problems that are remembered and told at once."""


class Cluster(Protocol):
    """A way to one API server; see `discovery.cluster`."""

    namespace: str

    def pods(self, namespace: str, selector: Sequence[Requirement]) -> Collection[Pod]:
        """The pods of a namespace that have these labels."""

    def pools(self, namespace: str, name: str) -> Sequence[Collection[Any]]:
        """The InferencePool of a name, of each kind that there may be."""

    async def close(self) -> None:
        """Hang up."""


class KubernetesFinder:
    """See the module's head; `Finder` of a fleet."""

    def __init__(self, rules: Discovering, cluster: Cluster) -> None:
        self._rules = rules
        self._cluster = cluster
        self._wake = asyncio.Event()
        self._engines = Engines(rules.discovery_timeout_s, self._wake.set)
        self._tally = Tally()
        self._keeping = Keeping(rules.discovery_retry_max_s, self._tally, self._wake.set)
        self._watched: list[Watched[Pod]] = []
        self._pools: list[PoolPods] = []
        self._planner = Planner(rules)
        self._plan = Plan({}, {}, {}, [], 0)
        self._refused: dict[str, FindingProblem] = {}
        self._told: set[FindingProblem] = set()
        self._problems: list[FindingProblem] = []
        self._informed = False
        self._followed = 0

    @asynccontextmanager
    async def running(self, fleet: Findable) -> AsyncIterator[None]:
        """See `Finder.running`."""
        rules = self._rules
        namespaces = rules.discovery_namespaces or (self._cluster.namespace,)
        selector = parse_selector(rules.discovery_selector)
        for namespace in namespaces if selector else ():
            pods = self._cluster.pods(namespace, selector)
            where = f"pods of namespace {namespace}"
            self._watched.append(Watched(pods, where, self._keeping))
        for pool in rules.discovery_pools:
            own, _, name = pool.rpartition("/")
            self._pools += [self._pool(namespace, name) for namespace in ([own] if own else namespaces)]
        loops = [*(one.run() for one in self._watched), *(one.run() for one in self._pools), self._loop(fleet)]
        tasks = [asyncio.create_task(loop, name=f"kvindexer-discovery {n}") for n, loop in enumerate(loops)]
        shown = [
            *([rules.discovery_selector] if selector else []),
            *(f"pool {pool}" for pool in rules.discovery_pools),
        ]
        _log.info("discovery: looking for pods of %s in %s", "; ".join(shown), ", ".join(namespaces))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._engines.close()
            await self._cluster.close()

    def _pool(self, namespace: str, name: str) -> PoolPods:
        def pods(selector: Sequence[Requirement]) -> Collection[Pod]:
            return self._cluster.pods(namespace, selector)

        kinds = self._cluster.pools(namespace, name)
        where = f"pool {namespace}/{name}"
        return PoolPods(kinds, pods, where, self._keeping)

    @property
    def informed(self) -> bool:
        """See `Finder.informed`."""
        return self._informed

    def figures(self) -> FindingFigures:
        """See `Finder.figures`."""
        lists = list(self._lists())
        now = time.monotonic()
        silent_s = [now - one.contact_at for one in lists if one.contact_at is not None]
        return FindingFigures(
            kind="kubernetes",
            informed=self._informed,
            pods=self._plan.pods,
            followed=self._followed,
            waiting=self._engines.waiting,
            relists=self._tally.relists,
            errors=self._tally.errors,
            contact_s=max(silent_s) if len(silent_s) == len(lists) and lists else None,
            problems=self._problems,
        )

    def _lists(self) -> Iterator[Watched[Any]]:
        yield from self._watched
        for pool in self._pools:
            yield from pool.watched()

    async def _loop(self, fleet: Findable) -> None:
        while True:
            self._wake.clear()
            try:
                self._adopt(fleet)
            except Exception as error:  # noqa: BLE001 - one slip of ours must not end the search; it is logged
                _log.exception("discovery: the pods could not be made sources")
                self._problems = [FindingProblem("unexpected", "all", type(error).__name__, "see the log")]
            try:
                async with asyncio.timeout(EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _adopt(self, fleet: Findable) -> None:
        """Make the fleet's found sources those of the pods."""
        chosen = [Chosen(tuple(one.objects.values())) for one in self._watched]
        plan = self._planner.plan([*chosen, *(pool.chosen for pool in self._pools)], self._engines.answers)
        self._plan = plan
        self._engines.ask(plan.questions)
        for endpoint, spec in list(fleet.found.items()):
            wanted = plan.wanted.get(endpoint)
            if wanted is not spec and wanted != spec:
                _log.info("discovery: %s of pod %s is over (%s)", spec.life, _pod_of(spec), endpoint)
                fleet.lose(endpoint)
        self._refused = {}
        for endpoint, spec in plan.wanted.items():
            if endpoint not in fleet.found:
                try:
                    fleet.find(spec)
                except KvIndexerError as error:
                    self._refused[endpoint] = _refusal(plan.owners[endpoint], error)
                else:
                    _log.info("discovery: %s of pod %s is followed (%s)", spec.life, plan.owners[endpoint], endpoint)
        self._followed = len({plan.owners[endpoint] for endpoint in fleet.found})
        self._informed = self._informed or (self._all_listed() and self._engines.tried)
        self._tell()

    def _all_listed(self) -> bool:
        return all(one.listed for one in self._watched) and all(one.listed for one in self._pools)

    def _tell(self) -> None:
        """Say what is wrong, each thing once for as long as it lasts."""
        problems = [*self._of_lists(), *self._plan.problems, *self._refused.values(), *self._engines.problems()]
        self._problems = problems[:MAX_PROBLEMS]
        now = set(self._problems)
        for one in self._problems:
            if one not in self._told and one.reason not in _SAID_ELSEWHERE:
                level = logging.WARNING if one.serious else logging.INFO
                _log.log(level, "discovery: %s: %s: %s; %s", one.where, one.reason, one.message, one.hint)
        self._told = now

    def _of_lists(self) -> Iterator[FindingProblem]:
        yield from (one.problem for one in self._watched if one.problem is not None)
        for pool in self._pools:
            yield from pool.problems()
        names = {pool.where.rpartition("/")[2] for pool in self._pools if not pool.missing}
        for pool in self._pools:
            if pool.missing and pool.where.rpartition("/")[2] not in names:
                hint = "does it exist, in this namespace? kubectl get inferencepools"
                yield FindingProblem("no_pool", pool.where, "there is no such InferencePool", hint)
        if self._all_listed() and self._plan.pods == 0:
            chosen = self._rules.discovery_selector or "the pools' selectors"
            hint = "is that the label of the engines' pods, and are these their namespaces?"
            yield FindingProblem("no_pods", "all", f"no pod has the labels {chosen}", hint, serious=False)


_SAID_ELSEWHERE: Final = frozenset({
    "engine_silent", "unreachable", "timeout", "tls", "unauthorized", "forbidden", "not_found", "bad_request",
    "refused", "server_error", "credentials", "unreadable", "cut",
})  # fmt: skip
"""What whoever found it has logged already."""


def _pod_of(spec: SourceSpec) -> str:
    return next((name for name in spec.aliases if "/" in name), spec.instance)


def _refusal(owner: str, error: KvIndexerError) -> FindingProblem:
    hint = error.hint if isinstance(error, RequestError) else ""
    if isinstance(error, ConflictError):
        return FindingProblem("registered", owner, str(error), hint, serious=False)
    return FindingProblem("not_followed", owner, str(error), hint)
