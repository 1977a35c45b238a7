"""Why an instance matched as far as it did, and what to do about it: two tables, from situation to reason.

    STOPS   why the match ends where it ends: the first row that applies, and there always is one
    ALSO    what else may have to do with it: every row that applies
    ASKED   why a question has no match at all

A sentence knows only what the caller gave and may know: sources of the own tenant, and blocks under the salts that
the question names.  Of other salts nothing is looked up, so nothing can be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import msgspec

Extras = Literal["none", "some", "in keys"]
"""Whether the prompt came with a LoRA, a cache salt or multimodal items; of keys that can't be known."""

LATE_MS: Final = 250.0
"""Lag from which on it may explain something."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one instance and one prompt; lengths in blocks of `block_size`."""

    blocks: int
    """Full blocks of the prompt."""
    block_size: int
    held: int = 0
    usable: int = 0
    cached: int = 0
    rank: int | None = None
    """Its best rank, whose figures these are; None: no rank holds anything."""
    meets: bool = True
    """It is what `require` insists on."""
    heard: bool = True
    """An event of its sources has come, or they hold something."""
    others: tuple[str, ...] = ()
    """Other instances, and stores that it does not read, that hold the first missing block; the first few."""
    ranks: tuple[int, ...] = ()
    """Other ranks of the instance that do."""
    partly: bool = False
    """The rank holds that block for some of its cache groups, and not for all that need it."""
    remembered: bool = False
    """That block was stored before, and is not held any more."""
    shared: bool = False
    """What is remembered may be another's, with which the instance shares a store."""
    other_size: tuple[int, int] | None = None
    """A block size that was not asked for, and the tokens that the instance holds in blocks of it: more than here."""
    other_lora: int = 0
    """Tokens that it holds for another LoRA, or for none, if that is more than here."""
    registered: tuple[int, ...] = ()
    """Block sizes that its sources are registered with."""
    seen: tuple[int, ...] = ()
    """Further ones, of its events."""
    orphans: int = 0
    chunk: int = 1
    """Blocks that one offloaded chunk covers."""
    unknown_group: bool = False
    extras: Extras = "none"
    state: str = "live"
    sound: bool = True
    complete: bool = True
    why: str = ""
    """What a source that is not live, sound and complete says of itself."""
    lag_ms: float = 0.0


class Row(NamedTuple):
    """One line of a table."""

    reason: str
    applies: Callable[[Situation], bool]
    advice: Callable[[Situation], str]


class Reason(msgspec.Struct):
    """A word for programs and a sentence for people."""

    reason: str
    advice: str


def _listed(names: tuple[str | int, ...]) -> str:
    return ", ".join(map(str, names))


def _nothing(it: Situation) -> bool:
    """Whether none of the prompt is held, and it is not clear why."""
    return it.blocks > 0 and not it.held and it.heard and it.other_size is None


def _because(it: Situation) -> str:
    return f" ({it.why})" if it.why else ""


def _of_others(it: Situation) -> str:
    return f"; it is still held by {_listed(it.others)}" if it.others else ""


STOPS: Final = (
    Row(
        "shorter_than_a_block",
        lambda it: not it.blocks,
        lambda it: f"The prompt has no full block of {it.block_size} tokens, and only full blocks are ever shared.",
    ),
    Row(
        "whole_prompt",
        lambda it: it.usable == it.blocks,
        lambda _: "Every full block of the prompt is held: there is nothing to do.",
    ),
    Row(
        "group_rule",
        lambda it: it.usable < it.held,
        lambda it: (
            f"{it.held} blocks are held, but a cache group of the model (sliding window, Mamba) has only enough for "
            f"{it.usable}: the engine can't reuse more, more cache on that instance is what would help."
        ),
    ),
    Row(
        "gone",
        lambda it: it.state == "gone",
        lambda it: (
            f"Nothing was heard of it for longer than gone_after_s{_because(it)}, so its blocks don't count: see "
            "whether it runs and can be reached, unregister it if it does not."
        ),
    ),
    Row(
        "no_events",
        lambda it: not it.heard,
        lambda it: (
            f"No event has ever come from it{_because(it)}: see that the engine runs with enable_kv_cache_events and "
            "prefix caching, that its endpoint is the registered one, and that it has had a request."
        ),
    ),
    Row(
        "other_block_size",
        lambda it: it.other_size is not None,
        lambda it: (
            f"It holds {it.other_size[1]} tokens of the prompt in blocks of {it.other_size[0]}, and the question is "
            f"about blocks of {it.block_size}: leave block_size away, or give {it.other_size[0]}."
            if it.other_size
            else ""
        ),
    ),
    Row(
        "group_missing",
        lambda it: it.partly,
        lambda _: (
            "It holds the block for some cache groups of the model and not for all that need it: the engine computes "
            "it again."
        ),
    ),
    Row(
        "other_rank",
        lambda it: bool(it.ranks),
        lambda it: (
            f"Rank {_listed(it.ranks)} of it holds the block"
            + (f", and what is before it lies with rank {it.rank}" if it.rank is not None else "")
            + ": a rank can't use what another one holds; keep a conversation on one rank."
        ),
    ),
    Row(
        "other_lora",
        lambda it: it.other_lora > 0,
        lambda it: (
            f"It holds {it.other_lora} tokens of the prompt for another LoRA than the question names, or for none: "
            "give in lora the adapter that the engine is asked for."
        ),
    ),
    Row(
        "removed",
        lambda it: it.remembered,
        lambda it: (
            "The block was stored before"
            + (", here or by one that shares a store with it," if it.shared else " here")
            + f" and has gone since: evicted, reset, or lost with a restart{_of_others(it)}. If that happens often, "
            "the cache is too small for its traffic."
        ),
    ),
    Row(
        "held_by_others",
        lambda it: bool(it.others),
        lambda it: (
            f"It was not stored here as far as is known, it is held by {_listed(it.others)}: route such prompts "
            "there, or let this one compute it."
        ),
    ),
    Row(
        "never_stored",
        lambda _: True,
        lambda _: (
            "Nobody holds the block, and it is not known to have been stored here: the prompt is new from there on, "
            "or its tokens, or what else its blocks depend on, differ from what the engine was sent."
        ),
    ),
)

ALSO: Final = (
    Row(
        "filtered_by_require",
        lambda it: not it.meets,
        lambda _: "It is not what require insists on, so /v1/match leaves it out.",
    ),
    Row(
        "last_block_computed",
        lambda it: it.cached < it.usable,
        lambda it: (
            f"The engine will report {(it.usable - it.cached) * it.block_size} tokens less as cached than match: "
            "without an offload connector it computes at least the last token, and speculative decoding drops a "
            "block; this is normal."
        ),
    ),
    Row(
        "wrong_block_size",
        lambda it: bool(it.seen),
        lambda it: (
            f"It is registered with blocks of {_listed(it.registered)} tokens and its events say {_listed(it.seen)}: "
            "register it with the size of its events."
        ),
    ),
    Row(
        "not_live",
        lambda it: it.state not in ("live", "gone"),
        lambda it: (
            f"Its state is {it.state}{_because(it)}: ask again when it is live, or see in /v1/sources why it is "
            "silent."
        ),
    ),
    Row(
        "not_sound",
        lambda it: not it.sound,
        lambda it: (
            f"What it is said to hold may be gone{_because(it)}: a replay endpoint lets that be repaired, a clear or "
            "restart of the engine settles it."
        ),
    ),
    Row(
        "not_complete",
        lambda it: not it.complete and it.usable < it.blocks,
        lambda it: (
            f"It may hold more than is known{_because(it)}: give it a replay endpoint and a larger buffer_steps, "
            "blocks that are stored from now on are known."
        ),
    ),
    Row(
        "lag",
        lambda it: it.lag_ms >= LATE_MS,
        lambda it: f"Its events wait {it.lag_ms:g} ms to be applied, the newest blocks are not known yet: ask again.",
    ),
    Row(
        "orphans",
        lambda it: it.orphans > 0 and it.usable < it.blocks,
        lambda it: (
            f"{it.orphans} blocks that it holds can't be placed, for the event with their tokens, or with those of "
            "the blocks before them, was missed: a replay endpoint, or registering it before its first request, "
            "keeps that from happening."
        ),
    ),
    Row(
        "chunked_offload",
        lambda it: it.chunk > 1 and it.usable < it.blocks,
        lambda it: (
            f"Below the GPU only the last block of {it.chunk} is announced, and the others count if their own events "
            "were heard: see that offload_blocks_per_chunk is that of the engine."
        ),
    ),
    Row(
        "unknown_group",
        lambda it: it.unknown_group,
        lambda _: (
            "The events don't say of which kind a cache group of the model is (vLLM before 0.22): the match is an "
            "upper bound."
        ),
    ),
    Row(
        "no_extras_given",
        lambda it: it.extras == "none" and _nothing(it),
        lambda _: (
            "The question names no LoRA, cache salt or image: if the engine's request has any, give lora, cache_salt "
            "and multimodal as the engine gets them."
        ),
    ),
    Row(
        "extras_given",
        lambda it: it.extras == "some" and _nothing(it),
        lambda _: (
            "The question names a LoRA, a cache salt or an image, and blocks match only if the engine's request "
            "had just these; vLLM before 0.17 sends no salts and images, before 0.14 no names of LoRAs."
        ),
    ),
    Row(
        "keys_given",
        lambda it: it.extras == "in keys" and _nothing(it),
        lambda it: (
            f"Keys match only if they were made as /v1/keys makes them, in blocks of {it.block_size} tokens and with "
            "the LoRA, cache salt and images of the engine's request: ask with tokens to be sure."
        ),
    ),
)

ASKED: Final = {
    "unknown_model": "No source of this model is registered with this tenant: give model and tenant as registered.",
    "not_listed": "The model's engines are registered by HTTP and have listed no publishers yet: see /v1/sources.",
    "unknown_salt": "The model has no source with this additional_salt: leave it away to look at all deployments.",
    "unknown_block_size": "The model has no blocks of this size: leave block_size away, or give one of block_sizes.",
    "no_instance": "The model has stores and no instance: register the engines that read them.",
    "no_known_candidate": "No candidate is an instance of this model: see unknown_candidates.",
    "shorter_than_a_block": "The prompt has no full block, and only full blocks are ever shared.",
    "filtered_by_require": "Those who hold a part of the prompt are not what require insists on.",
    "nothing_held": "No instance holds the first block: each of them says why below.",
}
"""Why a question has no match, and what to do."""

UNKNOWN: Final = {
    "other_block_size": "It is an instance of the model with blocks of another size: leave block_size away.",
    "other_model": "It is an instance of another model: give the model that it serves, see other_models.",
    "store": "It is a store, which can't be routed to: ask about the instances that read it.",
    "not_registered": "No instance of the model answers to this name: register it, or its name as an alias.",
}
"""Why a candidate is unknown, and what to do."""


def why(situation: Situation) -> tuple[Reason, list[Reason]]:
    """Why the match ends where it does, and what else may have to do with it."""
    stop = next(row for row in STOPS if row.applies(situation))
    also = [row for row in ALSO if row.applies(situation)]
    return _said(stop, situation), [_said(row, situation) for row in also]


def _said(row: Row, situation: Situation) -> Reason:
    return Reason(row.reason, row.advice(situation))
