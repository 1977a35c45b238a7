"""GET /v1/sources: everything worth knowing of each source, for operators and for the demo's table.

Nothing secret: no salts, no tokens, no hashes.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from fastapi import APIRouter
from fastapi.responses import Response
from msgspec import Meta

from kvindexer.access.identity import sees, sees_all, tenant_of
from kvindexer.api.discovered import DiscoveryState, discovery_state
from kvindexer.api.fleet import Fleet, SourceReport
from kvindexer.api.metrics import Metrics
from kvindexer.api.openapi import answer_body
from kvindexer.api.parameters import ChosenName
from kvindexer.api.sizes import BlockSizes
from kvindexer.index.seam import Index

_encode = msgspec.json.Encoder().encode


class BlocksByTier(msgspec.Struct):
    """Entries of a source."""

    gpu: int
    cpu: int
    disk: int
    remote: int


class StoredEntry(msgspec.Struct):
    """What the durable copy held of a source when it was last looked at."""

    epoch: int
    seq: int | None
    entries: int


class FeedbackFigures(msgspec.Struct):
    """What /v1/feedback told of the source: how predictions came out, and the tokens of all of them together."""

    exact: int
    over: int
    under: int
    predicted_tokens: int
    cached_tokens: int
    doubts: Annotated[int, Meta(description="How often the source was wrong too often, and was verified anew.")]


class SourceEntry(msgspec.Struct):
    """One source: where it is, how far it can be trusted and why, what it has sent and what it holds."""

    instance: str
    source: str
    endpoint: str
    replay: str | None
    model: str
    type: str
    rank: int
    tenant: str
    block_size: int
    block_sizes: Annotated[list[int], Meta(description="The registered one, and those that events have named.")]
    aliases: Annotated[list[str], Meta(description="Further names of the instance.")]
    state: str
    why: str
    sound: bool
    complete: bool
    epoch: int
    seq: int | None
    lag_ms: float
    last_event_s: float | None
    batches: int
    gaps: int
    replays: int
    blocks: BlocksByTier
    orphans: int
    poison: int
    stored: StoredEntry | None
    feedback: FeedbackFigures


class Totals(msgspec.Struct):
    """Counters of the whole service since its start, and what its index holds now."""

    events: Annotated[int | None, Meta(description="Null for callers that are bound to a tenant.")]
    queries: int | None
    blocks: int


class SourcesAnswer(msgspec.Struct):
    """All sources, or those that were asked for."""

    sources: list[SourceEntry]
    totals: Totals
    discovery: DiscoveryState


ANSWERS: Final = (SourcesAnswer,)


def routes(fleet: Fleet, metrics: Metrics, index: Index) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["Operation"])

    @router.get("/v1/sources", summary="State of all sources", responses=answer_body(SourcesAnswer))
    async def sources(tenant: ChosenName = None, model: ChosenName = None, instance: ChosenName = None) -> Response:
        tenant = tenant_of(tenant)
        reports = fleet.reports()
        sizes = BlockSizes(index)
        entries = [
            _entry(report, sizes.of(report.spec))
            for report in reports
            if tenant in (None, report.spec.tenant)
            and model in (None, report.spec.model)
            and instance in (None, report.spec.instance)
        ]
        held = sum(sum(report.blocks) for report in reports if sees(report.spec.tenant))
        totals = Totals(metrics.events, metrics.queries, held) if sees_all() else Totals(None, None, held)
        discovery = discovery_state(fleet.finding(), None if sees_all() else 0)
        answer = SourcesAnswer(entries, totals, discovery)
        return Response(_encode(answer), media_type="application/json")

    return router


def _entry(report: SourceReport, block_sizes: list[int]) -> SourceEntry:
    spec = report.spec
    return SourceEntry(
        instance=spec.instance,
        source=report.source,
        endpoint=spec.endpoint,
        replay=spec.replay,
        model=spec.model,
        type=spec.type,
        rank=spec.rank,
        tenant=spec.tenant,
        block_size=spec.block_size,
        block_sizes=block_sizes,
        aliases=list(spec.aliases),
        state=report.state,
        why=report.why,
        sound=report.sound,
        complete=report.complete,
        epoch=report.epoch,
        seq=report.seq,
        lag_ms=report.lag_ms,
        last_event_s=report.last_event_s,
        batches=report.batches,
        gaps=report.gaps,
        replays=report.replays,
        blocks=BlocksByTier(*report.blocks),
        orphans=report.orphans,
        poison=report.poison,
        stored=None if report.stored is None else StoredEntry(*report.stored),
        feedback=FeedbackFigures(*report.accuracy),
    )
