"""POST /register and /unregister, GET /workers of RFC #1403: which publishers to follow, in both dialects.

An integer `instance_id` is Dynamo's way and is answered in Dynamo's way; a string is Mooncake's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvindexer.access.identity import FORBIDDEN, caller, sees, tenant_of
from kvindexer.api.decoding import reader
from kvindexer.api.fleet import Fleet, SourceReport
from kvindexer.api.lookup import tenant_named
from kvindexer.api.openapi import answer_body, request_body
from kvindexer.api.parameters import ChosenName
from kvindexer.api.registration import Registration, Unregistration, source_of, type_named
from kvindexer.api.rfc_schemas import one_of
from kvindexer.errors import ConflictError, RequestError
from kvindexer.types import SourceSpec

_STATUS: Final = {"live": "active", "syncing": "pending", "stale": "stale", "gone": "failed"}
"""Our states in Dynamo's words, as far as it has some."""
_WORST_FIRST: Final = ("failed", "stale", "pending", "active")

_encode = msgspec.json.Encoder().encode
_read_registration = reader(Registration)
_read_unregistration = reader(Unregistration)


class Registered(msgspec.Struct, omit_defaults=True):
    """The publisher is followed; `instance_id` only in Mooncake's dialect (200), Dynamo's is 201."""

    status: str
    instance_id: str | None = None


class Unregistered(msgspec.Struct, omit_defaults=True):
    """The publishers are forgotten; which ones only in Mooncake's dialect: instance|tenant|rank."""

    status: str
    removed_instances: list[str] | None = None


class Listener(msgspec.Struct):
    """Where one rank publishes, and whether it is heard."""

    endpoint: str
    status: str


class Worker(msgspec.Struct):
    """An instance with one model, tenant, type and block size; fields of both dialects."""

    instance_id: int | str
    source: str
    type: str
    status: str
    model_name: str
    modelname: str
    routing_group: str
    tenant_id: str
    block_size: int
    endpoints: dict[str, str]
    listeners: dict[str, Listener]


ANSWERS: Final = (Registered, Unregistered, Worker)


class Bounds(NamedTuple):
    """What callers that are bound to a tenant may register."""

    endpoints: Mapping[str, Sequence[str]] = {}
    """Patterns by tenant; of a tenant without some, anything."""
    shared: Collection[str] = ()
    """Endpoints that publishers of all tenants dial in to."""


def routes(fleet: Fleet, bounds: Bounds = Bounds()) -> APIRouter:  # noqa: B008 - it is immutable
    """The three routes."""
    router = APIRouter(tags=["RFC #1403"])

    @router.post(
        "/register",
        summary="Follow a publisher",
        openapi_extra=request_body(Registration),
        responses=answer_body(Registered, 200, 201),
    )
    async def register(request: Request) -> Response:
        body = _read_registration(await request.body())
        spec = source_of(body)
        _check_bounds(fleet, spec, bounds)
        try:
            fleet.register(spec)
        except ConflictError:
            if any(other.endpoint == spec.endpoint and not sees(other.tenant) for other in fleet.specs()):
                raise _taken() from None
            raise
        if isinstance(body.instance_id, int):
            return _json(Registered("ok"), 201)
        return _json(Registered("registered successfully", spec.instance))

    @router.post(
        "/unregister",
        summary="Forget publishers",
        openapi_extra=request_body(Unregistration),
        responses=answer_body(Unregistered),
    )
    async def unregister(request: Request) -> Response:
        body = _read_unregistration(await request.body())
        instance = str(body.instance_id)
        of_dynamo = isinstance(body.instance_id, int)
        named = one_of(body, "tenant_id", "routing_group")
        tenant = tenant_of(named) if of_dynamo else tenant_named(named)
        model = one_of(body, "model", "modelname", "model_name")
        source_type = type_named(body.type) if body.type else None
        removed = fleet.unregister(instance, model=model, tenant=tenant, rank=body.dp_rank, source_type=source_type)
        if not removed:
            raise RequestError(
                "unknown_instance",
                f"no source of instance {instance!r} fits",
                "GET /workers lists what is registered; model, tenant and rank must fit too, if given",
                status=404,
            )
        if of_dynamo:
            return _json(Unregistered("ok"))
        names = [f"{spec.instance}|{spec.tenant}|{spec.rank}" for spec in removed]
        return _json(Unregistered("unregistered successfully", names))

    @router.get("/workers", summary="Registered instances", responses=answer_body(list[Worker]))
    async def workers(
        model_name: ChosenName = None, routing_group: ChosenName = None, tenant_id: ChosenName = None
    ) -> Response:
        tenant = tenant_of(routing_group or tenant_id)
        listed = [
            report
            for report in fleet.reports()
            if model_name in (None, report.spec.model) and tenant in (None, report.spec.tenant)
        ]
        return _json(_workers(listed))

    return router


def _check_bounds(fleet: Fleet, spec: SourceSpec, bounds: Bounds) -> None:
    """Raise RequestError for what a caller that is bound to a tenant may not register.

    What is said of another tenant's sources is that they are there, and nothing else.
    """
    asking = caller()
    if asking is None or asking.grant.tenant is None:
        return
    allowed = bounds.endpoints.get(asking.grant.tenant)
    for endpoint in (spec.endpoint, spec.replay):
        if endpoint and allowed is not None and not any(fnmatchcase(endpoint, pattern) for pattern in allowed):
            raise RequestError(
                "endpoint_not_allowed",
                f"endpoint {endpoint!r} is none of this caller's tenant",
                f"allowed are {', '.join(allowed)} (setting auth_tenant_endpoints)",
                status=FORBIDDEN,
            )
    ours = {endpoint for endpoint in (spec.endpoint, spec.replay) if endpoint and endpoint not in bounds.shared}
    for other in fleet.specs():
        if sees(other.tenant):
            continue
        if other.instance == spec.instance or ours.intersection((other.endpoint, other.replay)):
            raise _taken()


def _taken() -> ConflictError:
    return ConflictError(
        "the instance or its endpoint is registered already, not by this caller's tenant",
        "give the instance another name, or ask whoever runs the service",
    )


def _workers(reports: list[SourceReport]) -> list[Worker]:
    """One entry an instance, model, tenant, type and block size, with the endpoint and state of each rank."""
    entries: dict[tuple[object, ...], Worker] = {}
    for report in reports:
        spec = report.spec
        key = (spec.instance, spec.model, spec.tenant, spec.type, spec.block_size)
        worker = entries.get(key)
        if worker is None:
            worker = entries[key] = Worker(
                instance_id=_instance_id(spec.instance),
                source="zmq",
                type=spec.type,
                status="",
                model_name=spec.model,
                modelname=spec.model,
                routing_group=spec.tenant,
                tenant_id=spec.tenant,
                block_size=spec.block_size,
                endpoints={},
                listeners={},
            )
        worker.endpoints[str(spec.rank)] = spec.endpoint
        worker.listeners[str(spec.rank)] = Listener(spec.endpoint, _STATUS[report.state])
    for worker in entries.values():
        statuses = {listener.status for listener in worker.listeners.values()}
        worker.status = next(status for status in _WORST_FIRST if status in statuses)
    return list(entries.values())


def _instance_id(instance: str) -> int | str:
    """Dynamo's clients expect the integers that they registered."""
    number = int(instance) if instance.isascii() and instance.isdecimal() and len(instance) <= len(str(2**64)) else -1
    return number if str(number) == instance and number < 2**64 else instance


def _json(content: object, status: int = 200) -> Response:
    return Response(_encode(content), status, media_type="application/json")
