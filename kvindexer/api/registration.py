"""Bodies of /register and /unregister, and how they become sources.

Both dialects of RFC #1403 in one struct: every field may be spelled in either way.  Beyond them a registration may
have all other fields of a source (`kvindexer.types.SourceSpec`).  Instances are strings inside: 7 and "7" are the
same instance.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvindexer.api.lookup import tenant_named
from kvindexer.api.rfc_schemas import one_of
from kvindexer.api.schemas import MAX_NAME, Name, Size, Text
from kvindexer.errors import RequestError, SettingsError
from kvindexer.settings.source import check_source
from kvindexer.types import SOURCE_TYPES, SourceSpec, SourceType

Rank = Annotated[int, Meta(ge=0, le=2**31 - 1)]
InstanceId = Annotated[int, Meta(ge=0)] | Name

_DEFAULT: Final = SourceSpec(instance="", model="", block_size=1, endpoint="")


class Registration(msgspec.Struct, kw_only=True):
    """A publisher to follow.  Fields that are not known are ignored, as clients of both dialects send some."""

    instance_id: Annotated[
        InstanceId, Meta(description="The routable server; an integer is answered as Dynamo does.")
    ]
    endpoint: Annotated[Name, Meta(description="Its PUB socket, tcp://host:port.")]
    block_size: Size
    model: Name | None = None
    modelname: Name | None = None
    model_name: Name | None = None
    type: Annotated[Text, Meta(description="vLLM, SGLang, Mooncake or store, in any case.")] = "vLLM"
    replay_endpoint: Text | None = None
    tenant_id: Text | None = None
    routing_group: Text | None = None
    lora_name: Text | None = None
    dp_rank: Rank | None = None
    additionalsalt: Text | None = None
    additional_salt: Text | None = None
    topic: Text = _DEFAULT.topic
    tier: Text | None = None
    readers: Annotated[tuple[Name, ...], Meta(max_length=MAX_NAME)] = _DEFAULT.readers
    report_mode: Literal["normal", "full"] = _DEFAULT.report_mode
    offload_blocks_per_chunk: Size = _DEFAULT.offload_blocks_per_chunk
    offload_connector: bool | None = _DEFAULT.offload_connector
    speculative_blocks: Rank = _DEFAULT.speculative_blocks
    clear_lower_tiers: bool = _DEFAULT.clear_lower_tiers
    durable_tiers: Annotated[tuple[Text, ...], Meta(max_length=8)] = _DEFAULT.durable_tiers
    aliases: Annotated[
        tuple[Name, ...], Meta(max_length=64, description="Further names of the instance, for `candidates`.")
    ] = _DEFAULT.aliases
    block_bytes: Annotated[int, Meta(ge=1, le=2**40, description="Bytes of a block, for /v1/tiers.")] | None = None
    curve_server_key: Annotated[Text, Meta(description="CURVE public key of the publisher, in Z85.")] | None = None


class Unregistration(msgspec.Struct, kw_only=True):
    """Publishers to forget: those of an instance that fit what is given."""

    instance_id: InstanceId
    type: Text | None = None
    model: Name | None = None
    modelname: Name | None = None
    model_name: Name | None = None
    tenant_id: Text | None = None
    routing_group: Text | None = None
    dp_rank: Rank | None = None


def source_of(body: Registration) -> SourceSpec:
    """The source that a body describes.  Raises RequestError."""
    model = one_of(body, "model", "modelname", "model_name")
    if model is None:
        raise RequestError("invalid_request", "there is no model", "give modelname or model_name", status=422)
    if isinstance(body.instance_id, int) and body.instance_id >= 2**64:
        raise RequestError("invalid_request", "instance_id has more than 64 bits", "give it as a string", status=422)
    spec = SourceSpec(
        instance=str(body.instance_id),
        model=model,
        block_size=body.block_size,
        endpoint=body.endpoint,
        replay=body.replay_endpoint or None,
        rank=body.dp_rank or 0,
        type=type_named(body.type),
        tenant=tenant_named(one_of(body, "tenant_id", "routing_group")),
        topic=body.topic,
        lora=body.lora_name or None,
        additional_salt=one_of(body, "additionalsalt", "additional_salt") or "",
        tier=body.tier or None,
        readers=body.readers,
        report_mode=body.report_mode,
        offload_blocks_per_chunk=body.offload_blocks_per_chunk,
        offload_connector=body.offload_connector,
        speculative_blocks=body.speculative_blocks,
        clear_lower_tiers=body.clear_lower_tiers,
        durable_tiers=body.durable_tiers,
        aliases=body.aliases,
        block_bytes=body.block_bytes,
        curve_server_key=body.curve_server_key or None,
    )
    try:
        check_source(spec, "source")
    except SettingsError as error:
        field = error.key.removeprefix("source.")
        raise RequestError("invalid_request", f"{field}: expected {error.expected}", status=422) from None
    return spec


def type_named(name: str) -> SourceType:
    """The type of publisher that a caller names, in any case.  Raises RequestError."""
    folded = name.lower()
    if folded not in SOURCE_TYPES:
        raise RequestError("unknown_type", "no publisher of this type is known", f"known: {', '.join(SOURCE_TYPES)}")
    return folded
