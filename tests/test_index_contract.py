"""What every index engine must do, through the seam alone: bytes in, small immutable data out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

import recordings
from copying import copy, everything
from kvindexer.errors import WireError
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Binding, HolderMatch, Holding, Index
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier
from oracle import Prompt, cleared, payload, placeholder, removed, stored

ENGINES: dict[str, Callable[[], Index]] = {"python": PyIndex}
SIZE = 4
SPACE = Keyspace("default", "tiny", "", SIZE)
PROMPT = Prompt(tuple(range(100, 140)))
HASHES = tuple(range(2**63, 2**63 + 10))
POD = SourceSpec(instance="pod-a", model="tiny", block_size=SIZE, endpoint="tcp://pod-a:5557")
STORE = replace(POD, instance="store", type="store", endpoint="tcp://store:1", tier="remote", readers=("pod-a",))


@pytest.fixture(params=list(ENGINES.values()), ids=list(ENGINES))
def make_index(request: pytest.FixtureRequest) -> Callable[[], Index]:
    factory: Callable[[], Index] = request.param
    return factory


@pytest.fixture
def index(make_index: Callable[[], Index]) -> Index:
    return make_index()


def pod(name: str, **more: Any) -> SourceSpec:
    return replace(POD, instance=name, endpoint=f"tcp://{name}:5557", **more)


def whole(start: int = 0, end: int = 10, **more: Any) -> dict[str, Any]:
    """A store of blocks [start, end) of the prompt."""
    return stored(
        PROMPT, HASHES[start:end], size=SIZE, start=start, parent=HASHES[start - 1] if start else None, **more
    )


def ask(
    index: Index, prompt: Prompt = PROMPT, candidates: Sequence[str] | None = None, keyspace: Keyspace = SPACE
) -> dict[tuple[str, int], HolderMatch]:
    found = index.match(keyspace, prompt.keys(keyspace.block_size), len(prompt.tokens), candidates)
    answers = {(match.instance, match.rank): match for match in found}
    assert len(answers) == len(found)
    return answers


def test_the_worked_example_of_the_design(index: Index) -> None:
    """GPU holds blocks 0-3, CPU 2-7, of 10."""
    index.attach("s", POD)
    index.apply("s", payload([whole(), removed(HASHES[4:]), placeholder(HASHES[2:8])]))
    match = ask(index)["pod-a", 0]
    assert match.held == match.usable == 8
    assert match.alone == (4, 0, 0, 0)
    assert match.cumulative == (4, 8, 8, 8)
    assert match.cached == 8  # the connector goes on where the GPU ends
    assert match.unknown_group is False


def test_a_batch_says_what_it_did(index: Index) -> None:
    index.attach("s", POD)
    change = index.apply("s", payload([whole(0, 3), removed(HASHES[2:4])]))
    assert (change.events, change.stored, change.removed) == (2, 3, 1)
    assert change.skipped == {"not_held": 1}
    assert set(change.touched) >= set(HASHES[:3])
    assert (change.cleared, change.uncertain) == ((), ())
    assert index.copies("s") == {(0, 0, Tier.GPU, None, each): 1 for each in HASHES[:2]}


def test_a_batch_names_the_orphans_that_it_binds(index: Index) -> None:
    """Whoever copies the index learns that their records have a key now."""
    index.attach("s", POD)
    index.apply("s", payload([placeholder(HASHES[5:7])]))
    change = index.apply("s", payload([whole(0, 8)]))
    assert set(change.touched) >= set(HASHES[:8])
    later = index.apply("s", payload([placeholder([1234])]))
    assert list(later.touched) == [1234]
    orphaned = index.apply("s", payload([whole(0, 2), removed(HASHES[:1])]))
    assert set(orphaned.touched) == set(HASHES[:2])


def test_bytes_that_are_no_batch_are_an_error_and_change_nothing(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole()]))
    before = everything(index, "s")
    for bad in (b"", b"\xc1", msgpack.packb({"events": []}), payload([whole()])[:-7]):
        with pytest.raises(WireError):
            index.apply("s", bad)
    assert everything(index, "s") == before


def test_a_bad_event_is_counted_and_costs_nothing_else(index: Index) -> None:
    index.attach("s", POD)
    too_few = whole(0, 2, extra_keys=[None])
    too_large = whole(0, 2, token_ids=[2**32] * 8)
    change = index.apply("s", payload([{"type": "Melted"}, too_few, {"type": "BlockStored"}, too_large, whole(0, 1)]))
    assert change.skipped == {"unknown_event": 1, "bad_event": 3}
    assert change.stored == 1
    assert ask(index)["pod-a", 0].held == 1


@pytest.mark.parametrize("call", ["copies", "stats", "hashes", "facts", "withdraw"])
def test_unknown_sources_are_key_errors(index: Index, call: str) -> None:
    with pytest.raises(KeyError):
        getattr(index, call)("nobody")
    with pytest.raises(KeyError):
        index.records("nobody", [])


def test_payloads_of_unknown_and_detached_sources_add_nothing(index: Index) -> None:
    assert index.apply("s", payload([whole()])).skipped == {"unknown_source": 1}
    index.attach("s", POD)
    index.apply("s", payload([whole()]))
    index.detach("s")
    index.detach("s")
    assert index.apply("s", payload([whole()])).stored == 0
    assert ask(index) == {}
    assert index.keyspaces("default", "tiny") == []
    assert not index.instances(SPACE)


def test_attach_again_forgets_what_was(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole()]))
    index.attach("s", pod("pod-b"))
    assert ask(index) == {}
    assert index.copies("s") == {}
    index.apply("s", payload([placeholder(HASHES[:2])]))
    assert ask(index) == {}  # what the hashes meant was forgotten too
    index.apply("s", payload([whole()]))
    assert set(ask(index)) == {("pod-b", 0)}


def test_the_batchs_rank_wins_and_ranks_are_never_united(index: Index) -> None:
    index.attach("s", replace(POD, rank=3))
    index.apply("s", payload([whole(0, 4)]))
    index.apply("s", payload([whole(0, 6)], rank=1))
    index.apply("s", payload([whole(6, 9)], rank=3))
    answers = ask(index)
    assert {rank: match.held for (_, rank), match in answers.items()} == {3: 4, 1: 6}
    change = index.apply("s", payload([cleared()], rank=1))
    assert change.cleared == (Tier.GPU,)
    assert set(ask(index)) == {("pod-a", 3)}


def test_candidates_restrict_the_answer(index: Index) -> None:
    for name in ("pod-a", "pod-b", "pod-c"):
        index.attach(name, pod(name))
        index.apply(name, payload([whole()]))
    assert set(ask(index)) == {("pod-a", 0), ("pod-b", 0), ("pod-c", 0)}
    assert set(ask(index, candidates=["pod-b", "nobody"])) == {("pod-b", 0)}
    assert ask(index, candidates=[]) == {}
    assert set(index.instances(SPACE)) == {"pod-a", "pod-b", "pod-c"}


def test_locate_names_each_place_once(index: Index) -> None:
    """Stores are named too; the groups of a hybrid model are one holding."""
    index.attach("s", POD)
    index.attach("shared", STORE)
    index.apply("s", payload([whole(0, 2), whole(0, 2, group_idx=1), placeholder(HASHES[:1])]))
    index.apply("shared", payload([placeholder(HASHES[1:2], medium=None)]))
    keys = PROMPT.keys(SIZE)
    first, second, third = index.locate(SPACE, keys[:3])
    gpu, cpu = Holding("s", "pod-a", 0, Tier.GPU, (0, 1)), Holding("s", "pod-a", 0, Tier.CPU)
    assert sorted(first) == [gpu, cpu]
    assert sorted(second) == [gpu, Holding("shared", "store", 0, Tier.REMOTE)]
    assert third == []
    assert index.locate(SPACE._replace(model="other"), keys[:2]) == [[], []]


def test_withdraw_drops_the_named_tiers_and_counts(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 6), placeholder(HASHES[:4]), placeholder(HASHES[:2], medium="STORAGE")]))
    assert index.stats("s").blocks == (6, 4, 2, 0)
    assert index.withdraw("s", [Tier.GPU, Tier.CPU]) == 10
    assert index.stats("s").blocks == (0, 0, 2, 0)
    assert ask(index)["pod-a", 0].alone == (0, 0, 2, 0)
    assert index.withdraw("s") == 2
    assert index.withdraw("s") == 0
    assert ask(index) == {}


def test_stats_tell_entries_bindings_and_orphans(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 4), whole(6, 9), removed(HASHES[:1])]))
    stats = index.stats("s")
    assert stats.blocks == (6, 0, 0, 0)
    assert stats.bindings == 4
    assert stats.orphans == 3
    assert stats.truncated is False
    index.apply("s", payload([whole(4, 6)]))
    assert index.stats("s").orphans == 0


def test_a_reset_clears_the_gpu_and_leaves_lower_tiers_in_doubt(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 4), placeholder(HASHES[:2])]))
    change = index.apply("s", payload([cleared()]))
    assert (change.cleared, change.uncertain) == ((Tier.GPU,), (Tier.CPU,))
    assert index.stats("s").blocks == (0, 2, 0, 0)
    index.attach("t", pod("pod-b", clear_lower_tiers=True))
    index.apply("t", payload([whole(0, 4), placeholder(HASHES[:2])]))
    change = index.apply("t", payload([cleared()]))
    assert (change.cleared, change.uncertain) == (TIERS, ())
    assert index.stats("t").blocks == (0, 0, 0, 0)


def test_a_stores_reset_drops_all_its_tiers(index: Index) -> None:
    index.attach("shared", STORE)
    index.apply("shared", payload([whole(0, 4), placeholder(HASHES[:2])]))
    assert index.apply("shared", payload([cleared()])).cleared == TIERS
    assert index.copies("shared") == {}


@pytest.mark.parametrize("store_first", [True, False])
def test_a_stores_blocks_count_for_its_readers_only(index: Index, *, store_first: bool) -> None:
    specs = {"s": POD, "t": pod("pod-b"), "shared": STORE}
    for name in sorted(specs, key=lambda name: (specs[name].type == "store") is not store_first):
        index.attach(name, specs[name])
    index.apply("s", payload([whole(0, 4), removed(HASHES[2:4])]))
    index.apply("t", payload([whole(0, 3)]))
    index.apply("shared", payload([placeholder(HASHES[:4], medium=None)]))
    answers = ask(index)
    assert set(answers) == {("pod-a", 0), ("pod-b", 0)}  # the store is no routing target
    assert answers["pod-a", 0].alone == (2, 0, 0, 4)
    assert answers["pod-a", 0].cumulative == (2, 2, 2, 4)
    assert answers["pod-b", 0].held == 3
    index.detach("shared")
    assert ask(index)["pod-a", 0].held == 2


def test_a_store_attached_after_its_blocks_were_announced_by_a_reader(index: Index) -> None:
    """Hashes that both sides held before they knew of each other resolve at once."""
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 3)]))
    index.attach("shared", STORE)
    index.apply("shared", payload([placeholder(HASHES[:2], medium=None)]))
    index.attach("late", pod("pod-b"))
    index.attach("shared", replace(STORE, readers=("pod-a", "pod-b")))
    index.apply("shared", payload([placeholder(HASHES[:2], medium=None)]))
    answers = ask(index)
    assert answers["pod-a", 0].alone == (3, 0, 0, 2)
    assert answers["pod-b", 0].alone == (0, 0, 0, 2)


def test_a_store_brings_readers_together_that_hold_the_same_hashes(index: Index) -> None:
    """What each of them holds is counted once, also by those who joined the other's domain."""
    index.attach("s", POD)
    index.attach("t", pod("pod-b"))
    index.apply("s", payload([whole(0, 6)]))
    index.apply("t", payload([whole(0, 4), whole(6, 8)]))
    index.attach("shared", replace(STORE, readers=("*",)))
    assert {name: match.held for (name, _), match in ask(index).items()} == {"pod-a": 6, "pod-b": 4}
    index.apply("s", payload([whole(6, 7)]))
    index.apply("t", payload([whole(4, 6)]))
    assert {name: match.held for (name, _), match in ask(index).items()} == {"pod-a": 7, "pod-b": 8}
    for name in ("s", "t"):
        assert index.apply(name, payload([removed(HASHES[1:6])])).skipped == {}
    assert {name: match.held for (name, _), match in ask(index).items()} == {"pod-a": 1, "pod-b": 1}


def test_another_block_size_on_the_wire_is_a_keyspace_of_its_own(index: Index) -> None:
    index.attach("s", POD)
    event = stored(PROMPT, HASHES[:3], size=8)
    change = index.apply("s", payload([event]))
    assert change.skipped == {"other_block_size": 1}
    wide = SPACE._replace(block_size=8)
    assert set(index.keyspaces("default", "tiny")) == {SPACE, wide}
    assert ask(index) == {}
    assert ask(index, keyspace=wide)["pod-a", 0].held == 3
    assert index.stats("s").blocks == (3, 0, 0, 0)
    index.apply("s", payload([removed(HASHES[:3])]))
    assert ask(index, keyspace=wide) == {}


def test_keyspaces_are_found_by_tenant_model_and_salt(index: Index) -> None:
    index.attach("s", POD)
    index.attach("t", pod("pod-b", additional_salt="blue", block_size=8))
    index.attach("u", pod("pod-c", tenant="other"))
    blue = Keyspace("default", "tiny", "blue", 8)
    assert set(index.keyspaces("default", "tiny")) == {SPACE, blue}
    assert index.keyspaces("default", "tiny", "") == [SPACE]
    assert index.keyspaces("default", "tiny", "blue") == [blue]
    assert index.keyspaces("default", "large") == []
    index.detach("t")
    assert index.keyspaces("default", "tiny") == [SPACE]


def test_no_keys_and_unknown_keyspaces_match_nobody(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole()]))
    assert ask(index, Prompt((1, 2, 3))) == {}
    assert ask(index, keyspace=SPACE._replace(tenant="other")) == {}


@pytest.mark.parametrize(
    ("change", "cached"),
    [
        ({}, 9),  # the last block of a prompt that ends with it is computed again
        ({"speculative_blocks": 1}, 8),
        ({"offload_connector": True}, 9),
        ({"speculative_blocks": 20}, 0),
    ],
)
def test_what_the_engine_will_report_as_cached(index: Index, change: dict[str, Any], cached: int) -> None:
    index.attach("s", replace(POD, **change))
    index.apply("s", payload([whole()]))
    match = ask(index)["pod-a", 0]
    assert (match.held, match.cached) == (10, cached)
    assert ask(index, PROMPT._replace(tokens=(*PROMPT.tokens, 7)))["pod-a", 0].cached == min(cached + 1, 10) * bool(
        cached
    )


def test_a_connector_goes_on_below_the_gpu(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([whole(), placeholder(HASHES[9:])]))
    assert ask(index)["pod-a", 0].cached == 10
    index.attach("s", replace(POD, offload_connector=False))
    index.apply("s", payload([whole(), placeholder(HASHES[9:])]))
    assert ask(index)["pod-a", 0].cached == 9


def test_a_connector_gets_no_further_than_the_rules_of_all_groups(index: Index) -> None:
    """Full attention has all blocks below the GPU, the window ends earlier."""
    window = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 6}
    index.attach("s", POD)
    index.apply("s", payload([{**whole(0, 6), **window}, whole(0, 2, group_idx=1)]))
    index.apply("s", payload([placeholder(HASHES, group_idx=1)]))
    match = ask(index)["pod-a", 0]
    assert (match.held, match.usable, match.cached) == (6, 6, 6)  # the rest is not bound yet
    index.apply("s", payload([whole(2, 10, group_idx=1)]))
    match = ask(index)["pod-a", 0]
    assert (match.held, match.usable, match.cached) == (10, 6, 6)
    assert match.alone == (10, 10, 0, 0)


@pytest.mark.parametrize("parts", [1, 3])
def test_records_carry_a_share_to_another_index(make_index: Callable[[], Index], parts: int) -> None:
    one, other = make_index(), make_index()
    for index in (one, other):
        index.attach("s", POD)
    one.apply("s", payload([whole(0, 3), whole(5, 7), placeholder(HASHES[:2]), removed(HASHES[2:3])]))
    copy(one, other, "s", parts)
    assert other.copies("s") == one.copies("s")
    assert other.stats("s") == one.stats("s")
    assert other.facts("s") == one.facts("s")
    assert everything(other, "s") == everything(one, "s")
    for index in (one, other):
        index.apply("s", payload([placeholder(HASHES[2:3]), whole(3, 5)]))
    assert ask(other) == ask(one)
    assert ask(one)["pod-a", 0].held == 7


def test_records_of_what_is_not_held(index: Index) -> None:
    """Nothing of what was never heard of; the key alone of what was removed."""
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 1), removed(HASHES[:1]), placeholder([77]), removed([77], medium="CPU")]))
    assert list(index.hashes("s")) == [HASHES[0]]
    key = PROMPT.keys(SIZE)[0].to_bytes(8, "little")
    assert index.records("s", (HASHES[0], 77, 78)) == [b"\x01" + key, b"", b""]


@pytest.mark.parametrize("junk", [b"\x00", b"\xff", b"\x01\xff", b"\x01" + bytes(8) + b"\x80", b"\x02" + bytes(15)])
def test_a_record_that_cannot_be_read_is_a_value_error(index: Index, junk: bytes) -> None:
    index.attach("s", POD)
    with pytest.raises(ValueError, match="damaged record"):
        index.load("s", [1, 2], [b"\x01" + bytes(9), junk])
    assert index.copies("s") == {}


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", msgpack.packb([99, False, []]), msgpack.packb([1, False, [[0, 0, 0]]])]
)
def test_facts_that_cannot_be_read_are_a_value_error(index: Index, junk: bytes) -> None:
    index.attach("s", POD)
    with pytest.raises(ValueError, match="facts"):
        index.loaded("s", junk)


@pytest.mark.parametrize("name", recordings.WITH_TRUTH)
def test_a_loaded_index_goes_on_like_the_one_that_was_saved(make_index: Callable[[], Index], name: str) -> None:
    """Saved at every seventh frame of a recorded stream, loaded elsewhere: the same ever after."""
    size = 16 if name.startswith("pool") else 32
    spec = replace(POD, block_size=size)
    frames = recordings.frames(name)
    prompts = [
        Prompt(tuple(asked.tokens), asked.lora, asked.salt) for asked in recordings.asked(name) if asked.tokens
    ][::5]
    original, copied = make_index(), make_index()
    original.attach("s", spec)
    for number, frame in enumerate(frames):
        if number % 7 == 3:
            copied = make_index()
            copied.attach("s", spec)
            copy(original, copied, "s")
        change = original.apply("s", frame.payload)
        if number >= 3:
            told = copied.apply("s", frame.payload)
            assert told._replace(touched=change.touched) == change
            assert set(told.touched) == set(change.touched)
            assert copied.copies("s") == original.copies("s")
            assert copied.stats("s") == original.stats("s")
            prompt = prompts[number % len(prompts)]
            space = SPACE._replace(block_size=size)
            assert ask(copied, prompt, keyspace=space) == ask(original, prompt, keyspace=space)


def test_hashes_resolve_inside_their_domain_only(index: Index) -> None:
    """Held or not, by whoever of the domain announced them; another source's equal hashes mean nothing."""
    specs = {"a": POD, "b": pod("pod-b"), "shared": STORE}
    for name, spec in specs.items():
        index.attach(name, spec)
    index.apply("a", payload([whole(0, 3), removed(HASHES[:1])]))
    keys = PROMPT.keys(SIZE)
    assert index.resolve("a", HASHES[:4]) == [*(Binding(key, SIZE) for key in keys[:3]), None]
    assert index.resolve("shared", HASHES[:1]) == [Binding(keys[0], SIZE)]  # pod-a reads the store
    assert index.resolve("b", HASHES[:4]) == [None] * 4
    with pytest.raises(KeyError):
        index.resolve("nobody", HASHES)


def test_hashes_resolve_to_the_block_size_of_their_event(index: Index) -> None:
    index.attach("s", POD)
    index.apply("s", payload([stored(PROMPT, HASHES[:2], size=8)]))
    assert index.resolve("s", HASHES[:1]) == [Binding(PROMPT.keys(8)[0], 8)]


def test_a_block_that_was_held_before_is_remembered(index: Index) -> None:
    index.attach("s", POD)
    key = PROMPT.keys(SIZE)[0]
    assert not index.remembers("s", key)
    index.apply("s", payload([whole()]))
    index.apply("s", payload([removed(HASHES[:1])]))
    assert index.remembers("s", key)
    assert not index.remembers("s", PROMPT.keys(SIZE)[5])
    index.attach("other", pod("pod-b"))
    assert not index.remembers("other", key)
    with pytest.raises(KeyError):
        index.remembers("nobody", key)
