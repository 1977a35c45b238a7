"""The OpenAPI document: what FastAPI knows of its routes, and what it can't know of those that take raw bodies.

Schemas are made from the structs that decode and encode, so that the document can't say anything else than the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from fastapi import FastAPI

from kvindexer.api.errors import ErrorAnswer

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
_REF: Final = "#/components/schemas/{name}"
ERRORS: Final = {
    "400": "The request contradicts itself or is no JSON",
    "404": "Unknown model, block size or instance",
    "405": "Another method",
    "408": "The request did not arrive in time",
    "409": "It contradicts what is registered",
    "413": "Beyond a limit",
    "422": "A value is missing, of the wrong type or out of range",
    "500": "A fault of the service",
    "503": "Too many requests at once, or no tokens for a text now",
}


class HotRoute(NamedTuple):
    """What the document says of a route that FastAPI does not see."""

    path: str
    summary: str
    description: str
    tag: str
    request: type[msgspec.Struct]
    answers: tuple[Any, ...]
    msgpack: bool = False
    """It takes and gives msgpack too."""


def request_body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Description of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": reference(kind)}}}}


def answer_body(kind: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Description of a route's answer, by default with status 200."""
    content = {"description": "The answer", "content": {JSON: {"schema": _schema(kind)}}}
    return dict.fromkeys(statuses or (200,), content)


def describe(app: FastAPI, hot: Iterable[HotRoute], kinds: Iterable[Any]) -> None:
    """Make `app.openapi` the description of everything; `kinds` are the structs that routes refer to."""
    build = app.openapi
    hot, kinds = tuple(hot), tuple(kinds)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            _complete(document, hot, kinds)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _complete(document: dict[str, Any], hot: tuple[HotRoute, ...], kinds: tuple[Any, ...]) -> None:
    every = [
        *kinds,
        ErrorAnswer,
        *(route.request for route in hot),
        *(kind for route in hot for kind in route.answers),
    ]
    _, schemas = msgspec.json.schema_components(every, ref_template=_REF)
    document.setdefault("components", {})["schemas"] = schemas
    for route in hot:
        document["paths"][route.path] = {"post": _operation(route)}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= _errors(operation)


def _operation(route: HotRoute) -> dict[str, Any]:
    shapes = [_schema(kind) for kind in route.answers]
    schema = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    forms = (JSON, MSGPACK) if route.msgpack else (JSON,)
    content = {form: {"schema": reference(route.request)} for form in forms}
    return {
        "summary": route.summary,
        "description": route.description,
        "operationId": route.path.strip("/").replace("/", "_"),
        "tags": [route.tag],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "The answer", "content": {form: {"schema": schema} for form in forms}}},
    }


def _errors(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Errors that a route can answer with: those of bodies only if it has one, those of values if it takes some."""
    statuses: Iterable[str] = ("404", "422", "500", "503") if operation.get("parameters") else ("500", "503")
    if "requestBody" in operation:
        statuses = ERRORS
    return {
        status: {"description": ERRORS[status], "content": {JSON: {"schema": reference(ErrorAnswer)}}}
        for status in statuses
        if status not in operation["responses"]
    }


def reference(kind: type) -> dict[str, Any]:
    """A struct that the document describes elsewhere."""
    return {"$ref": _REF.format(name=kind.__name__)}


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema
