"""POST /v1/offload/plan: what would be lost if an instance freed these blocks on this tier.

body ─► PlanRequest ─► blocks by engine hash (`api.holders`) ─► what else there is of each (`tiering.planning`)
     ─► advice and the reason for it (`tiering.advice`)
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.holders import EngineHashes, Holders, Named, engine_hash
from kvindexer.api.lookup import tenant_named
from kvindexer.api.openapi import HotRoute
from kvindexer.api.schemas import Name, Salt, Text
from kvindexer.index.seam import Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.tiering.advice import HOT, Advice, Copies, Facts, Heat, Reason, advise
from kvindexer.tiering.media import tier_named
from kvindexer.tiering.nearness import Copy
from kvindexer.tiering.planning import Around, Asker, look_around
from kvindexer.types import Tier


class PlanRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Blocks that the manager of an instance, or of a store, would like to free."""

    instance: Annotated[Name, Meta(description="The instance or store.")]
    tier: Literal["gpu", "cpu", "disk", "remote"]
    hashes: EngineHashes
    model: Annotated[Name, Meta(description="Needed if the instance serves several.")] | None = None
    tenant: Text | None = None
    additional_salt: Salt | None = None
    rank: (
        Annotated[
            int, Meta(ge=0, le=2**31 - 1, description="Only this rank's copy; default: all ranks that have one.")
        ]
        | None
    ) = None
    hot_from: Annotated[
        float, Meta(ge=0, le=1e12, description="Heat from which a block is hot and should stay within reach.")
    ] = HOT


class CopiesByTier(msgspec.Struct, gc=False):
    """Other instances and stores that have the block."""

    gpu: int
    cpu: int
    disk: int
    remote: int


class PlannedBlock(msgspec.Struct, gc=False):
    """One block, in the order of the request."""

    hash: Annotated[int, Meta(description="The engine hash as an unsigned 64-bit integer.")]
    key: Annotated[int | None, Meta(description="The block key; null: the hash is not known.")]
    held: Annotated[bool, Meta(description="The index knows of the copy on this tier.")]
    copies: CopiesByTier
    last_copy: Annotated[
        bool | None,
        Meta(description="There is no other copy in the fleet, on any tier; null: the hash is not known."),
    ]
    heat: Annotated[float | None, Meta(description="How often the block is asked for, a minute; null: not counted.")]
    advice: Advice
    reason: Reason


class PlanAnswer(msgspec.Struct):
    """Advice for each block; it reserves nothing."""

    instance: str
    tier: str
    blocks: list[PlannedBlock]


ROUTE: Final = HotRoute(
    "/v1/offload/plan",
    "What would be lost if these blocks were freed?",
    "`drop`: another holder is live and sound, or a tier below from which the same rank can load it, or a store that "
    "it reads.  `offload`: copy it to a tier below first.  `keep`: neither is known to be safe or of use.  Copies of "
    "the instance itself on nearer tiers, and of its other ranks, don't count.  Advice is of one moment and reserves "
    "nothing: of two managers that free their copies at the same moment each may rely on the other's.",
    "Offload",
    PlanRequest,
    (PlanAnswer,),
    msgpack=True,
)
_read: Final = {form: reader(PlanRequest, form) for form in FORMS}
_UNKNOWN: Final = Around(held=False, copies=(0, 0, 0, 0), last=False, below=Copies.NONE, others=Copies.NONE)


class PlanRoute:
    """The route, as a function of the call."""

    def __init__(self, settings: Settings, index: Index, fleet: Fleet, heat: Heat | None = None) -> None:
        self._holders = Holders(settings, index, fleet)
        self._max_blocks = settings.max_blocks
        self._heat = heat

    async def __call__(self, call: Call) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._max_blocks, form=call.form, settings="max_blocks")
        request = _read[call.form](call.body)
        self._holders.check(len(request.hashes))
        publishers = self._holders.publishers(
            tenant=tenant_named(request.tenant),
            model=request.model,
            salt=request.additional_salt,
            source=None,
            instance=request.instance,
        )
        spec = publishers[0].spec
        asker = Asker(spec.instance, is_store(spec), tier_named(request.tier), request.rank)
        blocks = self._holders.by_hash(publishers, [engine_hash(given) for given in request.hashes])
        planned = []
        last: tuple[Copy, ...] | None = None
        near = _UNKNOWN
        async for block, copies in self._holders.copies(blocks):
            if copies is not last:
                last, near = copies, look_around(asker, copies)
            around = _UNKNOWN if block.key is None else near
            heat = self._heat_of(block)
            facts = Facts(
                known=block.key is not None,
                below=around.below,
                others=around.others,
                hot=heat is not None and heat >= request.hot_from,
                bottom=asker.tier is Tier.REMOTE,
            )
            advice, reason = advise(facts)
            planned.append(
                PlannedBlock(
                    block.hash or 0,
                    block.key,
                    around.held,
                    CopiesByTier(*around.copies),
                    None if block.key is None else around.last,
                    heat,
                    advice,
                    reason,
                )
            )
        return call.answer.encode(PlanAnswer(spec.instance, request.tier, planned))

    def _heat_of(self, block: Named) -> float | None:
        if self._heat is None or block.key is None:
            return None
        return sum(self._heat.heat(space, block.key) for space in block.spaces)
