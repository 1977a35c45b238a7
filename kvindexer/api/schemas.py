"""What travels on the hot routes: the bodies of /v1/match, /query and /query_by_hash, and their answers.

These structs decode and encode, and are what the OpenAPI document says of those routes.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvindexer.errors import RequestError

MAX_NAME: Final = 1024
"""Longest model, instance, tenant, LoRA or salt."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Text = Annotated[str, Meta(max_length=MAX_NAME)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Tokens = Annotated[
    list[int],
    Meta(description="Token ids of the prompt.", extra_json_schema={"items": {"minimum": 0, "maximum": 2**32 - 1}}),
]
Hashes = Annotated[
    list[int],
    Meta(extra_json_schema={"items": {"minimum": -(2**63), "maximum": 2**64 - 1}}),
]


# POST /v1/match


class Multimodal(msgspec.Struct, forbid_unknown_fields=True):
    """An image or the like: its hash, and the tokens [offset, offset + length) of the prompt that it takes."""

    hash: Name
    offset: Annotated[int, Meta(ge=0, le=2**32)]
    length: Annotated[int, Meta(ge=1, le=2**32)]


class MatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt, as one of `tokens`, `tokens_b64` or `keys`, and whose cache to look at."""

    model: Name
    tokens: Tokens | None = None
    tokens_b64: Annotated[bytes, Meta(description="Base64 of the token ids as little-endian u32.")] | None = None
    keys: Annotated[Hashes, Meta(description="Block keys of the prompt's full blocks.")] | None = None
    prompt_tokens: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=2**40,
                description="Length of the prompt, only with `keys`; without it the prompt goes on behind them.",
            ),
        ]
        | None
    ) = None
    block_size: (
        Annotated[
            Size,
            Meta(
                description="Only blocks of this size; needed with `keys` if the model has blocks of several sizes."
            ),
        ]
        | None
    ) = None
    tenant: Text | None = None
    lora: Text | None = None
    cache_salt: Text | None = None
    additional_salt: (
        Annotated[Text, Meta(description="Only deployments with this salt; default: all of the model.")] | None
    ) = None
    multimodal: list[Multimodal] | None = None
    candidates: (
        Annotated[
            list[Text], Meta(description="Only these instances; each known one is listed, also without a match.")
        ]
        | None
    ) = None
    require: (
        Annotated[
            list[Text],
            Meta(
                description="Only instances that are all of these.",
                extra_json_schema={"items": {"enum": ["live", "sound", "complete"]}},
            ),
        ]
        | None
    ) = None


class TierTokens(msgspec.Struct, gc=False):
    """Leading tokens on one tier."""

    tokens: Annotated[int, Meta(description="On this tier by itself.")]
    cumulative_tokens: Annotated[int, Meta(description="On this tier or a nearer one.")]


class Tiers(msgspec.Struct, gc=False):
    """Leading tokens by tier, before the rules of cache groups are applied."""

    gpu: TierTokens
    cpu: TierTokens
    disk: TierTokens
    remote: TierTokens


class Match(msgspec.Struct, gc=False):
    """What one instance has of the prompt: the figures of its best rank."""

    instance: str
    block_size: int
    matched_tokens: Annotated[int, Meta(description="Leading tokens that are held and that the engine can reuse.")]
    cached_tokens: Annotated[int, Meta(description="What the engine will report as cached for this prompt.")]
    tiers: Tiers
    ranks: Annotated[dict[str, int], Meta(description="`matched_tokens` of each rank that holds something.")]
    state: str
    sound: bool
    complete: bool
    lag_ms: float
    verified_ms: float | None


class MatchAnswer(msgspec.Struct, omit_defaults=True):
    """The instances that hold a prefix of the prompt, best first."""

    model: str
    blocks: Annotated[
        int, Meta(description="Full blocks of the prompt, of the smallest block size that was looked at.")
    ]
    tokens: int
    matches: list[Match]
    unknown_candidates: Annotated[list[str], Meta(description="Candidates that the model has no instance of.")]
    reason: (
        Annotated[
            str,
            Meta(
                description="Why nothing matched.",
                extra_json_schema={
                    "enum": [
                        "shorter_than_a_block",
                        "no_instance",
                        "no_known_candidate",
                        "nothing_held",
                        "filtered_by_require",
                    ]
                },
            ),
        ]
        | None
    ) = None


# POST /query and /query_by_hash, RFC #1403


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
