"""What the service answers, as typed and frozen structs; /docs of a running service describes every field.

They are the client's own: the service's structs stand beside its routes, and those import a server.  A test holds
the two together.  Fields that a newer service adds are ignored.
"""

from __future__ import annotations

import msgspec

from kvindexer.client.prompts import Keys


class TierTokens(msgspec.Struct, frozen=True):
    """Leading tokens on one tier by itself, and together with the nearer ones."""

    tokens: int
    cumulative_tokens: int


class Tiers(msgspec.Struct, frozen=True):
    """Leading tokens by tier."""

    gpu: TierTokens
    cpu: TierTokens
    disk: TierTokens
    remote: TierTokens


class RankFigures(msgspec.Struct, frozen=True):
    """What one rank has of a prompt."""

    block_size: int
    matched_tokens: int
    cached_tokens: int
    score: float
    tiers: Tiers


class Match(msgspec.Struct, frozen=True):
    """What one instance has of a prompt."""

    instance: str
    block_size: int
    matched_tokens: int
    cached_tokens: int
    score: float
    tiers: Tiers
    ranks: dict[str, int]
    state: str
    sound: bool
    complete: bool
    lag_ms: float
    verified_ms: float | None
    candidate: str | None = None
    """As `candidates` spelled it."""
    by_rank: dict[str, RankFigures] | None = None
    speculative_tokens: int | None = None
    """How far it will get when what was routed to it has arrived; None: nothing of the model is on its way."""


class MatchAnswer(msgspec.Struct, frozen=True):
    """Instances that hold a prefix of the prompt, best first."""

    model: str
    blocks: int
    tokens: int
    matches: list[Match]
    unknown_candidates: list[str]
    ambiguous_candidates: dict[str, list[str]] = {}
    reason: str | None = None


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong, and what to do about it."""

    code: str
    message: str
    hint: str = ""


class BatchResult(msgspec.Struct, frozen=True):
    """The answer to one prompt of a batch, or its `error`."""

    blocks: int = 0
    tokens: int = 0
    matches: list[Match] = []
    reason: str | None = None
    error: ErrorDetail | None = None


class BatchAnswer(msgspec.Struct, frozen=True):
    """A result for each prompt, in their order."""

    model: str
    results: list[BatchResult]
    unknown_candidates: list[str]
    ambiguous_candidates: dict[str, list[str]] = {}


class KeysAnswer(msgspec.Struct, frozen=True):
    """The keys of a prompt's full blocks."""

    model: str
    block_size: int
    tokens: int
    keys: list[int]

    def prompt(self) -> Keys:
        """Them as a prompt, to ask about again."""
        return Keys(self.keys, tokens=self.tokens, block_size=self.block_size)


class RoutedAnswer(msgspec.Struct, frozen=True):
    """What was noted of a prompt on its way."""

    model: str
    instance: str
    tokens: int
    speculative_tokens: int
    ttl_s: float


class FeedbackAnswer(msgspec.Struct, frozen=True):
    """How a prediction came out: `exact`, `over` or `under`."""

    instance: str
    outcome: str
    counted: bool
    doubted: int


class Holder(msgspec.Struct, frozen=True):
    """One copy of a block, with an `instance` or in a `store`."""

    tier: str
    state: str
    sound: bool
    complete: bool
    instance: str | None = None
    rank: int | None = None
    store: str | None = None
    readers: list[str] | None = None
    reach: str | None = None


class LocatedBlock(msgspec.Struct, frozen=True):
    """One block and its holders, nearest first."""

    status: str
    holders: list[Holder]
    hash: int | None = None
    key: int | None = None


class LocateAnswer(msgspec.Struct, frozen=True):
    """Each block, in the order of the request."""

    model: str
    blocks: list[LocatedBlock]
    unknown: int


class CopiesByTier(msgspec.Struct, frozen=True):
    """Others that have the block."""

    gpu: int
    cpu: int
    disk: int
    remote: int


class PlannedBlock(msgspec.Struct, frozen=True):
    """One block, and whether to `drop`, `offload` or `keep` it."""

    hash: int
    key: int | None
    held: bool
    copies: CopiesByTier
    last_copy: bool | None
    heat: float | None
    advice: str
    reason: str


class PlanAnswer(msgspec.Struct, frozen=True):
    """Advice for each block, in the order of the request."""

    instance: str
    tier: str
    blocks: list[PlannedBlock]


class HolderOfBlock(msgspec.Struct, frozen=True):
    """One place where a block lies."""

    instance: str
    rank: int
    tier: str


class HotPrefix(msgspec.Struct, frozen=True):
    """A prefix that several prompts share; `key` is that of its last block."""

    key: int
    block_size: int
    tokens: int
    asked_per_minute: float
    holders: list[HolderOfBlock]


class PrefixesAnswer(msgspec.Struct, frozen=True):
    """The prefixes whose tokens are asked for most."""

    model: str
    error_per_minute: float
    prefixes: list[HotPrefix]


class SingleCopy(msgspec.Struct, frozen=True):
    """A prefix whose last block lies in one place only."""

    key: int
    block_size: int
    tokens: int
    asked_per_minute: float
    holder: HolderOfBlock


class SingleAnswer(msgspec.Struct, frozen=True):
    """What to replicate, hottest first."""

    model: str
    blocks: list[SingleCopy]


class PrewarmAnswer(msgspec.Struct, frozen=True):
    """What an instance should load first."""

    model: str
    instance: str
    prefixes: list[HotPrefix]


class Registered(msgspec.Struct, frozen=True):
    """The publisher is followed."""

    status: str
    instance_id: str | None = None


class Unregistered(msgspec.Struct, frozen=True):
    """The publishers are forgotten: instance|tenant|rank each."""

    status: str
    removed_instances: list[str] | None = None
