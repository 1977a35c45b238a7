"""What has broken real indexers and concerns the index: one test a trap, by its number in the list of traps."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from kvindexer.errors import WireError
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import HolderMatch, IndexLimits
from kvindexer.types import Keyspace, SourceSpec, Tier
from oracle import Event, Prompt, cleared, payload, placeholder, removed, stored

SIZE = 4
SPACE = Keyspace("default", "tiny", "", SIZE)
PROMPT = Prompt(tuple(range(100, 132)))
HASHES = tuple(range(2**64 - 8, 2**64))
POD = SourceSpec(instance="pod-a", model="tiny", block_size=SIZE, endpoint="tcp://pod-a:5557")
WINDOW: dict[str, Any] = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 6}


@pytest.fixture
def index() -> PyIndex:
    """An index with one source `a`, whose instance is pod-a."""
    made = PyIndex()
    made.attach("a", POD)
    return made


def whole(start: int = 0, end: int = 8, prompt: Prompt = PROMPT, **more: Any) -> Event:
    parent = HASHES[start - 1] if start else None
    return stored(prompt, HASHES[start:end], size=SIZE, start=start, parent=parent, **more)


def ask(index: PyIndex, prompt: Prompt = PROMPT, keyspace: Keyspace = SPACE) -> dict[str, HolderMatch]:
    found = index.match(keyspace, prompt.keys(keyspace.block_size), len(prompt.tokens))
    return {match.instance: match for match in found}


def held(index: PyIndex, prompt: Prompt = PROMPT, instance: str = "pod-a") -> int:
    found = ask(index, prompt).get(instance)
    return found.held if found else 0


def test_trap_2_bytes_and_integers_of_one_hash(index: PyIndex) -> None:
    """CPU events with 32 bytes beside GPU events with integers: the last 8 bytes are the integer."""
    index.apply("a", payload([whole()]))
    wide = [b"\x07" * 24 + value.to_bytes(8, "big") for value in HASHES]
    index.apply("a", payload([placeholder(HASHES[:0], block_hashes=wide[:5])]))
    assert ask(index)["pod-a"].alone == (8, 5, 0, 0)
    index.apply("a", payload([removed(HASHES[:0], block_hashes=wide[3:5], medium="CPU")]))
    assert ask(index)["pod-a"].alone == (8, 3, 0, 0)


def test_trap_2_negative_and_large_integers(index: PyIndex) -> None:
    """Python's own hashes (vLLM 0.9) are signed; the same 64 bits are the same hash."""
    signed = [value - 2**64 for value in HASHES]
    index.apply("a", payload([{**whole(0, 4), "block_hashes": signed[:4]}]))
    index.apply("a", payload([{**whole(4, 8), "parent_block_hash": signed[3]}]))
    assert held(index) == 8
    index.apply("a", payload([removed(signed[6:])]))
    assert held(index) == 6
    assert {entry[4] for entry in index.copies("a")} == set(HASHES[:6])


def test_trap_3_each_blocks_parent_is_the_one_before(index: PyIndex) -> None:
    index.apply("a", payload([whole(0, 3)]))
    index.apply("a", payload([whole(3, 8)]))
    assert held(index) == 8
    other = Prompt((*PROMPT.tokens[:20], 1, 2, 3, 4))
    index.apply("a", payload([stored(other, [77], size=SIZE, start=5, parent=HASHES[4])]))
    assert held(index, other) == 6


def test_trap_3_a_partial_tail_is_no_block(index: PyIndex) -> None:
    tail = [*PROMPT.tokens[:16], 1, 2, 3]
    index.apply("a", payload([whole(0, 4, token_ids=tail)]))
    assert held(index) == 4
    assert held(index, Prompt((*tail, 9))) == 4


@pytest.mark.parametrize("listed", [(), HASHES[5:], HASHES[:3], HASHES[7:]])
def test_trap_3_tokens_of_blocks_that_are_not_listed(index: PyIndex, listed: tuple[int, ...]) -> None:
    """Which blocks the hashes are is not in the event: they bind nothing, and are held all the same."""
    index.apply("a", payload([{**whole(), "block_hashes": list(listed), "extra_keys": None, **WINDOW}]))
    assert ask(index) == {}
    assert index.stats("a").orphans == len(listed)
    index.apply("a", payload([whole(group_idx=1)]))
    assert held(index) == 8
    assert index.stats("a").orphans == 0


def test_trap_4_one_bad_event_costs_itself_only(index: PyIndex) -> None:
    bad: list[Any] = [
        {"type": "BlockStored"},
        {**whole(0, 2), "token_ids": [-1] * 8},
        {**whole(0, 2), "extra_keys": [[3.5], None]},
        {**whole(0, 2), "block_hashes": [b"short"]},
        {"type": "BlockMelted", "block_hashes": [1]},
        7,
        None,
    ]
    events = [whole(0, 4), *bad, whole(4, 8), removed(HASHES[7:])]
    change = index.apply("a", payload(events))
    assert change.skipped == {"bad_event": 6, "unknown_event": 1}
    assert change.events == 3
    assert held(index) == 7


def test_trap_4_one_bad_batch_costs_itself_only(index: PyIndex) -> None:
    index.apply("a", payload([whole(0, 4)]))
    with pytest.raises(WireError):
        index.apply("a", payload([whole(4, 8)])[:40])
    index.apply("a", payload([whole(4, 6)]))
    assert held(index) == 6


def test_trap_5_the_batchs_rank_wins(index: PyIndex) -> None:
    """Blocks belong to the rank that the batch names; those of two ranks are never one prefix."""
    index.apply("a", payload([whole(0, 4)], rank=1))
    index.apply("a", payload([whole(4, 8)], rank=0))
    found = index.match(SPACE, PROMPT.keys(SIZE), len(PROMPT.tokens))
    assert [(match.rank, match.held) for match in found] == [(1, 4)]
    assert index.apply("a", payload([removed(HASHES[:4])], rank=0)).skipped == {"not_held": 4}
    assert index.apply("a", payload([removed(HASHES[:4])], rank=1)).removed == 4
    assert ask(index) == {}


def test_trap_6_a_removal_concerns_its_own_source(index: PyIndex) -> None:
    index.attach("b", replace(POD, instance="pod-b"))
    for name in "ab":
        index.apply(name, payload([whole()]))
    index.apply("a", payload([removed(HASHES)]))
    assert (held(index), held(index, instance="pod-b")) == (0, 8)
    index.apply("b", payload([cleared()]))
    index.apply("a", payload([whole()]))
    assert (held(index), held(index, instance="pod-b")) == (8, 0)


def test_trap_6_one_of_two_copies_removed(index: PyIndex) -> None:
    index.apply("a", payload([whole(), whole(6, 8)]))
    index.apply("a", payload([removed(HASHES[6:])]))
    assert held(index) == 8
    index.apply("a", payload([removed(HASHES[6:])]))
    assert held(index) == 6


def test_trap_6_the_cpu_copy_outlives_the_gpu_copy(index: PyIndex) -> None:
    index.apply("a", payload([whole(), placeholder(HASHES[:5])]))
    index.apply("a", payload([removed(HASHES[::-1])]))
    assert ask(index)["pod-a"].alone == (0, 5, 0, 0)
    index.apply("a", payload([cleared()]))
    assert held(index) == 5


def test_trap_6_a_lower_tier_announces_a_block_once(index: PyIndex) -> None:
    index.apply("a", payload([whole(), placeholder(HASHES), placeholder(HASHES)]))
    index.apply("a", payload([removed(HASHES), removed(HASHES, medium="CPU")]))
    assert held(index) == 0


def test_trap_7_a_cpu_store_after_the_gpu_removal_still_binds(index: PyIndex) -> None:
    index.apply("a", payload([whole()]))
    index.apply("a", payload([removed(HASHES)]))
    assert held(index) == 0
    index.apply("a", payload([placeholder(HASHES[:6])]))
    assert ask(index)["pod-a"].alone == (0, 6, 0, 0)


@pytest.mark.parametrize("medium", ["CPU", "STORAGE", "OBJ"])
@pytest.mark.parametrize("salted_first", [True, False])
def test_trap_7_a_salted_block_without_extras_shows_itself_to_nobody(
    index: PyIndex, medium: str, *, salted_first: bool
) -> None:
    """Below the GPU vLLM 0.32 leaves the salt out: the block must keep, or wait for, its salted meaning."""
    salted = PROMPT._replace(salt="tenant-1")
    told = whole(prompt=salted)
    silent = {**told, "medium": medium, "extra_keys": None}
    if salted_first:
        index.apply("a", payload([told]))
    index.apply("a", payload([silent]))
    assert held(index, PROMPT) == 0
    assert held(index, salted) == (8 if salted_first else 0)
    index.apply("a", payload([told]))
    assert held(index, PROMPT) == 0
    assert held(index, salted) == 8
    index.apply("a", payload([cleared()]))
    assert (held(index, PROMPT), held(index, salted)) == (0, 8)


@pytest.mark.parametrize("full_first", [True, False])
def test_trap_7b_the_window_group_may_come_first(index: PyIndex, *, full_first: bool) -> None:
    """One batch: the window's event lists two of eight hashes and cannot say which."""
    window = {**whole(), "block_hashes": list(HASHES[6:]), "extra_keys": [None, None], **WINDOW}
    events = [window, whole(group_idx=1)]
    index.apply("a", payload(events[::-1] if full_first else events))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable, found.unknown_group) == (8, 8, False)
    assert index.stats("a").orphans == 0
    index.apply("a", payload([removed(HASHES[6:7])]))
    assert ask(index)["pod-a"].usable == 0  # held by full attention alone, of no use


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_trap_7b_a_chunk_names_its_last_hash_only(index: PyIndex, *, offloaded_first: bool) -> None:
    index.attach("a", replace(POD, offload_blocks_per_chunk=4))
    events = [whole(), placeholder([HASHES[3], HASHES[7]])]
    for event in events[::-1] if offloaded_first else events:
        index.apply("a", payload([event]))
    assert ask(index)["pod-a"].alone == (8, 8, 0, 0)
    index.apply("a", payload([removed(HASHES), removed([HASHES[7]], medium="CPU")]))
    assert ask(index)["pod-a"].alone == (0, 4, 0, 0)


def test_trap_8_windows_never_count_as_full_attention(index: PyIndex) -> None:
    """The same hashes in both groups; what the window holds does not lengthen what full attention holds."""
    index.apply("a", payload([{**whole(), **WINDOW}, whole(0, 5, group_idx=1)]))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable) == (5, 5)
    assert set(index.copies("a")) == {
        *((0, 0, Tier.GPU, None, each) for each in HASHES),
        *((0, 1, Tier.GPU, None, each) for each in HASHES[:5]),
    }
    index.apply("a", payload([removed(HASHES[3:4])]))  # of the window: blocks 3 and 4 are needed at 5
    assert ask(index)["pod-a"].usable == 3
    index.apply("a", payload([removed(HASHES[2:3], group_idx=1)]))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable) == (2, 2)


def test_trap_8_mamba_needs_its_boundary(index: PyIndex) -> None:
    """A state is kept here and there: a prefix is of use up to the last one that full attention reaches."""
    state: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "mamba"}
    index.apply("a", payload([whole(0, 7), whole(3, 4, **state), whole(7, 8, **state)]))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable, found.cached) == (7, 4, 4)
    index.apply("a", payload([whole(7, 8)]))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable, found.cached) == (8, 8, 4)  # the engine computes the last block again


def test_trap_8_a_kind_of_tomorrow_is_flagged(index: PyIndex) -> None:
    index.apply("a", payload([whole(), whole(0, 6, group_idx=1, kv_cache_spec_kind="of_tomorrow")]))
    found = ask(index)["pod-a"]
    assert (found.held, found.usable, found.unknown_group) == (6, 6, True)


@pytest.mark.parametrize(
    "other",
    [
        PROMPT._replace(salt="blue"),
        PROMPT._replace(salt="red"),
        PROMPT._replace(lora="blue"),
        PROMPT._replace(lora="red"),
        PROMPT._replace(lora="blue", salt="blue"),
        PROMPT,
    ],
)
def test_trap_9_equal_tokens_in_another_world(index: PyIndex, other: Prompt) -> None:
    """Each of them is one of these, and none is another; a salt may have the text of the LoRA's name."""
    worlds = [
        PROMPT,
        PROMPT._replace(salt="blue"),
        PROMPT._replace(lora="blue"),
        PROMPT._replace(lora="blue", salt="blue"),
        PROMPT._replace(salt="red"),
        PROMPT._replace(lora="red"),
    ]
    index.apply("a", payload([whole(prompt=other)]))
    assert [world for world in worlds if held(index, world)] == [other]


def test_trap_9_another_tenant_model_or_deployment(index: PyIndex) -> None:
    index.apply("a", payload([whole()]))
    others = [SPACE._replace(tenant="o"), SPACE._replace(model="o"), SPACE._replace(additional_salt="o")]
    assert [ask(index, keyspace=other) for other in others] == [{}, {}, {}]
    index.attach("b", replace(POD, instance="pod-b", tenant="other"))
    index.apply("b", payload([placeholder(HASHES, medium="GPU")]))
    assert ask(index, keyspace=SPACE._replace(tenant="other")) == {}  # hashes mean nothing across sources
    assert set(ask(index)) == {"pod-a"}


def test_trap_9_a_lora_without_a_name_is_nobodys_base_model(index: PyIndex) -> None:
    """So vLLM below 0.14 sends it."""
    index.apply("a", payload([whole(lora_id=1)]))
    assert held(index) == 0
    assert held(index, PROMPT._replace(lora="1")) == 0
    assert index.stats("a").bindings == 8


def test_trap_10_a_block_stored_again_in_the_middle_of_a_chain(index: PyIndex) -> None:
    """The blocks behind it are still there: they count again at once."""
    index.apply("a", payload([whole()]))
    index.apply("a", payload([removed(HASHES[3:4])]))
    assert held(index) == 3
    index.apply("a", payload([whole(3, 4)]))
    assert held(index) == 8


def test_trap_10_a_placeholder_fills_the_hole_too(index: PyIndex) -> None:
    index.apply("a", payload([whole()]))
    index.apply("a", payload([removed(HASHES[3:4])]))
    index.apply("a", payload([placeholder(HASHES[3:4])]))
    found = ask(index)["pod-a"]
    assert (found.held, found.alone) == (8, (3, 0, 0, 0))


ROUNDS, CHAINS, CHAIN, LIVE = 7, 2_500, 8, 250
"""The churn: rounds of so many chains of blocks, of which the newest few stay; a million stores and removals."""
BOUNDS = IndexLimits(max_dead_bindings_per_source=4_000, max_orphans_per_source=500)


def containers(index: PyIndex) -> dict[str, list[Collection[object]]]:
    """Everything in the index that grows with what it is told."""
    spaces, shares = list(index._spaces.values()), list(index._shares.values())
    slots = [slot for space in spaces for slot in space.slots if slot is not None]
    places = [place for share in shares for place in share.places.values()]
    domains = {share.domain for share in shares}
    return {
        "keys": [holders for space in spaces for holders in space.tiers],
        "masks": [space._masks for space in spaces],
        "aliases": [aliases for slot in slots for aliases in slot.aliases],
        "slots": [space.slots for space in spaces],
        "places": [share.places for share in shares],
        "copies": [place.copies for place in places],
        "covers": [place.covers for place in places],
        "bindings": [domain.bindings for domain in domains],
        "parents": [domain.parents or {} for domain in domains],
        "dead": [domain.dead for domain in domains],
        "unbound": [domain.unbound for domain in domains],
        "waiting": [domain.waiting for domain in domains],
        "links": [children for domain in domains for children in domain.waiting.values()],
        "elsewhere": [domain.elsewhere for domain in domains],
    }


def sizes(index: PyIndex) -> dict[str, int]:
    return {name: sum(map(len, each)) for name, each in containers(index).items()}


def memory(index: PyIndex) -> int:
    """Bytes of all tables."""
    return sum(sys.getsizeof(table) for each in containers(index).values() for table in each)


def churn(number: int) -> tuple[list[Event], list[Event]]:
    """A chain that comes, and its removal: on GPU and CPU, blocks of two hashes, one whose parent is never told."""
    first = number * 4 * CHAIN + 1
    hashes = list(range(first, first + CHAIN))
    prompt = Prompt(tuple(range(first, first + 4 * CHAIN)))
    again = [each + CHAIN for each in hashes[:2]]
    lost = first + 2 * CHAIN
    come = [
        stored(prompt, hashes, size=SIZE),
        stored(prompt, again, size=SIZE),
        placeholder(hashes[1::2]),
        stored(prompt, [lost], size=SIZE, start=1, parent=lost + 1),
    ]
    go = [removed([each]) for each in hashes[::-1]]
    return come, [*go, removed([*again, lost]), removed(hashes[1::2], medium="CPU")]


def test_trap_29_memory_comes_back_after_long_churn() -> None:
    """Each container stays as it was after the first rounds, and so does memory; with the last source all is gone."""
    index = PyIndex(BOUNDS)
    index.attach("a", replace(POD, offload_blocks_per_chunk=2))
    index.attach("b", replace(POD, instance="pod-b"))
    index.attach("shared", replace(POD, instance="shared", type="store", tier="remote", readers=("pod-b",)))
    counts: list[dict[str, int]] = []
    taken: list[int] = []
    for round_ in range(ROUNDS):
        for number in range(round_ * CHAINS, (round_ + 1) * CHAINS):
            events = payload([*churn(number)[0], *churn(number - LIVE)[1]])
            for name in "ab":
                index.apply(name, events)
        counts.append(sizes(index))
        taken.append(memory(index))
    assert counts[-1] == counts[2]
    assert max(taken[3:]) <= 1.1 * max(taken[:3])
    for name in "ab":
        index.apply(name, payload([event for n in range(LIVE) for event in churn(ROUNDS * CHAINS - LIVE + n)[1]]))
    left = sizes(index)
    assert [left[name] for name in ("keys", "aliases", "copies", "covers", "unbound")] == [0] * 5
    assert left["bindings"] == left["dead"] <= 3 * BOUNDS.max_dead_bindings_per_source
    assert left["masks"] < 10
    assert index._entries == 0
    for name in ("a", "b", "shared"):
        index.detach(name)
    assert set(sizes(index).values()) == {0}
