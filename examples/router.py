"""A reverse proxy for OpenAI-compatible engines: each request goes where the least is left to compute.

    python examples/router.py --index http://localhost:8090 http://10.0.0.11:8000 http://10.0.0.12:8000

    request ─► kvindexer: who has how much of its prompt ─► the engine with the least work ─► its answer, as it comes
                   ▲ /v1/routed: it is on its way there       /v1/feedback: what the engine says was cached │
                   └────────────────────────────────────────────────────────────────────────────────────────┘

The index is a help, never a need: without its answer the load decides alone.  vLLM tells what was cached if it runs
with --enable-prompt-tokens-details; texts need the setting `tokenizers` of kvindexer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kvindexer.client import AsyncClient, Chat, ClientError, Match, Prompt, Text, Tokens

CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
TAIL_BYTES = 16_384
"""The end of an answer, where `usage` stands."""
PASSED_ON = ("content-type", "authorization")


class Sent(NamedTuple):
    """A request on its way."""

    engine: str
    work: int
    """Tokens that the engine will have to compute, as far as known."""
    match: Match | None


class Router:
    """Which engine is next, by what it holds of the prompt and by the tokens that it has to compute already."""

    def __init__(self, index: AsyncClient, engines: Sequence[str]) -> None:
        self._index = index
        self._work = dict.fromkeys(engines, 0)

    async def send(self, model: str, prompt: Prompt | None) -> Sent:
        """Choose an engine, and tell the index."""
        tokens, held = 0, dict[str | None, Match]()
        if prompt is not None:
            with suppress(ClientError):
                answer = await self._index.match(model, prompt, candidates=self._work)
                tokens, held = answer.tokens, {match.candidate: match for match in answer.matches}
        left = {engine: max(1, tokens - cached(held.get(engine))) for engine in self._work}
        engine = min(self._work, key=lambda each: self._work[each] + left[each])
        self._work[engine] = self._work.pop(engine) + left[engine]  # the last one of equals from now on
        match = held.get(engine)
        if prompt is not None and match is not None:
            with suppress(ClientError):
                await self._index.routed(model, match.instance, prompt)
        return Sent(engine, left[engine], match)

    async def done(self, sent: Sent, cached_tokens: int | None) -> None:
        """The engine has answered, and said how much was cached."""
        self._work[sent.engine] -= sent.work
        if sent.match is not None and cached_tokens is not None:
            with suppress(ClientError):
                await self._index.feedback(sent.match.instance, sent.match.cached_tokens, cached_tokens)


def cached(match: Match | None) -> int:
    """What need not be computed, because it is there or on its way."""
    return 0 if match is None else max(match.cached_tokens, match.speculative_tokens or 0)


def prompt_of(asked: dict[str, Any]) -> Prompt | None:
    """The prompt of a request, if it is one that can be looked up."""
    salt = asked.get("cache_salt")
    match asked:
        case {"messages": [*messages]}:
            names = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
            return Chat(messages, cache_salt=salt, **{name: asked.get(name) for name in names})
        case {"prompt": str(text)}:
            return Text(text, cache_salt=salt)
        case {"prompt": [int(), *_] as ids}:
            with suppress(ValueError):
                return Tokens(ids, cache_salt=salt)
    return None


def app(index_url: str, engines: Sequence[str]) -> Starlette:
    """Build the proxy."""
    index = AsyncClient(index_url, timeout_s=0.5, retry=False)
    http = httpx.AsyncClient(timeout=httpx.Timeout(600, connect=2), limits=httpx.Limits(max_connections=1000))
    router = Router(index, [engine.rstrip("/") for engine in engines])

    async def handle(request: Request) -> Response:
        body = await request.body()
        asked: Any = {}
        with suppress(ValueError):
            asked = json.loads(body or b"{}")
        asked = asked if isinstance(asked, dict) else {}
        sent = await router.send(str(asked.get("model")), prompt_of(asked))
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        forward = http.build_request(request.method, sent.engine + request.url.path, content=body, headers=headers)
        try:
            answer = await http.send(forward, stream=True)
        except httpx.HTTPError:
            await router.done(sent, None)
            return JSONResponse({"error": {"message": f"no answer from {sent.engine}", "code": 502}}, 502)
        return StreamingResponse(
            relayed(answer, sent), answer.status_code, media_type=answer.headers.get("content-type")
        )

    async def relayed(answer: httpx.Response, sent: Sent) -> AsyncIterator[bytes]:
        tail = b""
        try:
            async with aclosing(answer):
                async for chunk in answer.aiter_bytes():
                    tail = (tail + chunk)[-TAIL_BYTES:]
                    yield chunk
        finally:
            reported = CACHED.findall(tail)
            await router.done(sent, int(reported[-1]) if reported else None)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with index, http:
            yield

    return Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST"])], lifespan=lifespan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", default="http://localhost:8090", help="kvindexer's address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("engines", nargs="+", help="addresses of engines that are registered with kvindexer")
    options = parser.parse_args()
    uvicorn.run(app(options.index, options.engines), port=options.port)
