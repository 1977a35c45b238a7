"""GET /v1/heat/...: what is asked for most, what of it hangs on one copy, and what a new pod should have first.

    HeatCounts ─► hot prefixes or blocks ─► Index.locate ─► with holders, by instance and tier

Each row is of one moment; between rows others have their turn.  A tenant sees its own keyspaces only, and no row
shows a salt or a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Final, NamedTuple

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import Response
from msgspec import Meta

from kvindexer.api.lookup import KnownModels, keyspaces, tenant_named
from kvindexer.api.openapi import answer_body
from kvindexer.api.parameters import ChosenName, GivenName
from kvindexer.index.seam import Holding, Index
from kvindexer.tiering.heat import PREFIX_ENDS, HeatCounts, HotBlock
from kvindexer.types import Keyspace

MAX_TOP: Final = 100
LOOKED_AT: Final = 1024
"""Hot blocks that are looked at for those with a single copy."""
_CHUNK: Final = 32
"""Blocks that are looked up before others may have a turn."""

_encode = msgspec.json.Encoder().encode

Key = Annotated[
    int, Meta(description="Of the prefix's last block.", extra_json_schema={"minimum": 0, "maximum": 2**64 - 1})
]
AskedPerMinute = Annotated[float, Meta(description="How often it is asked for, old questions fading; an estimate.")]


class HolderOfBlock(msgspec.Struct):
    """One place where a block lies; stores stand here under their own names."""

    instance: str
    rank: int
    tier: str


class HotPrefix(msgspec.Struct):
    """A prefix that several prompts share."""

    key: Key
    block_size: int
    tokens: Annotated[int, Meta(description="Its length.")]
    asked_per_minute: AskedPerMinute
    holders: Annotated[list[HolderOfBlock], Meta(description="Who holds its last block.")]


class PrefixesAnswer(msgspec.Struct):
    """Those first whose tokens are asked for most: how often, times how long."""

    model: str
    error_per_minute: Annotated[
        float,
        Meta(
            description="`asked_per_minute` may be so much too low, beside the chance of prompts that were left out."
        ),
    ]
    prefixes: list[HotPrefix]


class SingleCopy(msgspec.Struct):
    """A prefix whose last block lies in one place only."""

    key: Key
    block_size: int
    tokens: int
    asked_per_minute: AskedPerMinute
    holder: HolderOfBlock


class SingleAnswer(msgspec.Struct):
    """What to replicate, those first that are asked for most."""

    model: str
    blocks: list[SingleCopy]


class PrewarmAnswer(msgspec.Struct):
    """What to load first: hot prefixes that others hold, and this instance doesn't."""

    model: str
    instance: str
    prefixes: list[HotPrefix]


ANSWERS: Final = (PrefixesAnswer, SingleAnswer, PrewarmAnswer)

Top = Annotated[int, Query(ge=1, le=MAX_TOP)]


class _Found(NamedTuple):
    keyspace: Keyspace
    block: HotBlock
    holdings: list[Holding]


class HeatViews:
    """Puts heat and holders together."""

    def __init__(self, index: Index, heat: HeatCounts, models: KnownModels) -> None:
        self._index = index
        self._heat = heat
        self._models = models

    def spaces(self, tenant: str | None, model: str, salt: str | None) -> list[Keyspace]:
        """The keyspaces that may be looked at.  Raises RequestError."""
        return keyspaces(
            self._index, self._models, tenant_named(tenant), model, additional_salt=salt, block_size=None
        )

    async def prefixes(self, spaces: list[Keyspace], most: int) -> list[HotPrefix]:
        """Shared prefixes, best first."""
        return [_prefix(found) async for found in self._prefixes(spaces, most)]

    async def missing(self, spaces: list[Keyspace], instance: str, most: int) -> list[HotPrefix]:
        """Those that somebody holds, and not this instance."""
        rows: list[HotPrefix] = []
        async for found in self._prefixes(spaces, LOOKED_AT):
            space, block, holdings = found
            # in a store that it reads is as good as held
            if holdings and not self._index.match(space, [block.key], space.block_size, {instance}):
                rows.append(_prefix(found))
                if len(rows) == most:
                    break
        return rows

    async def single(self, spaces: list[Keyspace], most: int) -> list[SingleCopy]:
        """Hot blocks with one copy; of a run of them that is asked for alike, only the last one."""
        single: dict[tuple[Keyspace, int], _Found] = {}
        followed: dict[tuple[Keyspace, int], float] = {}
        hottest = [(space, block) for space in spaces for block in self._heat.hottest(space, LOOKED_AT)]
        async for found in self._located(hottest):
            if len(found.holdings) == 1:
                place = (found.keyspace, found.block.key)
                single[place] = found
                above = (found.keyspace, found.block.above)
                followed[above] = max(found.block.asked_per_minute, followed.get(above, 0.0))
        rows = [
            SingleCopy(
                block.key,
                space.block_size,
                block.blocks * space.block_size,
                round(block.asked_per_minute, 3),
                _holder(holding),
            )
            for place, (space, block, (holding,)) in single.items()
            if followed.get(place, 0.0) < PREFIX_ENDS * block.asked_per_minute
        ]
        rows.sort(key=lambda row: (-row.asked_per_minute, -row.tokens, row.key))
        return rows[:most]

    def error_per_minute(self, spaces: list[Keyspace]) -> float:
        """Of the keyspace that is counted worst."""
        return max(self._heat.error_per_minute(space) for space in spaces)

    def _prefixes(self, spaces: list[Keyspace], most: int) -> AsyncIterator[_Found]:
        hot = [(space, block) for space in spaces for block in self._heat.prefixes(space, most)]
        hot.sort(key=lambda each: (-each[1].asked_per_minute * each[1].blocks * each[0].block_size, each[1].key))
        return self._located(hot[:most])

    async def _located(self, hot: Sequence[tuple[Keyspace, HotBlock]]) -> AsyncIterator[_Found]:
        """Who holds these blocks now."""
        for number, (space, block) in enumerate(hot):
            if number and number % _CHUNK == 0:
                await asyncio.sleep(0)
            (holdings,) = self._index.locate(space, [block.key])
            yield _Found(space, block, holdings)


def routes(views: HeatViews) -> APIRouter:
    """The three routes."""
    router = APIRouter(tags=["Heat"])

    @router.get("/v1/heat/prefixes", summary="Top shared prefixes", responses=answer_body(PrefixesAnswer))
    async def prefixes(
        model: GivenName, tenant: ChosenName = None, additional_salt: ChosenName = None, top: Top = 10
    ) -> Response:
        spaces = views.spaces(tenant, model, additional_salt)
        rows = await views.prefixes(spaces, top)
        return _answer(PrefixesAnswer(model, round(views.error_per_minute(spaces), 3), rows))

    @router.get("/v1/heat/single", summary="Hot blocks with a single copy", responses=answer_body(SingleAnswer))
    async def single(
        model: GivenName, tenant: ChosenName = None, additional_salt: ChosenName = None, top: Top = 10
    ) -> Response:
        spaces = views.spaces(tenant, model, additional_salt)
        return _answer(SingleAnswer(model, await views.single(spaces, top)))

    @router.get("/v1/heat/prewarm", summary="What a new pod should load", responses=answer_body(PrewarmAnswer))
    async def prewarm(
        model: GivenName,
        instance: GivenName,
        tenant: ChosenName = None,
        additional_salt: ChosenName = None,
        top: Top = 10,
    ) -> Response:
        spaces = views.spaces(tenant, model, additional_salt)
        return _answer(PrewarmAnswer(model, instance, await views.missing(spaces, instance, top)))

    return router


def _answer(answer: msgspec.Struct) -> Response:
    return Response(_encode(answer), media_type="application/json")


def _prefix(found: _Found) -> HotPrefix:
    space, block, holdings = found
    return HotPrefix(
        block.key,
        space.block_size,
        block.blocks * space.block_size,
        round(block.asked_per_minute, 3),
        [_holder(holding) for holding in holdings],
    )


def _holder(holding: Holding) -> HolderOfBlock:
    return HolderOfBlock(holding.instance, holding.rank, holding.tier.label)
