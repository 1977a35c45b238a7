"""POST /v1/feedback: what an engine reported as cached, against what was predicted for it.

body ─► FeedbackRequest ─► Fleet.feedback ─► each source's figures, and its verdict (`tiering.feedback`)
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.lookup import tenant_named
from kvindexer.api.metrics import Metrics
from kvindexer.api.openapi import HotRoute
from kvindexer.api.schemas import Name, Text
from kvindexer.errors import RequestError
from kvindexer.tiering.feedback import Outcome, outcome_of

MAX_REMEMBERED: Final = 8192
"""Most request ids that are remembered, so that a report which is sent again does not count again."""

_Count = Annotated[int, Meta(ge=0, le=2**40)]


class FeedbackRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What one request's prefill has shown."""

    instance: Annotated[Name, Meta(description="Its id.")]
    predicted_tokens: Annotated[_Count, Meta(description="`cached_tokens` of the match that it was routed by.")]
    cached_tokens: Annotated[_Count, Meta(description="What the engine reported as cached.")]
    model: Annotated[Name, Meta(description="Needed if the instance serves several.")] | None = None
    tenant: Text | None = None
    rank: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Only sources of this rank.")] | None = None
    request_id: Annotated[Name, Meta(description="Of equal ids of an instance the first one counts.")] | None = None


class FeedbackAnswer(msgspec.Struct):
    """How the prediction came out."""

    instance: str
    outcome: Annotated[Outcome, Meta(description="`over`: more was predicted than cached.")]
    counted: Annotated[bool, Meta(description="False: this request id was there before.")]
    doubted: Annotated[
        int, Meta(description="Sources that have now been wrong too often and are verified anew; mostly 0.")
    ]


ROUTE: Final = HotRoute(
    "/v1/feedback",
    "What an engine reported as cached",
    "Tell each prediction and what became of it.  A source whose claims are wrong again and again loses its flags "
    "and is verified anew; GET /v1/sources has the figures.",
    "Queries",
    FeedbackRequest,
    (FeedbackAnswer,),
    msgpack=True,
)

_read: Final = {form: reader(FeedbackRequest, form) for form in FORMS}


class FeedbackRoute:
    """The route, as a function of the call."""

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._seen: dict[tuple[str, str, str], None] = {}

    def __call__(self, call: Call) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, form=call.form, settings="the number of fields")
        request = _read[call.form](call.body)
        tenant = tenant_named(request.tenant)
        name = None if request.request_id is None else (tenant, request.instance, request.request_id)
        if name is not None and name in self._seen:
            outcome = outcome_of(request.predicted_tokens, request.cached_tokens)
            return call.answer.encode(FeedbackAnswer(request.instance, outcome, counted=False, doubted=0))
        reports = self._fleet.feedback(
            request.instance,
            request.predicted_tokens,
            request.cached_tokens,
            tenant=tenant,
            model=request.model,
            rank=request.rank,
        )
        if not reports:
            raise RequestError(
                "unknown_instance",
                "no engine of this instance, model and rank is registered",
                "see /v1/sources for those that are registered",
                status=404,
            )
        if name is not None:
            if len(self._seen) >= MAX_REMEMBERED:
                del self._seen[next(iter(self._seen))]
            self._seen[name] = None
        outcome, doubted = reports[0].outcome, sum(report.doubt for report in reports)
        self._metrics.feedback(outcome, request.predicted_tokens, request.cached_tokens, doubted)
        return call.answer.encode(FeedbackAnswer(request.instance, outcome, counted=True, doubted=doubted))
