"""GET /v1/changes: what is stored and removed, as server-sent events, for managers that keep their own view.

    ChangeLog ─► Follower.step ─► one event ─► client ─► the next step

Nothing is queued for a client: what it is to be told next is worked out when it has taken what came before.  One
that falls behind what is kept, or takes nothing for a while, is cut off; it goes on at its last position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from time import monotonic
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Header
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType
from starlette.types import Receive, Scope, Send

from kvindexer.access.identity import caller
from kvindexer.api.errors import RefusedError
from kvindexer.api.fleet import Fleet
from kvindexer.api.limits import RETRY_AFTER_S
from kvindexer.api.lookup import KnownModels, keyspaces, tenant_named
from kvindexer.api.metrics import Metrics
from kvindexer.api.openapi import reference
from kvindexer.api.parameters import ChosenName, GivenName
from kvindexer.errors import RequestError
from kvindexer.index.seam import Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.tiering.follower import Follower
from kvindexer.tiering.position import Position, read_position, written
from kvindexer.tiering.told import Blocks, Gone, Reset, Told, TooSlowError
from kvindexer.types import SourceSpec

POSITION_EVERY_S: Final = 0.25
"""Between positions while there is more to tell; they grow with the number of sources."""
KNOWN_FOR_S: Final = 300.0
"""Where callers have to say who they are, a stream is as old as that at most: rights that are taken away end."""
_LOOK_S: Final = 1.0
"""Between looks at whether the service is about to end."""

_encode = msgspec.json.Encoder().encode


class Place(msgspec.Struct, gc=False, omit_defaults=True):
    """Where a block lies now."""

    rank: Annotated[int, Meta(description="Left away if 0.")] = 0
    tier: str = ""
    group: Annotated[int, Meta(description="The KV-cache group, left away if 0.")] = 0


class StoredBlock(msgspec.Struct, gc=False):
    """A block that is held, with all places of the source where it lies now."""

    hash: Annotated[int, Meta(description="The engine's hash, an unsigned 64-bit integer.")]
    key: Annotated[int | None, Meta(description="The block key; null: its place in a prompt is not known (yet).")]
    places: list[Place]
    block_size: Annotated[int, Meta(description="Left away if it is that of the source.")] | UnsetType = UNSET


class Owner(msgspec.Struct, kw_only=True, gc=False):
    """A source, and whose blocks it tells of: an instance's or a store's."""

    source: str
    instance: str | UnsetType = UNSET
    store: str | UnsetType = UNSET
    epoch: int
    seq: Annotated[int | None, Meta(description="Of the newest message that is in what was told.")]


class ResetEvent(Owner, kw_only=True, gc=False):
    """`reset`: forget what was told of the source, its content follows."""

    model: str
    block_size: int
    offload_blocks_per_chunk: int
    readers: (
        Annotated[list[str], Meta(description="Of a store: instances that read it, `*` for all.")] | UnsetType
    ) = UNSET


class BlocksEvent(Owner, kw_only=True, gc=False):
    """`blocks`: what these hashes of the source are now, whatever was told of them before."""

    stored: list[StoredBlock]
    removed: Annotated[list[int], Meta(description="Hashes that the source holds nowhere.")]
    rest: Annotated[int, Meta(description="After a reset: hashes still to come; 0: it is complete.")] | UnsetType = (
        UNSET
    )


class GoneEvent(msgspec.Struct):
    """`gone`: the source is not registered any more; forget what was told of it."""

    source: str


class PositionEvent(msgspec.Struct):
    """`position`: everything up to here was told; its `id` is where to go on."""

    sources: int


class EndEvent(msgspec.Struct):
    """`end`: the stream ends here; come back with the last position."""

    code: Annotated[str, Meta(extra_json_schema={"enum": ["too_slow", "leaving", "ask_again"]})]


ANSWERS: Final = (ResetEvent, BlocksEvent, GoneEvent, PositionEvent, EndEvent)
_DESCRIPTION: Final = (
    "A stream of server-sent events: `reset`, `blocks`, `gone`, `position`, `end`; their data are ResetEvent, "
    "BlocksEvent, GoneEvent, PositionEvent and EndEvent.  Without a position, or where it can't be taken up, a "
    "source begins with a `reset` and its whole content in pieces.  To go on where a stream broke off, on any "
    "replica, give the last `id` as `Last-Event-ID` (browsers do) or as `since`.  What is told of a hash is "
    "absolute.  Hashes and keys are 64-bit integers, which JavaScript and the like can't read exactly.  Lines that "
    "begin with a colon are signs of life."
)
_NAMES: Final[dict[type[msgspec.Struct], str]] = {
    ResetEvent: "reset",
    BlocksEvent: "blocks",
    GoneEvent: "gone",
    PositionEvent: "position",
    EndEvent: "end",
}


def _event_schema(kind: type[msgspec.Struct], name: str) -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": reference(kind)}
    properties = {"event": {"const": name}, "data": data, "id": {"type": "string"}}
    # readers of server-sent events keep an id until the next one: behind a position every event has it
    required = ["event", "data", *(["id"] if kind is PositionEvent else [])]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# `itemSchema`, one event: OpenAPI 3.2 has it, FastAPI writes it in 3.1
_ITEMS: Final = {"oneOf": [_event_schema(kind, name) for kind, name in _NAMES.items()]}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The stream", "content": {"text/event-stream": {"itemSchema": _ITEMS}}}
}


class Stream(Response):
    """One client's stream."""

    def __init__(self, follower: Follower, woken: asyncio.Event, end: Streams) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._follower = follower
        self._woken = woken
        self._streams = end
        self._gone = False
        self._ended = "hung_up"
        self._until_s = None if caller() is None else monotonic() + KNOWN_FOR_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Tell until the client goes, is too slow, or we go."""
        patience_s = 2 * self._streams.heartbeat_s
        listening = asyncio.create_task(self._listen(receive), name="changes: listen")
        try:
            async with asyncio.timeout(patience_s):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._texts():
                async with asyncio.timeout(patience_s):
                    await send({"type": "http.response.body", "body": text, "more_body": True})
            async with asyncio.timeout(patience_s):
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            self._ended = "took_nothing"  # there is no way to tell it so; the server hangs up
        finally:
            listening.cancel()
            self._streams.ended(self._follower, self._ended)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._woken.set()

    async def _texts(self) -> AsyncGenerator[bytes, None]:
        yield b": changes\nretry: 1000\n\n"
        spoke_at = told_at = monotonic()
        moved, first = True, True
        while not self._gone:
            if self._streams.leaving:
                self._ended = "leaving"
                yield _event(EndEvent("leaving"))
                return
            if self._until_s is not None and monotonic() >= self._until_s:
                self._ended = "ask_again"
                yield _event(EndEvent("ask_again"))
                return
            self._woken.clear()
            try:
                piece = self._follower.step()
            except TooSlowError:
                self._ended = "too_slow"
                yield _event(EndEvent("too_slow"))
                return
            now = monotonic()
            if piece is not None:
                yield _written(piece)
                spoke_at, moved = now, True
            if moved and (now - told_at >= POSITION_EVERY_S or (first and piece is None)):
                position = self._follower.position
                yield _event(PositionEvent(len(position.marks)), written(position))
                spoke_at, told_at, moved, first = now, now, piece is not None, False
            if piece is not None:
                await asyncio.sleep(0)  # others have their turn between pieces
            elif not await self._wake(POSITION_EVERY_S if moved else _LOOK_S) and (
                monotonic() - spoke_at >= self._streams.heartbeat_s
            ):
                spoke_at = monotonic()
                yield b":\n\n"

    async def _wake(self, at_most_s: float) -> bool:
        """Wait until there may be something to tell; False: there is nothing yet."""
        try:
            async with asyncio.timeout(min(at_most_s, self._streams.heartbeat_s)):
                return await self._woken.wait()
        except TimeoutError:
            return False


class Streams:
    """All streams of a service."""

    def __init__(self, settings: Settings, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._most = max(1, min(settings.max_change_streams, settings.max_concurrent_requests // 2))
        self._open = 0
        self.heartbeat_s = settings.changes_heartbeat_s

    @property
    def leaving(self) -> bool:
        """Whether the service is about to end."""
        return self._fleet.leaving

    def begin(self, tenant: str, model: str, salt: str | None, since: Position | None) -> Stream:
        """A stream of one more client.  Raises RefusedError."""
        if self._open >= self._most:
            raise RefusedError(
                RequestError(
                    "overloaded",
                    f"{self._open} clients follow the changes, the limit is {self._most}",
                    "try again later, or raise max_change_streams",
                    status=503,
                ),
                (b"retry-after", b"%d" % RETRY_AFTER_S),
            )

        def fits(spec: SourceSpec) -> bool:
            return spec.tenant == tenant and spec.model == model and salt in (None, spec.additional_salt)

        woken = asyncio.Event()
        self._open += 1
        return Stream(self._fleet.changes.follow(fits, since, woken.set), woken, self)

    def ended(self, follower: Follower, reason: str) -> None:
        """A client has gone."""
        self._open -= 1
        self._metrics.stream_ended(reason)
        self._fleet.changes.unfollow(follower)


def routes(settings: Settings, index: Index, fleet: Fleet, models: KnownModels, metrics: Metrics) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["Offload"])
    streams = Streams(settings, fleet, metrics)

    @router.get(
        "/v1/changes",
        summary="Stored and removed blocks, as they happen",
        description=_DESCRIPTION,
        response_class=Response,
        responses=_RESPONSES,
    )
    async def changes(
        model: GivenName,
        tenant: ChosenName = None,
        additional_salt: ChosenName = None,
        since: str | None = None,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        tenant = tenant_named(tenant)
        keyspaces(index, models, tenant, model, additional_salt=additional_salt, block_size=None)
        return streams.begin(tenant, model, additional_salt, _position(last_event_id or since))

    return router


def _position(text: str | None) -> Position | None:
    if not text:
        return None
    try:
        return read_position(text)
    except ValueError:
        raise RequestError(
            "invalid_position", "the position can't be read", "give the id of a position event", status=422
        ) from None


def _event(data: msgspec.Struct, position: str | None = None) -> bytes:
    head = b"" if position is None else b"id: " + position.encode() + b"\n"
    return head + b"event: " + _NAMES[type(data)].encode() + b"\ndata: " + _encode(data) + b"\n\n"


def _written(piece: Told) -> bytes:
    match piece:
        case Gone():
            return _event(GoneEvent(piece.source))
        case Reset():
            return _event(_reset(piece))
        case Blocks():
            return _event(_blocks(piece))


def _reset(piece: Reset) -> ResetEvent:
    spec = piece.spec
    return ResetEvent(
        source=piece.source,
        instance=UNSET if is_store(spec) else spec.instance,
        store=spec.instance if is_store(spec) else UNSET,
        epoch=piece.epoch,
        seq=piece.seq,
        model=spec.model,
        block_size=spec.block_size,
        offload_blocks_per_chunk=spec.offload_blocks_per_chunk,
        readers=list(spec.readers) if is_store(spec) else UNSET,
    )


def _blocks(piece: Blocks) -> BlocksEvent:
    spec = piece.spec
    return BlocksEvent(
        source=piece.source,
        instance=UNSET if is_store(spec) else spec.instance,
        store=spec.instance if is_store(spec) else UNSET,
        epoch=piece.epoch,
        seq=piece.seq,
        stored=[
            StoredBlock(
                block.hash,
                block.key,
                [Place(name.rank, name.tier.label, name.group) for name, _ in block.spots],
                UNSET if block.block_size == spec.block_size else block.block_size,
            )
            for block in piece.held
        ],
        removed=piece.removed,
        rest=UNSET if piece.rest is None else piece.rest,
    )
