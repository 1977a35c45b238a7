"""What the service answers about itself: its sources, their tiers and health, and why a match is what it is.

As in `client.answers`: typed, frozen, held to the service's own by a test.
"""

from __future__ import annotations

import msgspec


class BlocksByTier(msgspec.Struct, frozen=True):
    """Entries of a source."""

    gpu: int
    cpu: int
    disk: int
    remote: int


class StoredEntry(msgspec.Struct, frozen=True):
    """What Redis held of a source."""

    epoch: int
    seq: int | None
    entries: int


class FeedbackFigures(msgspec.Struct, frozen=True):
    """What /v1/feedback told of a source."""

    exact: int
    over: int
    under: int
    predicted_tokens: int
    cached_tokens: int
    doubts: int


class SourceEntry(msgspec.Struct, frozen=True):
    """One source: where it is, how far it can be trusted and why, what it has sent and what it holds."""

    instance: str
    source: str
    endpoint: str
    replay: str | None
    model: str
    type: str
    rank: int
    tenant: str
    block_size: int
    state: str
    why: str
    sound: bool
    complete: bool
    epoch: int
    seq: int | None
    lag_ms: float
    last_event_s: float | None
    batches: int
    gaps: int
    replays: int
    blocks: BlocksByTier
    orphans: int
    poison: int
    stored: StoredEntry | None
    feedback: FeedbackFigures
    block_sizes: list[int] = []
    aliases: list[str] = []


class Totals(msgspec.Struct, frozen=True):
    """Counters of the whole service."""

    events: int | None
    """None for callers that are bound to a tenant."""
    queries: int | None
    blocks: int


class DiscoveryProblem(msgspec.Struct, frozen=True):
    """Why something is not found, or not followed."""

    reason: str
    where: str
    message: str
    hint: str
    serious: bool


class DiscoveryState(msgspec.Struct, frozen=True):
    """Pods that are looked for."""

    kind: str
    informed: bool
    pods: int
    followed: int
    waiting: int
    contact_s: float | None
    problems: list[DiscoveryProblem]


class SourcesAnswer(msgspec.Struct, frozen=True):
    """All sources, or those that were asked for."""

    sources: list[SourceEntry]
    totals: Totals
    discovery: DiscoveryState | None = None


class ReadyAnswer(msgspec.Struct, frozen=True):
    """Whether queries are answered from a warm index."""

    ready: bool


class TierSize(msgspec.Struct, frozen=True):
    """What lies on one tier; `bytes` are None unless all sources on it say how large their blocks are."""

    blocks: int
    bytes: int | None


class TierSizes(msgspec.Struct, frozen=True):
    """What lies on each tier."""

    gpu: TierSize
    cpu: TierSize
    disk: TierSize
    remote: TierSize


class InstanceTiers(msgspec.Struct, frozen=True):
    """What an instance holds of a model, all ranks together."""

    instance: str
    tiers: TierSizes


class StoreTiers(msgspec.Struct, frozen=True):
    """What a store holds of a model, and who reads it (`*`: all of the model)."""

    store: str
    readers: list[str]
    tiers: TierSizes


class ModelTiers(msgspec.Struct, frozen=True):
    """One model: sums over its instances, each instance, and apart from them the stores."""

    model: str
    tiers: TierSizes
    instances: list[InstanceTiers]
    stores: list[StoreTiers]


class TiersAnswer(msgspec.Struct, frozen=True):
    """The models of a tenant."""

    tenant: str
    models: list[ModelTiers]


class Problem(msgspec.Struct, frozen=True):
    """A source that is not as it should be."""

    source: str
    instance: str
    state: str
    sound: bool
    why: str


class StoreTrouble(msgspec.Struct, frozen=True):
    """Why the durable copy is not as it should be, and what to change."""

    reason: str
    message: str
    hint: str


class StoreHealth(msgspec.Struct, frozen=True):
    """The durable copy of the index."""

    kind: str
    reachable: bool
    replicas: int
    problems: list[StoreTrouble]


class HealthAnswer(msgspec.Struct, frozen=True):
    """`ok`, or `degraded` with what is wrong."""

    status: str
    ready: bool
    sources: dict[str, int]
    unsound: int
    incomplete: int
    problems: list[Problem]
    store: StoreHealth
    access: list[StoreTrouble] = []
    discovery: DiscoveryState | None = None


class Reason(msgspec.Struct, frozen=True):
    """A word for programs and a sentence for people."""

    reason: str
    advice: str


class MissingBlock(msgspec.Struct, frozen=True):
    """The first block of the prompt that the instance does not hold."""

    block: int
    key: int
    held_by: list[str]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One instance: how much of the prompt its best rank has, and why not more."""

    instance: str
    candidate: str | None = None
    block_size: int
    rank: int | None = None
    blocks: int
    held_blocks: int
    matched_blocks: int
    matched_tokens: int
    cached_tokens: int
    missing: MissingBlock | None = None
    reason: str
    advice: str
    also: list[Reason]
    state: str
    sound: bool
    complete: bool
    lag_ms: float


class UnknownCandidate(msgspec.Struct, frozen=True):
    """A candidate that is no instance of the model."""

    candidate: str
    reason: str
    advice: str
    near: list[str] = []
    other_models: list[str] = []


class ExplainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no match at all, if so (`reason`), and each instance, best first."""

    model: str
    blocks: int | None = None
    tokens: int | None = None
    reason: str | None = None
    advice: str | None = None
    near_models: list[str] = []
    block_sizes: list[int] = []
    instances: list[Explained]
    left_out: int = 0
    unknown_candidates: list[UnknownCandidate] = []
    ambiguous_candidates: dict[str, list[str]] = {}
