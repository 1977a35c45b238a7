"""The HTTP application, put together: from the outside in.

Shield            every request gets an answer in the one error shape, and is counted
Doors             only callers that may, and not too often; not there while everybody may do everything
ConcurrencyLimit  not too many at once
BodyReader        not too large, not too slow; inside, bodies are complete
HotRoutes         /v1/match, /v1/match/batch, /v1/keys, /query, /query_by_hash, /score_...: bytes in, bytes out
FastAPI           everything else, and the OpenAPI document of all
"""

from __future__ import annotations

from time import monotonic
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kvindexer import __version__
from kvindexer.access.opening import Access
from kvindexer.access.rates import Rates
from kvindexer.api import (
    changes,
    docs_page,
    explain,
    feedback,
    health,
    heat,
    locate,
    plan,
    rfc_sources,
    routed,
    sources,
    tiers,
)
from kvindexer.api.body import BodyReader
from kvindexer.api.doors import Doors
from kvindexer.api.errors import error_body, error_headers, internal_error, method_not_allowed
from kvindexer.api.fleet import Fleet
from kvindexer.api.hot import CallHandler, Handler, HotRoutes
from kvindexer.api.keys import KeysRoute
from kvindexer.api.limits import ConcurrencyLimit
from kvindexer.api.lookup import KnownModels
from kvindexer.api.match import MatchRoutes
from kvindexer.api.matching import Matcher
from kvindexer.api.metrics import Metrics
from kvindexer.api.openapi import HotRoute, describe
from kvindexer.api.registration import Registration, Unregistration
from kvindexer.api.rfc_query import QueryRoutes
from kvindexer.api.rfc_schemas import DynamoAnswer, HashQuery, MooncakeFigures, TokenQuery
from kvindexer.api.schemas import (
    BatchAnswer,
    BatchPrompt,
    BatchRequest,
    KeysAnswer,
    KeysRequest,
    MatchAnswer,
    MatchRequest,
)
from kvindexer.api.score import ScoreChatRequest, ScoreRequest, ScoreRoutes, Scores
from kvindexer.api.shield import Shield
from kvindexer.api.text import TextPrompts
from kvindexer.errors import RequestError
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.tiering.heat import HeatCounts
from kvindexer.tiering.speculative import Speculation
from kvindexer.tokenization.texts import Texts
from kvindexer.watching.requests import RequestLog

_RFC_ANSWERS: Final = (dict[str, dict[str, MooncakeFigures]], DynamoAnswer)
_RFC_QUERY: Final = (
    "With `model` the answer has Mooncake's form, tenant -> instance -> figures, each tier by itself; with "
    "`model_name` it has Dynamo's, each tier with the nearer ones.  All figures are tokens; instances that hold "
    "nothing are not listed."
)
_SCORES: Final = (
    "As the example service of llm-d answers: instance -> leading blocks that it holds, each times the weight of the "
    "nearest tier that it lies on.  Instances that hold nothing are not listed."
)
_HOT: Final = (
    HotRoute(
        "/v1/match",
        "Who holds how long a prefix of a prompt?",
        "Instances, best first: by cached tokens, then by matched tokens, by score, and by name; with `order: score` "
        "by score before all, with `order: expected` by what is on its way.  Each shows its best rank.",
        "Queries",
        MatchRequest,
        (MatchAnswer,),
        msgpack=True,
    ),
    HotRoute(
        "/v1/match/batch",
        "The same for many prompts at once",
        "`prompts` differ, everything else is the same for all of them.  What is wrong with one prompt is told in "
        "its result; what is wrong with the rest of the request, or is too much in all, is an error of the whole.",
        "Queries",
        BatchRequest,
        (BatchAnswer,),
        msgpack=True,
    ),
    HotRoute(
        "/v1/keys",
        "The block keys of a prompt",
        "For callers that ask about a prompt often: `keys` or `keys_b64` may be given to /v1/match instead of the "
        "tokens, LoRA, salt and multimodal items that they were made of.",
        "Queries",
        KeysRequest,
        (KeysAnswer,),
        msgpack=True,
    ),
    explain.ROUTE,
    routed.ROUTE,
    feedback.ROUTE,
    locate.ROUTE,
    plan.ROUTE,
    HotRoute("/query", "Prefix query by tokens", _RFC_QUERY, "RFC #1403", TokenQuery, _RFC_ANSWERS),
    HotRoute("/query_by_hash", "Prefix query by hashes", _RFC_QUERY, "RFC #1403", HashQuery, _RFC_ANSWERS),
    HotRoute("/score_completions", "Scores for a prompt", _SCORES, "llm-d", ScoreRequest, (Scores,), msgpack=True),
    HotRoute(
        "/score_chat_completions", "Scores for a chat", _SCORES, "llm-d", ScoreChatRequest, (Scores,), msgpack=True
    ),
)


_DESCRIPTION: Final = (
    "Lengths are in tokens, times in the unit that ends a field's name.  Every error has the form "
    '`{"error": {"code", "message", "hint"}}`, in JSON.  Of equal keys in an object the last one counts.  Routes '
    "that take msgpack read a body as such if its content type says so, and answer in it if `Accept` names it; every "
    "other content type is taken for JSON."
)


def create_app(
    settings: Settings,
    index: Index,
    fleet: Fleet,
    metrics: Metrics,
    texts: Texts | None = None,
    *,
    speculation: Speculation | None = None,
    access: Access | None = None,
) -> ASGIApp:
    """The ASGI application; it uses index, fleet and the like in the event loop's thread and owns none of them.

    `speculation` is the overlay that the fleet tells of events; `access` says who may do what, None: everybody all.
    """
    speculation = speculation or Speculation(settings.max_speculative_blocks)
    counts = HeatCounts(settings.max_heat_blocks, settings.heat_half_life_s, settings.heat_blocks_per_s, monotonic)
    metrics.watch(fleet)
    metrics.watch_tiering(speculation, counts)
    models = KnownModels(fleet)
    queries = QueryRoutes(settings, index, models, metrics, heat=counts)
    matcher = Matcher(settings, index, fleet, models, metrics, heat=counts, speculation=speculation)
    prompts = TextPrompts(texts or Texts({}))
    matches = MatchRoutes(settings, matcher, prompts)
    scores = ScoreRoutes(settings, index, models, metrics, prompts, heat=counts)
    handlers: dict[str, Handler] = {"/query": queries.by_tokens, "/query_by_hash": queries.by_hash}
    calls: dict[str, CallHandler] = {
        "/v1/match": matches.one,
        "/v1/match/batch": matches.batch,
        "/v1/keys": KeysRoute(settings, matcher, prompts),
        "/v1/explain": explain.ExplainRoute(settings, index, fleet, matcher=matcher, texts=prompts),
        "/v1/routed": routed.RoutedRoute(settings, fleet, matcher, prompts, speculation),
        "/v1/feedback": feedback.FeedbackRoute(fleet, metrics),
        "/v1/blocks/locate": locate.LocateRoute(settings, index, fleet, models),
        "/v1/offload/plan": plan.PlanRoute(settings, index, fleet, counts),
        "/score_completions": scores.completions,
        "/score_chat_completions": scores.chats,
    }
    rest = FastAPI(
        title="kvindexer",
        version=__version__,
        summary="Which inference pod holds which prompt prefix, on which tier, right now.",
        description=_DESCRIPTION,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; ours has none
        redoc_url=None,
    )
    routers = (
        rfc_sources.routes(fleet, rfc_sources.Bounds(settings.auth_tenant_endpoints, settings.bind_endpoints)),
        sources.routes(fleet, metrics, index),
        tiers.routes(fleet),
        heat.routes(heat.HeatViews(index, counts, models)),
        changes.routes(settings, index, fleet, models, metrics),
        health.routes(fleet, metrics, tuple if access is None else access.problems),
        docs_page.routes(),
    )
    for router in routers:
        rest.include_router(router)
    _answer_errors(rest)
    describe(
        rest,
        _HOT,
        (
            *(BatchPrompt, Registration, Unregistration, locate.Holder),
            *(
                *rfc_sources.ANSWERS,
                *sources.ANSWERS,
                *tiers.ANSWERS,
                *changes.ANSWERS,
                *heat.ANSWERS,
                *health.ANSWERS,
            ),
        ),
    )
    app: ASGIApp = HotRoutes(handlers, calls, rest)
    app = BodyReader(app, settings.max_body_bytes, settings.receive_timeout_s)
    app = limit = ConcurrencyLimit(app, settings.max_concurrent_requests)
    metrics.watch_bounds(settings.max_entries, lambda: limit.figures)
    rates = None if settings.max_requests_per_s is None else Rates(settings.max_requests_per_s, settings.max_callers)
    guard = None if access is None else access.guard
    if guard is not None or rates is not None:
        app = Doors(
            app,
            guard,
            rates,
            max_body_bytes=settings.max_body_bytes,
            receive_timeout_s=settings.receive_timeout_s,
        )
    paths = {route.path for router in routers for route in router.routes if isinstance(route, APIRoute)}
    return Shield(app, metrics, paths.union(handlers, calls), RequestLog(settings))


def _answer_errors(app: FastAPI) -> None:
    """Give FastAPI's own errors our shape."""

    async def refused(_: Request, error: Exception) -> Response:
        return _response(error if isinstance(error, RequestError) else internal_error())

    async def http(_: Request, error: Exception) -> Response:
        headers = getattr(error, "headers", None) or {}
        match getattr(error, "status_code", 500):
            case 404:
                return _response(RequestError("not_found", "no such route", "see /docs for the routes", status=404))
            case 405:
                return _response(method_not_allowed(headers.get("allow", headers.get("Allow", "another method"))))
            case status:
                return _response(RequestError("invalid_request", "the request can't be read", status=status))

    async def invalid(_: Request, error: Exception) -> Response:
        wrong = error.errors() if isinstance(error, RequestValidationError) else []
        places = [
            ".".join(map(str, item["loc"])) + (" (missing)" if item["type"] == "missing" else "") for item in wrong
        ]
        message = f"not usable: {', '.join(places[:5])}"
        return _response(RequestError("invalid_request", message, "see /docs for the parameters", status=422))

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, refused)


def _response(error: RequestError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(error_body(error), error.status, headers, media_type="application/json")
