"""POST /v1/blocks/locate: where is each of these blocks, nearest first.

body ─► LocateRequest ─► blocks by key or engine hash (`api.holders`) ─► copies in order (`tiering.nearness`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kvindexer.api.decoding import check_size, reader, unsigned
from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.holders import EngineHashes, Holders, Named, engine_hash, unknown_instance
from kvindexer.api.lookup import KnownModels, keyspaces, one_size, tenant_named
from kvindexer.api.openapi import HotRoute
from kvindexer.api.schemas import About, Keys, Name
from kvindexer.errors import RequestError
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.tiering.nearness import Copy, Reach, order, reach
from kvindexer.types import Keyspace

Status = Literal["held", "not_held", "unknown"]


class LocateRequest(About, kw_only=True):
    """Blocks, as `keys`, or as `hashes` of a `source` or of the sources of an `instance`."""

    keys: Keys | None = None
    hashes: EngineHashes | None = None
    source: Annotated[Name, Meta(description="The source that the hashes are from, as in /v1/sources.")] | None = None
    instance: Annotated[Name, Meta(description="The instance or store that the hashes are from.")] | None = None
    near: Annotated[Name, Meta(description="The instance from which copies are seen: its own come first.")] | None = (
        None
    )


class Holder(msgspec.Struct, kw_only=True, gc=False):
    """One copy: with an `instance` and one of its ranks, or in a `store`, which is no routing target."""

    instance: str | UnsetType = UNSET
    rank: int | UnsetType = UNSET
    store: str | UnsetType = UNSET
    readers: Annotated[list[str], Meta(description="Instances that can load from the store: route to these.")] | (
        UnsetType
    ) = UNSET
    tier: str
    state: str
    sound: bool
    complete: bool
    reach: (
        Annotated[
            Reach, Meta(description="How `near` gets at it: own tier, a store that it reads, other instance, or not.")
        ]
        | UnsetType
    ) = UNSET


class LocatedBlock(msgspec.Struct, gc=False, omit_defaults=True):
    """One block, in the order of the request."""

    status: Annotated[Status, Meta(description="`unknown`: the hash means no block in that source.")]
    holders: list[Annotated[msgspec.Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/Holder"})]]
    hash: Annotated[int, Meta(description="The engine hash as an unsigned 64-bit integer.")] | None = None
    key: Annotated[int, Meta(description="The block key, an unsigned 64-bit integer.")] | None = None


class LocateAnswer(msgspec.Struct):
    """Each block with its holders, nearest first."""

    model: str
    blocks: list[LocatedBlock]
    unknown: Annotated[int, Meta(description="How many of the hashes mean no block.")]


ROUTE: Final = HotRoute(
    "/v1/blocks/locate",
    "Who holds each of these blocks?",
    "Holders are listed nearest first: with `near` its own tiers, then stores that it reads, then other instances, "
    "then other stores; in each of these, and without `near` in all, by tier, instances before stores, live and "
    "sound ones first, by name and rank.  Engine hashes are looked up only inside the hash domain of the source that "
    "is named.  Hashes and keys are 64-bit integers, which JavaScript and the like can't read exactly.",
    "Offload",
    LocateRequest,
    (LocateAnswer,),
    msgpack=True,
)
_read: Final = {form: reader(LocateRequest, form) for form in FORMS}


class LocateRoute:
    """The route, as a function of the call."""

    def __init__(self, settings: Settings, index: Index, fleet: Fleet, models: KnownModels) -> None:
        self._holders = Holders(settings, index, fleet)
        self._index = index
        self._fleet = fleet
        self._models = models
        self._max_blocks = settings.max_blocks

    async def __call__(self, call: Call) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._max_blocks, form=call.form, settings="max_blocks")
        request = _read[call.form](call.body)
        tenant = tenant_named(request.tenant)
        spaces = keyspaces(
            self._index,
            self._models,
            tenant,
            request.model,
            additional_salt=request.additional_salt,
            block_size=request.block_size,
        )
        blocks = self._blocks(request, tenant, spaces)
        near = self._near(request, tenant, spaces)
        row = self._rows(call.answer.encode, near)
        located: list[LocatedBlock] = []
        last: tuple[Copy, ...] | None = None
        holders: list[msgspec.Raw] = []
        unknown = 0
        async for block, copies in self._holders.copies(blocks):
            if copies is not last:
                last = copies
                holders = [row(copy) for copy in sorted(set(copies), key=lambda copy: order(copy, near))]
            unknown += block.key is None
            status: Status = "unknown" if block.key is None else "held" if holders else "not_held"
            located.append(LocatedBlock(status, holders, block.hash, block.key))
        return call.answer.encode(LocateAnswer(request.model, located, unknown))

    def _blocks(self, request: LocateRequest, tenant: str, spaces: list[Keyspace]) -> list[Named]:
        if (request.keys is None) == (request.hashes is None):
            raise RequestError(
                "invalid_request",
                "the blocks are missing or given twice",
                "give either keys, or hashes and the source or instance that they are from",
                status=422,
            )
        if request.hashes is not None:
            if (request.source is None) == (request.instance is None):
                raise RequestError(
                    "invalid_request",
                    "hashes mean something only inside a source",
                    "give either source or instance",
                    status=422,
                )
            self._holders.check(len(request.hashes))
            publishers = self._holders.publishers(
                tenant=tenant,
                model=request.model,
                salt=request.additional_salt,
                source=request.source,
                instance=request.instance,
            )
            return self._holders.by_hash(publishers, [engine_hash(given) for given in request.hashes])
        if request.source is not None or request.instance is not None:
            raise RequestError(
                "invalid_request", "source and instance belong to hashes", "leave them away with keys", status=422
            )
        keys = request.keys or []
        self._holders.check(len(keys))
        size = one_size(spaces, "keys")
        there = tuple(space for space in spaces if space.block_size == size)
        return [Named(None, key, there) for key in unsigned(keys, "keys")]

    def _near(self, request: LocateRequest, tenant: str, spaces: list[Keyspace]) -> str | None:
        if request.near is None:
            return None
        among = {name for space in spaces for name in self._index.instances(space)}
        found = self._holders.meant(
            request.near, tenant=tenant, model=request.model, salt=request.additional_salt, among=among
        )
        if found is None:
            raise unknown_instance()
        return found

    def _rows(self, encode: Callable[[Holder], bytes], near: str | None) -> Callable[[Copy], msgspec.Raw]:
        """Encodes each copy once."""
        known: dict[Copy, msgspec.Raw] = {}

        def row(copy: Copy) -> msgspec.Raw:
            if copy not in known:
                known[copy] = msgspec.Raw(encode(self._holder(copy, near)))
            return known[copy]

        return row

    def _holder(self, copy: Copy, near: str | None) -> Holder:
        status = self._fleet.status(copy.owner)
        return Holder(
            instance=UNSET if copy.store else copy.owner,
            rank=UNSET if copy.store else copy.rank,
            store=copy.owner if copy.store else UNSET,
            readers=list(copy.readers) if copy.store else UNSET,
            tier=copy.tier.label,
            state=status.state,
            sound=status.sound,
            complete=status.complete,
            reach=UNSET if near is None else reach(copy, near),
        )
