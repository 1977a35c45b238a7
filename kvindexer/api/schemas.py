"""What travels to and from /v1/match, and the types of values that all bodies share.

The structs decode and encode, and are what the OpenAPI document says of the route.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

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
