"""GET /docs: the OpenAPI document as one page, without scripts and without anything from elsewhere.

Pods in a cluster often can't reach the network that usual viewers are loaded from; and a page that runs nothing can
have the strictest of policies.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from html import escape
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,td:first-child{font-family:ui-monospace,monospace}table{border-collapse:collapse;margin:.5rem 0}"
    "td{border-top:1px solid #ddd;padding:.2rem .8rem .2rem 0;vertical-align:top}h3{margin-top:2rem}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}a{color:#8bf}td{border-color:#444}}"
)
_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}


def routes() -> APIRouter:
    """The one route."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(request.app.openapi()), headers=_HEADERS)

    return router


def page(document: Mapping[str, Any]) -> str:
    """The document, as HTML."""
    return "".join(_page(document))


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1><p>{escape(info.get('summary', ''))}</p><p>{_prose(info.get('description', ''))}</p>"
    yield '<p>For programs: <a href="openapi.json">openapi.json</a></p><h2>Routes</h2>'
    titles = [f"{method.upper()} {path}" for path, operations in document["paths"].items() for method in operations]
    yield "<p>" + ", ".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles) + "</p>"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation(f"{method.upper()} {path}", operation)
    yield "<h2>Objects</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_prose(schema.get("description", ""))}</p>'
        yield from _fields(schema)


def _operation(title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h3 id="{_anchor(title)}">{escape(title)}</h3><p>{escape(operation.get("summary", ""))}</p>'
    yield f"<p>{_prose(operation.get('description', ''))}</p><table>"
    for parameter in operation.get("parameters", ()):
        name = escape(parameter["name"]) + ("" if parameter.get("required") else "?")
        yield f"<tr><td>{name}<td>{_kind(parameter.get('schema', {}))}<td>{_prose(parameter.get('description', ''))}"
    for form, media in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<tr><td>body<td>{_kind(media.get('schema', {}))}<td>{escape(form)}"
    for status, answer in operation.get("responses", {}).items():
        kinds = {_kind(media.get("schema", {})) for media in answer.get("content", {}).values()}
        said = _prose(answer.get("description", ""))
        yield f"<tr><td>{escape(str(status))}<td>{', '.join(sorted(kinds))}<td>{said}"
    yield "</table>"


def _anchor(title: str) -> str:
    return escape(title.replace(" ", ":"))


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    yield "<table>"
    for name, field in schema.get("properties", {}).items():
        mark = "" if name in required else "?"
        yield f"<tr><td>{escape(name)}{mark}<td>{_kind(field)}<td>{_prose(_description(field))}"
    yield "</table>"


def _description(schema: Mapping[str, Any]) -> str:
    """What a value means; that of one which may be absent is said of its forms."""
    said = [schema, *schema.get("anyOf", ())]
    return next((each["description"] for each in said if "description" in each), "")


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value is, in a few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " | ".join(dict.fromkeys(_kind(each) for each in schema[several]))
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(each))}</code>" for each in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {_kind(schema['additionalProperties'])}"
    return escape(", ".join(kind) if isinstance(kind, list) else str(kind))


def _prose(text: str) -> str:
    """Text with `names`."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
