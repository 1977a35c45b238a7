"""Routes that schedulers call for each of their requests: bytes in, bytes out, nothing between server and handler.

They are ordinary functions of the body.  One that takes msgpack too is a function of a `Call`, and may be
asynchronous where the answer has to wait for something.  The rest of the API is FastAPI; all are described in one
OpenAPI document (`api.openapi`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from kvindexer.api.errors import method_not_allowed, send_body, send_json
from kvindexer.api.forms import Call, call_of

Handler = Callable[[bytes], bytes]
"""Body of a request -> body of its answer; raises RequestError for what can't be answered."""

CallHandler = Callable[[Call], bytes | Awaitable[bytes]]
"""The same for a route that takes and gives both forms."""


class HotRoutes:
    """Dispatcher: the hot routes by their paths, everything else to another application."""

    def __init__(self, handlers: Mapping[str, Handler], calls: Mapping[str, CallHandler], rest: ASGIApp) -> None:
        self._handlers = handlers
        self._calls = calls
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        path = scope["path"] if scope["type"] == "http" else ""
        handler, answering = self._handlers.get(path), self._calls.get(path)
        if handler is None and answering is None:
            await self._rest(scope, receive, send)
            return
        if scope["method"] != "POST":
            raise method_not_allowed("POST")
        body = (await receive()).get("body", b"")
        if handler is not None:
            await send_json(send, 200, handler(body))
        elif answering is not None:
            call = call_of(body, scope["headers"])
            answer = answering(call)
            if not isinstance(answer, bytes):
                answer = await answer
            await send_body(send, 200, answer, call.answer.content_type.encode())
