"""POST /register and /unregister, GET /workers of RFC #1403: which publishers to follow, in both dialects.

An integer `instance_id` is Dynamo's way and is answered in Dynamo's way; a string is Mooncake's.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvindexer.api.decoding import reader
from kvindexer.api.fleet import Fleet, SourceReport
from kvindexer.api.lookup import DEFAULT_TENANT
from kvindexer.api.openapi import request_body
from kvindexer.api.registration import Registration, Unregistration, source_of
from kvindexer.api.schemas import one_of
from kvindexer.errors import RequestError

_STATUS: Final = {"live": "active", "syncing": "pending", "stale": "stale", "gone": "failed"}
"""Our states in Dynamo's words, as far as it has some."""

_encode = msgspec.json.Encoder().encode
_read_registration = reader(Registration)
_read_unregistration = reader(Unregistration)


def routes(fleet: Fleet) -> APIRouter:
    """The three routes."""
    router = APIRouter(tags=["RFC #1403"])

    @router.post("/register", summary="Follow a publisher", openapi_extra=request_body(Registration))
    async def register(request: Request) -> Response:
        body = _read_registration(await request.body())
        spec = source_of(body)
        fleet.register(spec)
        if isinstance(body.instance_id, int):
            return _json({"status": "ok"}, 201)
        return _json({"status": "registered successfully", "instance_id": spec.instance})

    @router.post("/unregister", summary="Forget publishers", openapi_extra=request_body(Unregistration))
    async def unregister(request: Request) -> Response:
        body = _read_unregistration(await request.body())
        instance = str(body.instance_id)
        of_dynamo = isinstance(body.instance_id, int)
        tenant = one_of(body, "tenant_id", "routing_group") or (None if of_dynamo else DEFAULT_TENANT)
        model = one_of(body, "model", "modelname", "model_name")
        removed = fleet.unregister(instance, model=model, tenant=tenant, rank=body.dp_rank)
        if not removed:
            raise RequestError(
                "unknown_instance",
                f"no source of instance {instance!r} fits",
                "GET /workers lists what is registered; model, tenant and rank must fit too, if given",
                status=404,
            )
        if of_dynamo:
            return _json({"status": "ok"})
        names = [f"{spec.instance}|{spec.tenant}|{spec.rank}" for spec in removed]
        return _json({"status": "unregistered successfully", "removed_instances": names})

    @router.get("/workers", summary="Registered instances")
    async def workers(
        model_name: str | None = None, routing_group: str | None = None, tenant_id: str | None = None
    ) -> Response:
        tenant = routing_group or tenant_id
        listed = [
            report
            for report in fleet.reports()
            if model_name in (None, report.spec.model) and tenant in (None, report.spec.tenant)
        ]
        return _json(_workers(listed))

    return router


def _workers(reports: list[SourceReport]) -> list[dict[str, Any]]:
    """One entry an instance, model, tenant and block size, with the endpoint and state of each of its ranks."""
    entries: dict[tuple[object, ...], dict[str, Any]] = {}
    for report in reports:
        spec = report.spec
        entry = entries.setdefault(
            (spec.instance, spec.model, spec.tenant, spec.type, spec.block_size),
            {
                "instance_id": _instance_id(spec.instance),
                "source": "zmq",
                "type": spec.type,
                "model_name": spec.model,
                "modelname": spec.model,
                "routing_group": spec.tenant,
                "tenant_id": spec.tenant,
                "block_size": spec.block_size,
                "endpoints": {},
                "listeners": {},
            },
        )
        status = _STATUS.get(report.state, report.state)
        entry["endpoints"][str(spec.rank)] = spec.endpoint
        entry["listeners"][str(spec.rank)] = {"endpoint": spec.endpoint, "status": status}
    for entry in entries.values():
        states = {listener["status"] for listener in entry["listeners"].values()}
        entry["status"] = next((status for status in reversed(_STATUS.values()) if status in states), "active")
    return list(entries.values())


def _instance_id(instance: str) -> int | str:
    """Dynamo's clients expect the integers that they registered."""
    number = int(instance) if instance.isascii() and instance.isdecimal() and len(instance) <= len(str(2**64)) else -1
    return number if str(number) == instance and number < 2**64 else instance


def _json(content: object, status: int = 200) -> Response:
    return Response(_encode(content), status, media_type="application/json")
