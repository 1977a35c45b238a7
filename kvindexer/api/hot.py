"""Routes that schedulers call for each of their requests: bytes in, bytes out, nothing between server and handler.

They are ordinary functions of the body.  The rest of the API is FastAPI; both are described in one OpenAPI document
(`api.openapi`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from kvindexer.api.errors import method_not_allowed, send_json

Handler = Callable[[bytes], bytes]
"""Body of a request -> body of its answer; raises RequestError for what can't be answered."""


class HotRoutes:
    """Dispatcher: the hot routes by their paths, everything else to another application."""

    def __init__(self, handlers: Mapping[str, Handler], rest: ASGIApp) -> None:
        self._handlers = handlers
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await self._rest(scope, receive, send)
            return
        if scope["method"] != "POST":
            raise method_not_allowed("POST")
        message = await receive()
        await send_json(send, 200, handler(message.get("body", b"")))
