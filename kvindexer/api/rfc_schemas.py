"""What travels to and from /query and /query_by_hash of RFC #1403, in Mooncake's and in Dynamo's dialect."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvindexer.api.schemas import Hashes, Name, Size, Text, Tokens
from kvindexer.errors import RequestError


class Scope(msgspec.Struct, kw_only=True):
    """Whose cache a query is about.  Fields that are not known are ignored, as clients of both dialects send some."""

    model: Annotated[Name, Meta(description="Asks for Mooncake's form of the answer.")] | None = None
    modelname: Annotated[Name, Meta(description="The same as `model`.")] | None = None
    model_name: Annotated[Name, Meta(description="Asks for Dynamo's form of the answer.")] | None = None
    tenant_id: Text | None = None
    routing_group: Annotated[Text, Meta(description="Dynamo's word for a tenant.")] | None = None
    block_size: Size | None = None
    lora_name: Text | None = None
    lora_id: (
        Annotated[int, Meta(description="Not supported: blocks are told apart by the adapter's name.")] | None
    ) = None
    cache_salt: Text | None = None
    additionalsalt: Text | None = None
    additional_salt: Text | None = None
    instance_id: int | Text | None = None


class TokenQuery(Scope, kw_only=True):
    """A prompt's tokens."""

    token_ids: Tokens


class HashQuery(Scope, kw_only=True):
    """A prompt's hashes, as one of three kinds."""

    seq_hashes: Annotated[Hashes, Meta(description="Block keys (rolling hashes).")] | None = None
    block_hash: Annotated[Hashes, Meta(description="The same as `seq_hashes`.")] | None = None
    block_hashes: Annotated[Hashes, Meta(description="Hashes of each block by itself.")] | None = None


class MooncakeFigures(msgspec.Struct, gc=False):
    """Tokens of one instance, each tier by itself."""

    longest_matched: int
    gpu: int = msgspec.field(name="GPU")
    cpu: int = msgspec.field(name="CPU")
    disk: int = msgspec.field(name="DISK")
    dp: dict[str, int] = msgspec.field(name="DP")


class DynamoFigures(msgspec.Struct, gc=False):
    """Tokens of one instance, each tier with the nearer ones."""

    longest_matched: int
    gpu: int
    dp: dict[str, int]
    cpu: int
    disk: int


class DynamoAnswer(msgspec.Struct):
    """All instances that hold something."""

    scores: dict[str, dict[str, int]]
    frequencies: list[int]
    instances: dict[str, DynamoFigures]


def one_of(body: object, *names: str) -> str | None:
    """The value of a field with several spellings.  Raises RequestError if they contradict each other."""
    values = {value for name in names if (value := getattr(body, name)) is not None}
    if len(values) > 1:
        raise RequestError(
            "invalid_request", f"{' and '.join(names)} differ", "they mean the same: give one of them", status=422
        )
    return values.pop() if values else None
