"""GET /health, /ready and /metrics: what probes and Prometheus ask.

/health is about truth, not about restarts: it is 200 as long as the process serves, and says `degraded` when a
source is not live or not sound, or the durable copy has a problem.  /ready says whether to send queries here: 503
until every source known at start is in sync or has had its time, 200 from then on until the process is told to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from kvindexer.access.identity import sees_all
from kvindexer.access.kept import Trouble
from kvindexer.api.discovered import DiscoveryState, discovery_state, serious
from kvindexer.api.fleet import Fleet, SourceReport
from kvindexer.api.metrics import CONTENT_TYPE, STATES, Metrics
from kvindexer.api.openapi import answer_body

MAX_PROBLEMS: Final = 20
"""Sources, and problems of the store, that /health names; /v1/sources has all sources."""

_encode = msgspec.json.Encoder().encode


class Problem(msgspec.Struct):
    """A source that is not as it should be."""

    source: str
    instance: str
    state: str
    sound: bool
    why: str


class StoreTrouble(msgspec.Struct):
    """Why the durable copy, or what decides about access, is not as it should be, and what to change."""

    reason: str
    message: str
    hint: str


class StoreHealth(msgspec.Struct):
    """The durable copy of the index; queries are answered without it."""

    kind: str
    reachable: bool
    replicas: int
    problems: list[StoreTrouble]


class HealthAnswer(msgspec.Struct):
    """`ok`, or `degraded` with what is wrong; callers who are not known, or of one tenant, are told no details."""

    status: str
    ready: bool
    sources: dict[str, int]
    unsound: int
    incomplete: int
    problems: list[Problem]
    store: StoreHealth
    access: list[StoreTrouble]
    discovery: DiscoveryState


class ReadyAnswer(msgspec.Struct):
    """Whether queries are answered from a warm index."""

    ready: bool


ANSWERS: Final = (HealthAnswer, ReadyAnswer)


def routes(fleet: Fleet, metrics: Metrics, access: Callable[[], Sequence[Trouble]] = tuple) -> APIRouter:
    """The three routes; `access` tells what is wrong with tokens and certificates."""
    router = APIRouter(tags=["Operation"])

    @router.get("/health", summary="Is all well?", responses=answer_body(HealthAnswer))
    async def health() -> Response:
        return Response(_encode(_health(fleet, access())), media_type="application/json")

    @router.get("/ready", summary="Is the index warm?", responses=answer_body(ReadyAnswer, 200, 503))
    async def ready() -> Response:
        return Response(_encode(ReadyAnswer(fleet.ready)), 200 if fleet.ready else 503, media_type="application/json")

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    return router


def _health(fleet: Fleet, access: Sequence[Trouble]) -> HealthAnswer:
    reports = fleet.reports()
    states = Counter(report.state for report in reports)
    problems = [report for report in reports if report.state != "live" or not report.sound]
    store, troubles, finding = fleet.store(), fleet.problems(), fleet.finding()
    most = MAX_PROBLEMS if sees_all() else 0
    return HealthAnswer(
        status="degraded" if problems or troubles or access or serious(finding.problems) else "ok",
        ready=fleet.ready,
        sources={state: states[state] for state in STATES},
        unsound=sum(not report.sound for report in reports),
        incomplete=sum(not report.complete for report in reports),
        problems=[_problem(report) for report in problems[:most]],
        store=StoreHealth(
            kind=store.kind,
            reachable=store.reachable,
            replicas=store.replicas,
            problems=[StoreTrouble(*trouble) for trouble in troubles[:most]],
        ),
        access=[StoreTrouble(*trouble) for trouble in access[:most]],
        discovery=discovery_state(finding, most),
    )


def _problem(report: SourceReport) -> Problem:
    return Problem(report.source, report.spec.instance, report.state, report.sound, report.why)
