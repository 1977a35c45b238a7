"""What travels to and from /v1/match, /v1/match/batch and /v1/keys, and the types of values that all bodies share.

The structs decode and encode, and are what the OpenAPI document says of the route.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvindexer.api.errors import ErrorDetail
from kvindexer.api.text import (
    GenerationPrompt,
    GoesOn,
    Messages,
    PromptText,
    SpecialTokens,
    TemplateKwargs,
    Tools,
)

MAX_NAME: Final = 1024
"""Longest model, instance, tenant, LoRA or salt."""

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Text = Annotated[str, Meta(max_length=MAX_NAME)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Tokens = Annotated[
    list[Annotated[int, Meta(extra_json_schema={"minimum": 0, "maximum": 2**32 - 1})]],
    Meta(description="Token ids of the prompt."),
]
Hashes = list[Annotated[int, Meta(extra_json_schema={"minimum": -(2**63), "maximum": 2**64 - 1})]]


class Multimodal(msgspec.Struct, forbid_unknown_fields=True):
    """An image or the like: its hash, and the tokens [offset, offset + length) of the prompt that it takes."""

    hash: Name
    offset: Annotated[int, Meta(ge=0, le=2**32)]
    length: Annotated[int, Meta(ge=1, le=2**32)]


PackedTokens = Annotated[
    bytes, Meta(description="Base64 of the token ids as little-endian u32; in msgpack the bytes themselves.")
]
PackedKeys = Annotated[
    bytes, Meta(description="Base64 of block keys as little-endian u64; in msgpack the bytes themselves.")
]
Keys = Annotated[Hashes, Meta(description="Block keys of the prompt's full blocks.")]
PromptTokens = Annotated[
    int,
    Meta(
        ge=0,
        le=2**40,
        description="Length of the prompt, only with keys; without it the prompt goes on behind them.",
    ),
]
Salt = Annotated[Text, Meta(description="Only deployments with this salt; default: all of the model.")]
Weight = Annotated[float, Meta(ge=0, le=1e6)]


class TierWeights(msgspec.Struct, forbid_unknown_fields=True):
    """Worth of a token on each tier; a tier that is left away has the weight of the setting `tier_weights`."""

    gpu: Weight | None = None
    cpu: Weight | None = None
    disk: Weight | None = None
    remote: Weight | None = None


class About(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What nearly all requests are about: the blocks of a model."""

    model: Name
    block_size: (
        Annotated[
            Size,
            Meta(description="Only blocks of this size; needed for keys if the model has blocks of several sizes."),
        ]
        | None
    ) = None
    tenant: Text | None = None
    additional_salt: Salt | None = None


class Question(About, kw_only=True):
    """Whose cache to look at, and which instances to list."""

    candidates: (
        Annotated[
            list[Text],
            Meta(
                description="Only these instances, by id, alias, host, host:port or URL; each known one is listed, "
                "also without a match."
            ),
        ]
        | None
    ) = None
    require: (
        Annotated[
            list[Annotated[Text, Meta(extra_json_schema={"enum": ["live", "sound", "complete"]})]],
            Meta(description="Only instances that are all of these."),
        ]
        | None
    ) = None
    top_k: Annotated[Size, Meta(description="Only so many instances, the best ones.")] | None = None
    weights: TierWeights | None = None
    order: Annotated[
        Literal["cached_tokens", "score", "expected"],
        Meta(
            description="What makes an instance better than another, and its best rank the one that is shown.  "
            "`expected`: as `cached_tokens`, but before all by how far it will get when what was told to /v1/routed "
            "has arrived (`speculative_tokens`)."
        ),
    ] = "cached_tokens"
    by_rank: Annotated[bool, Meta(description="Show each rank's figures too.")] = False


class MatchRequest(Question, kw_only=True):
    """A prompt, as tokens, keys (either as a list or packed) or text, and whose cache to look at."""

    tokens: Tokens | None = None
    tokens_b64: PackedTokens | None = None
    keys: Keys | None = None
    keys_b64: PackedKeys | None = None
    prompt_tokens: PromptTokens | None = None
    prompt: PromptText | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: GenerationPrompt | None = None
    continue_final_message: GoesOn | None = None
    add_special_tokens: SpecialTokens | None = None
    lora: Text | None = None
    cache_salt: Text | None = None
    multimodal: list[Multimodal] | None = None


class BatchPrompt(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One prompt of a batch, as one of `tokens`, `tokens_b64`, `keys` and `keys_b64`."""

    tokens: Tokens | None = None
    tokens_b64: PackedTokens | None = None
    keys: Keys | None = None
    keys_b64: PackedKeys | None = None
    prompt_tokens: PromptTokens | None = None
    lora: Text | None = None
    cache_salt: Text | None = None
    multimodal: list[Multimodal] | None = None


class BatchRequest(Question, kw_only=True):
    """Prompts, and what is the same for all of them.

    What is wrong with one prompt is told in its own result and costs the others nothing.
    """

    prompts: list[Annotated[msgspec.Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/BatchPrompt"})]]


class Prompted(About, kw_only=True):
    """A prompt as tokens or text, and what else its keys depend on."""

    tokens: Tokens | None = None
    tokens_b64: PackedTokens | None = None
    prompt: PromptText | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: GenerationPrompt | None = None
    continue_final_message: GoesOn | None = None
    add_special_tokens: SpecialTokens | None = None
    lora: Text | None = None
    cache_salt: Text | None = None
    multimodal: list[Multimodal] | None = None


class KeysRequest(Prompted, kw_only=True):
    """A prompt, as one of `tokens`, `tokens_b64`, `prompt` and `messages`, and what else its keys depend on."""


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


class RankFigures(msgspec.Struct, gc=False):
    """What one rank of an instance has of the prompt."""

    block_size: int
    matched_tokens: int
    cached_tokens: int
    score: float
    tiers: Tiers


class Match(msgspec.Struct, gc=False):
    """What one instance has of the prompt: the figures of its best rank."""

    instance: str
    block_size: int
    matched_tokens: Annotated[int, Meta(description="Leading tokens that are held and that the engine can reuse.")]
    cached_tokens: Annotated[int, Meta(description="What the engine will report as cached for this prompt.")]
    score: Annotated[
        float,
        Meta(description="`matched_tokens`, those that a tier adds to the nearer ones times the weight of the tier."),
    ]
    tiers: Tiers
    ranks: Annotated[dict[str, int], Meta(description="`matched_tokens` of each rank that holds something.")]
    state: str
    sound: bool
    complete: bool
    lag_ms: float
    verified_ms: float | None
    candidate: (
        Annotated[str, Meta(description="The instance as `candidates` spells it, if there are any.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    by_rank: (
        Annotated[dict[str, RankFigures], Meta(description="Each rank that holds something, if asked for.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    speculative_tokens: (
        Annotated[
            int,
            Meta(
                description="Leading tokens when prompts told to /v1/routed count as held too, of which no event has "
                "come yet; there only if that brings any instance further."
            ),
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET


Blocks = Annotated[int, Meta(description="Full blocks of the prompt, of the smallest block size that was looked at.")]
Reason = Annotated[
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
UnknownCandidates = Annotated[list[str], Meta(description="Candidates that the model has no instance of.")]
AmbiguousCandidates = Annotated[
    dict[str, list[str]],
    Meta(description="Candidates that could be several instances, and which; they are not among the matches."),
]


class MatchAnswer(msgspec.Struct, omit_defaults=True):
    """The instances that hold a prefix of the prompt, best first."""

    model: str
    blocks: Blocks
    tokens: int
    matches: list[Match]
    unknown_candidates: UnknownCandidates
    ambiguous_candidates: AmbiguousCandidates = {}
    reason: Reason | None = None


class BatchResult(msgspec.Struct, omit_defaults=True):
    """The answer to one prompt, or what is wrong with it."""

    blocks: Blocks | msgspec.UnsetType = msgspec.UNSET
    tokens: int | msgspec.UnsetType = msgspec.UNSET
    matches: list[Match] | msgspec.UnsetType = msgspec.UNSET
    reason: Reason | None = None
    error: ErrorDetail | msgspec.UnsetType = msgspec.UNSET


class BatchAnswer(msgspec.Struct, omit_defaults=True):
    """One result for each prompt, in their order."""

    model: str
    results: list[BatchResult]
    unknown_candidates: UnknownCandidates
    ambiguous_candidates: AmbiguousCandidates = {}


class KeysAnswer(msgspec.Struct):
    """The keys of a prompt's full blocks, to be given to /v1/match instead of the tokens."""

    model: str
    block_size: int
    tokens: int
    keys: Annotated[
        list[Annotated[int, Meta(extra_json_schema={"minimum": 0, "maximum": 2**64 - 1})]],
        Meta(description="Unsigned 64-bit integers, which JavaScript and the like can't read exactly."),
    ]
    keys_b64: PackedKeys
