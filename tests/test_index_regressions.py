"""One test per defect that the index has had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from copying import copy
from kvindexer.index import topology
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import HolderMatch, IndexLimits
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier
from oracle import Prompt, cleared, payload, placeholder, removed, stored

SIZE = 4
SPACE = Keyspace("default", "tiny", "", SIZE)
PROMPT = Prompt(tuple(range(100, 148)))
HASHES = tuple(range(1, 13))
POD = SourceSpec(instance="pod-a", model="tiny", block_size=SIZE, endpoint="tcp://pod-a:5557")
NONE = (0, 0, 0, 0)
STORE = replace(POD, instance="store", type="store", endpoint="tcp://store:1", tier="remote", readers=("pod-a",))


def whole(start: int = 0, end: int = 12, size: int = SIZE, **more: Any) -> dict[str, Any]:
    hashes, parent = HASHES[start:end], HASHES[start - 1] if start else None
    return stored(PROMPT, hashes, size=size, start=start, parent=parent, **more)


def ask(index: PyIndex, size: int = SIZE, instance: str = "pod-a") -> HolderMatch | None:
    found = index.match(SPACE._replace(block_size=size), PROMPT.keys(size), len(PROMPT.tokens), [instance])
    return found[0] if found else None


def held(index: PyIndex, size: int = SIZE, instance: str = "pod-a") -> int:
    found = ask(index, size, instance)
    return found.held if found else 0


def test_orphans_of_another_block_size_can_be_removed() -> None:
    """Their removal was looked for in the registered block size, so they stayed for ever."""
    index = PyIndex()
    index.attach("s", POD)
    index.apply("s", payload([whole(1, 4, size=8)]))
    change = index.apply("s", payload([removed(HASHES[1:3])]))
    assert (change.removed, change.skipped) == (2, {})
    index.apply("s", payload([whole(0, 1, size=8)]))
    assert held(index, size=8) == 1
    assert len(index.copies("s")) == 2


def test_a_hash_stays_in_the_block_size_it_was_bound_in() -> None:
    """A store that named another size (a chunk's) for a bound hash showed it in a keyspace it does not belong to."""
    index = PyIndex()
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 4)]))
    index.apply("s", payload([placeholder(HASHES[:4], block_size=8)]))
    found = ask(index)
    assert found is not None
    assert found.alone == (4, 4, 0, 0)
    index.apply("s", payload([removed(HASHES[:4], medium="CPU")]))
    assert index.stats("s").blocks == (4, 0, 0, 0)


def test_orphans_that_move_to_their_block_size_are_shown_once() -> None:
    """Shown twice, they stayed in answers after their removal."""
    index = PyIndex()
    index.attach("s", POD)
    index.apply("s", payload([placeholder(HASHES[:3])]))
    for block in range(3):
        index.apply("s", payload([whole(block, block + 1, size=8)]))
    found = ask(index, size=8)
    assert found is not None
    assert found.alone == (3, 3, 0, 0)
    change = index.apply("s", payload([removed(HASHES[:3], medium="CPU"), removed(HASHES[:3])]))
    assert change.skipped == {}
    assert index.locate(SPACE._replace(block_size=8), PROMPT.keys(8)[:3]) == [[], [], []]


@pytest.mark.parametrize("late", ["parent", "chain"])
def test_a_chunk_announced_before_its_binding_covers_its_blocks(late: str) -> None:
    """It covered only its last block: the links to the blocks before were noted after the binding."""
    index = PyIndex()
    index.attach("s", replace(POD, offload_blocks_per_chunk=3))
    index.apply("s", payload([placeholder(HASHES[2:3]), placeholder(HASHES[5:6])]))
    if late == "parent":
        index.apply("s", payload([whole(1, 6)]))
        index.apply("s", payload([whole(0, 1)]))
    else:
        index.apply("s", payload([whole(0, 6)]))
    index.apply("s", payload([removed(HASHES[:6])]))
    found = ask(index)
    assert found is not None
    assert found.alone == (0, 6, 0, 0)
    index.apply("s", payload([removed(HASHES[2:3], medium="CPU")]))
    assert held(index) == 0


def test_a_block_bound_when_nobody_holds_it_any_more_is_a_dead_binding() -> None:
    """It stayed for ever: neither held nor among the dead bindings that a bound forgets."""
    index = PyIndex(IndexLimits(max_dead_bindings_per_source=4))
    index.attach("s", POD)
    for round_ in range(20):
        chain = [1000 * (round_ + 1) + n for n in range(3)]
        prompt = Prompt(tuple(range(1000 * round_, 1000 * round_ + 12)))
        later = stored(prompt, chain[1:], size=SIZE, start=1, parent=chain[0])
        first = stored(prompt, chain[:1], size=SIZE)
        index.apply("s", payload([later, removed(chain[1:])]))
        index.apply("s", payload([first, removed(chain[:1])]))
    assert index.stats("s").bindings <= 4


def test_dead_bindings_go_least_recently_used_first() -> None:
    """A hash that was stored and removed again kept its first place in the queue."""
    index = PyIndex(IndexLimits(max_dead_bindings_per_source=2))
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 2), removed(HASHES[:1]), removed(HASHES[1:2])]))
    index.apply("s", payload([whole(0, 1), removed(HASHES[:1])]))
    other = stored(Prompt((9, 9, 9, 9)), [77], size=SIZE)
    index.apply("s", payload([other, removed([77])]))
    index.apply("s", payload([placeholder([HASHES[0], 77])]))
    assert index.stats("s").orphans == 0


@pytest.mark.parametrize("tail", [[cleared()], [cleared(), whole(0, 2)], [removed(HASHES[:2]), cleared()]])
def test_entries_are_counted_right_when_a_batch_stores_before_a_reset(tail: list[dict[str, Any]]) -> None:
    """Entries in all drifted below zero, and the bound with them."""
    index = PyIndex(IndexLimits(max_entries=12))
    index.attach("s", POD)
    for _ in range(5):
        index.apply("s", payload([whole(0, 12), *tail]))
    index.attach("t", replace(POD, instance="pod-b"))
    index.apply("t", payload([whole(0, 12)]))
    assert sum(sum(index.stats(name).blocks) for name in "st") <= 12


def test_too_many_orphans_of_one_member_cost_another_member_nothing() -> None:
    """An engine lost bound entries when a store that it reads held too many orphans."""
    index = PyIndex(IndexLimits(max_orphans_per_source=3))
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 6)]))
    index.attach("t", replace(POD, instance="pod-b"))
    index.attach("shared", replace(STORE, readers=("pod-a", "pod-b")))
    change = index.apply("shared", payload([placeholder(range(500, 520), medium="OBJ")]))
    assert change.skipped["over_bound"] == 11
    index.detach("t")  # now the store has more than the two that are left may have
    assert index.apply("s", payload([whole(0, 1)])).skipped == {}
    assert held(index) == 6
    assert index.stats("s").truncated is False


def test_only_a_source_that_lost_entries_is_truncated() -> None:
    """The least trusted source was, even with nothing to give; and the others' loss was counted as one's own."""
    index = PyIndex(IndexLimits(max_entries=6), least_trusted=lambda: ["idle", "old"])
    for name in ("idle", "old", "new"):
        index.attach(name, replace(POD, instance=name))
    index.apply("old", payload([whole(0, 6)]))
    change = index.apply("new", payload([whole(0, 4)]))
    assert change.skipped == {"made_room": 4}
    assert [index.stats(name).truncated for name in ("idle", "old", "new")] == [False, True, False]


def test_bindings_stay_bounded_when_a_member_leaves() -> None:
    index = PyIndex(IndexLimits(max_dead_bindings_per_source=3))
    index.attach("s", POD)
    index.attach("shared", STORE)
    index.apply("s", payload([whole(0, 12)]))
    index.detach("s")
    assert index.stats("shared").bindings <= 3


def test_a_loaded_share_of_a_domain_leaves_no_bindings_for_ever() -> None:
    """What only the other members of the domain held was bound on loading, held by nobody, and never forgotten."""
    limits = IndexLimits(max_dead_bindings_per_source=3)
    index = PyIndex(limits)
    index.attach("s", POD)
    index.attach("shared", STORE)
    index.apply("s", payload([whole(0, 12)]))
    index.apply("shared", payload([placeholder(HASHES[:2], medium="OBJ")]))
    other = PyIndex(limits)
    other.attach("shared", STORE)
    copy(index, other, "shared")
    other.apply("shared", payload([removed([999], medium="OBJ")]))
    assert other.stats("shared").bindings <= 5


def test_a_loaded_share_keeps_to_the_bounds() -> None:
    index = PyIndex()
    index.attach("s", POD)
    index.apply("s", payload([whole(0, 12)]))
    small = PyIndex(IndexLimits(max_entries_per_source=5))
    small.attach("s", POD)
    copy(index, small, "s")
    assert small.stats("s").blocks == (5, 0, 0, 0)
    assert small.stats("s").truncated


def test_a_restarted_engine_may_have_other_groups() -> None:
    """The groups of its former life were still asked for, so it held nothing for ever."""
    index = PyIndex()
    index.attach("s", POD)
    index.apply("s", payload([whole(group_idx=0), whole(group_idx=1)], rank=0))
    index.apply("s", payload([placeholder(HASHES[:2], group_idx=1)], rank=0))
    index.withdraw("s")
    index.apply("s", payload([whole(group_idx=0)]))
    for loaded in (False, True):
        if loaded:
            first, index = index, PyIndex()
            index.attach("s", POD)
            copy(first, index, "s")
        found = ask(index)
        assert found is not None
        assert found.held == 12
        assert found.cached == 11  # and no word of a connector in this life
    index.withdraw("s", [Tier.CPU])
    assert held(index) == 12


def test_a_removal_makes_no_place() -> None:
    """Each unknown group or rank in a removal opened a bit for ever."""
    index = PyIndex()
    index.attach("s", POD)
    for number in range(20):
        change = index.apply("s", payload([removed([1], group_idx=number, ownership=str(number))], rank=number))
        assert change.skipped == {"not_held": 1}
    assert len(index._shares["s"].slots) == 1
    assert not index._shares["s"].places


def test_a_model_of_windows_alone_reports_no_more_than_the_engine() -> None:
    """With a connector and nothing below the GPU, a prompt held whole was reported cached whole."""
    index = PyIndex()
    index.attach("s", replace(POD, offload_connector=True))
    index.apply("s", payload([whole(kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=9)]))
    found = ask(index)
    assert found is not None
    assert (found.usable, found.cached) == (12, 11)


def test_a_store_without_a_medium_is_remote_wherever_it_says_it_is() -> None:
    """`locality: LOCAL` without a medium put a store's blocks on a GPU."""
    index = PyIndex()
    index.attach("s", POD)
    index.attach("shared", replace(STORE, tier=None))
    index.apply("shared", payload([placeholder([1], medium=None, locality="LOCAL")]))
    assert [entry[2] for entry in index.copies("shared")] == [Tier.REMOTE]
    index.apply("s", payload([whole(0, 1, medium=None, locality="LOCAL")]))
    index.apply("s", payload([whole(1, 2, medium=None, locality="remote")]))
    assert [entry[2] for entry in index.copies("s")] == [Tier.GPU, Tier.REMOTE]


def test_the_rule_of_a_group_may_come_from_any_publisher_of_the_instance() -> None:
    """Only the one attached first was asked, which may be an offload connector that does not know."""
    window: dict[str, Any] = {
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 5,
    }
    index = PyIndex()
    index.attach("offload", POD)
    index.attach("s", POD)
    index.apply("offload", payload([placeholder([900], group_idx=1), placeholder([901])]))
    index.apply("s", payload([whole(), whole(11, 12, **window)]))
    found = ask(index)
    assert found is not None
    assert (found.held, found.usable, found.unknown_group) == (12, 12, False)


def test_a_keyspace_goes_with_the_last_source_of_its_model() -> None:
    """The bindings of a store named block sizes of its readers; their tables stayed when the store had left."""
    index = PyIndex()
    index.attach("s", POD)
    index.attach("shared", STORE)
    index.apply("s", payload([whole(0, 3, size=8)]))
    other = PyIndex()
    other.attach("shared", STORE)
    copy(index, other, "shared")
    other.detach("shared")
    assert other.keyspaces("default", "tiny") == []


def test_hashes_bound_in_another_block_size_outlive_the_member_that_bound_them() -> None:
    """The other members' later blocks were shown in a table that nobody asked."""
    index = PyIndex()
    index.attach("s", POD)
    index.attach("t", replace(POD, instance="pod-b"))
    index.attach("shared", replace(STORE, readers=("pod-a", "pod-b")))
    index.apply("s", payload([whole(0, 3, size=8)]))
    index.detach("s")
    index.apply("t", payload([placeholder(HASHES[:2])]))
    index.apply("t", payload([stored(Prompt(tuple(range(8))), [55], size=8)]))
    found = ask(index, size=8, instance="pod-b")
    assert found is not None
    assert found.held == 2


def test_interned_masks_go_when_a_tier_is_emptied() -> None:
    index = PyIndex()
    names = [f"pod-{n}" for n in range(13)]
    for name in names:
        index.attach(name, replace(POD, instance=name))
    tokens = [Prompt((n, 1, 2, 3)) for n in range(2**13)]
    for bit, name in enumerate(names):
        events = [stored(prompt, [n + 1], size=SIZE) for n, prompt in enumerate(tokens) if n >> bit & 1]
        index.apply(name, payload(events))
    space = index._spaces[SPACE]
    assert len(space._masks) > 5000
    for name in names:
        index.withdraw(name, TIERS)
    assert len(space._masks) <= 4096


def test_matches_that_are_kept_are_those_of_this_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine is may change, and more matches may be made than are kept: answers are those of a new index."""
    made: list[topology.Topology] = []

    def remembered(slots: Iterable[topology.Slot]) -> topology.Topology:
        made.append(topology.Topology(slots))
        return made[-1]

    monkeypatch.setattr(topology, "MAX_MATCHES", 5)
    monkeypatch.setattr("kvindexer.index.space.Topology", remembered)
    index = PyIndex()
    for rank in range(4):
        index.attach(f"s{rank}", replace(POD, rank=rank))
        index.apply(f"s{rank}", payload([whole(0, 3 + 2 * rank)]))
    for speculative in (0, 2, 0):
        index.attach("s0", replace(POD, speculative_blocks=speculative))
        index.apply("s0", payload([whole(0, 3)]))
        for tokens in (48, 20, 48, 9):
            found = index.match(SPACE, PROMPT.keys(SIZE), tokens)
            assert sorted((match.rank, match.held, match.cached) for match in found) == [
                (rank, held, max(0, min(held, (tokens - 1) // SIZE) - (0 if rank else speculative)))
                for rank, held in enumerate((3, 5, 7, 9))
            ]
            assert 1 <= sum(map(len, made[-1].kept.values())) < 5 + len(found)


def test_matches_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "MAX_MATCHES", 5)
    made = topology.Topology([])
    for depth in range(1, 100):
        match = HolderMatch("pod-a", 0, depth, depth, depth, NONE, NONE)
        made.matches(depth, depth)[1] = match
        made.room -= 1
        assert made.matches(depth, depth) == {1: match}
        assert 1 <= sum(map(len, made.kept.values())) <= 5
