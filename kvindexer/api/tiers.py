"""GET /v1/tiers: how much of each model lies where.

Blocks are those that publishers have announced.  Where an offloaded chunk covers several blocks and is announced
once, it counts as all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from fastapi import APIRouter
from fastapi.responses import Response

from kvindexer.api.fleet import Fleet, SourceReport
from kvindexer.api.lookup import tenant_named
from kvindexer.api.openapi import answer_body
from kvindexer.api.parameters import ChosenName
from kvindexer.index.topology import is_store
from kvindexer.types import TIERS, Tier

_encode = msgspec.json.Encoder().encode


class TierSize(msgspec.Struct):
    """What lies on one tier; bytes are null unless all sources on it say how large their blocks are."""

    blocks: int
    bytes: int | None


class TierSizes(msgspec.Struct):
    """What lies on each tier."""

    gpu: TierSize
    cpu: TierSize
    disk: TierSize
    remote: TierSize


class InstanceTiers(msgspec.Struct):
    """What an instance holds of a model, all ranks together."""

    instance: str
    tiers: TierSizes


class StoreTiers(msgspec.Struct):
    """What a store holds of a model, and which instances it is registered for (`*`: all of the model)."""

    store: str
    readers: list[str]
    tiers: TierSizes


class ModelTiers(msgspec.Struct):
    """One model: sums over its instances, each instance, and apart from them the stores."""

    model: str
    tiers: TierSizes
    instances: list[InstanceTiers]
    stores: list[StoreTiers]


class TiersAnswer(msgspec.Struct):
    """The models of a tenant."""

    tenant: str
    models: list[ModelTiers]


ANSWERS: Final = (TiersAnswer,)


def routes(fleet: Fleet) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["Offload"])

    @router.get("/v1/tiers", summary="Blocks and bytes by tier", responses=answer_body(TiersAnswer))
    async def tiers(tenant: ChosenName = None, model: ChosenName = None) -> Response:
        tenant = tenant_named(tenant)
        owners: dict[tuple[str, bool, str], list[SourceReport]] = {}
        for report in fleet.reports():
            spec = report.spec
            if spec.tenant == tenant and model in (None, spec.model):
                owners.setdefault((spec.model, is_store(spec), spec.instance), []).append(report)
        models: dict[str, ModelTiers] = {}
        for (name, store, owner), reports in sorted(owners.items()):
            entry = models.setdefault(name, ModelTiers(name, _sizes(()), [], []))
            if store:
                readers = {reader for report in reports for reader in report.spec.readers}
                entry.stores.append(StoreTiers(owner, sorted(readers), _sizes(reports)))
            else:
                entry.instances.append(InstanceTiers(owner, _sizes(reports)))
        for entry in models.values():
            engines = (owners[entry.model, False, each.instance] for each in entry.instances)
            entry.tiers = _sizes(report for reports in engines for report in reports)
        return Response(_encode(TiersAnswer(tenant, list(models.values()))), media_type="application/json")

    return router


def _sizes(reports: Iterable[SourceReport]) -> TierSizes:
    blocks = [0] * len(TIERS)
    size: list[int | None] = [0] * len(TIERS)
    for report in reports:
        spec = report.spec
        for tier in TIERS:
            count = report.blocks[tier] * (1 if tier is Tier.GPU else spec.offload_blocks_per_chunk)
            known = size[tier]
            blocks[tier] += count
            if count:
                size[tier] = None if known is None or spec.block_bytes is None else known + count * spec.block_bytes
    gpu, cpu, disk, remote = map(TierSize, blocks, size)
    return TierSizes(gpu, cpu, disk, remote)
