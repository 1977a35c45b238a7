"""The index at its bounds: never past them, every loss counted and shown, and what is left still true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest

from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Change, IndexLimits
from kvindexer.types import Keyspace, SourceSpec, Tier
from oracle import Event, Oracle, Prompt, payload, placeholder, removed, stored

SIZE = 4
SPACE = Keyspace("default", "tiny", "", SIZE)
POD = SourceSpec(instance="pod-a", model="tiny", block_size=SIZE, endpoint="tcp://pod-a:5557")
STORE = replace(POD, instance="store", type="store", tier="remote", readers=("pod-a", "pod-b"))
BLOCKS = 6


def prompt(number: int) -> Prompt:
    """Every second one shares two blocks with the one before."""
    own = range(1000 * number, 1000 * number + 4 * BLOCKS)
    return Prompt((*range(1000 * (number - 1), 1000 * (number - 1) + 8), *own[8:]) if number % 2 else tuple(own))


def hashes(number: int) -> list[int]:
    shared = 1000 * (number - number % 2)
    return [shared + 1, shared + 2, *range(1000 * number + 503, 1000 * number + 501 + BLOCKS)]


def chain(number: int, start: int = 0, end: int = BLOCKS, **more: Any) -> Event:
    named = hashes(number)
    parent = named[start - 1] if start else None
    return stored(prompt(number), named[start:end], size=SIZE, start=start, parent=parent, **more)


def depth(index: PyIndex, number: int, instance: str = "pod-a") -> int:
    found = index.match(SPACE, prompt(number).keys(SIZE), 4 * BLOCKS, [instance])
    return found[0].held if found else 0


def total(index: PyIndex, *names: str) -> int:
    return sum(sum(index.stats(name).blocks) for name in names)


def attached(limits: IndexLimits, *names: str, least_trusted: Sequence[str] = ()) -> PyIndex:
    index = PyIndex(limits, least_trusted=lambda: least_trusted)
    for name in names:
        index.attach(name, replace(POD, instance=name))
    return index


def test_a_source_keeps_its_newest_entries() -> None:
    index = attached(IndexLimits(max_entries_per_source=2 * BLOCKS), "pod-a")
    changes = [index.apply("pod-a", payload([chain(number)])) for number in (0, 2, 4, 6)]
    assert [change.skipped for change in changes] == [{}, {}, {"over_bound": BLOCKS}, {"over_bound": BLOCKS}]
    assert set(changes[2].touched) == {*hashes(0), *hashes(4)}
    assert [depth(index, number) for number in (0, 2, 4, 6)] == [0, 0, BLOCKS, BLOCKS]
    assert index.stats("pod-a").blocks == (2 * BLOCKS, 0, 0, 0)
    assert index.stats("pod-a").truncated


def test_a_source_is_whole_again_when_it_was_emptied() -> None:
    index = attached(IndexLimits(max_entries_per_source=BLOCKS), "pod-a")
    index.apply("pod-a", payload([chain(0), chain(2)]))
    assert index.stats("pod-a").truncated
    index.withdraw("pod-a", [Tier.CPU])
    assert index.stats("pod-a").truncated
    index.withdraw("pod-a")
    assert not index.stats("pod-a").truncated
    index.apply("pod-a", payload([chain(0), chain(2)]))
    index.apply("pod-a", payload([{"type": "AllBlocksCleared"}]))
    assert not index.stats("pod-a").truncated


def test_orphans_go_before_entries_that_answer_questions() -> None:
    index = attached(IndexLimits(max_entries_per_source=2 * BLOCKS), "pod-a")
    index.apply("pod-a", payload([chain(0), placeholder([71, 72, 73, 74])]))
    change = index.apply("pod-a", payload([chain(2)]))
    assert change.skipped == {"over_bound": 4}
    assert index.stats("pod-a").orphans == 0
    assert (depth(index, 0), depth(index, 2)) == (BLOCKS, BLOCKS)


def test_far_tiers_go_before_near_ones() -> None:
    index = attached(IndexLimits(max_entries_per_source=2 * BLOCKS), "pod-a")
    index.apply("pod-a", payload([chain(0), chain(0, medium="CPU"), chain(2, 0, 3, medium="STORAGE")]))
    assert index.stats("pod-a").blocks == (BLOCKS, BLOCKS, 0, 0)
    index.apply("pod-a", payload([chain(2, 0, 3)]))
    assert index.stats("pod-a").blocks == (BLOCKS + 3, BLOCKS - 3, 0, 0)


def test_the_least_trusted_source_makes_room() -> None:
    """In the order given: emptied first, touched next, the others not at all."""
    names = ("good", "bad", "worst", "new")
    index = attached(IndexLimits(max_entries=3 * BLOCKS), *names, least_trusted=("worst", "bad", "good", "new"))
    for name in names[:3]:
        index.apply(name, payload([chain(0)]))
    change = index.apply("new", payload([chain(0), chain(2, 0, 2)]))
    assert change.skipped == {"made_room": BLOCKS + 2}
    assert set(change.touched) == {*hashes(0), *hashes(2)[:2]}
    assert [total(index, name) for name in names] == [BLOCKS, BLOCKS - 2, 0, BLOCKS + 2]
    assert [index.stats(name).truncated for name in names] == [False, True, True, False]
    assert depth(index, 0, "good") == BLOCKS


def test_without_an_order_the_source_that_wants_room_makes_it() -> None:
    index = attached(IndexLimits(max_entries=2 * BLOCKS), "pod-a", "pod-b")
    index.apply("pod-a", payload([chain(0)]))
    change = index.apply("pod-b", payload([chain(0), chain(2)]))
    assert change.skipped == {"over_bound": BLOCKS}
    assert (depth(index, 0, "pod-a"), depth(index, 2, "pod-b"), depth(index, 0, "pod-b")) == (BLOCKS, BLOCKS, 0)


def test_unknown_names_in_the_order_of_trust_are_passed_over() -> None:
    index = attached(IndexLimits(max_entries=BLOCKS), "pod-a", least_trusted=("gone", "pod-a", "pod-a"))
    index.apply("pod-a", payload([chain(0), chain(2)]))
    assert total(index, "pod-a") == BLOCKS


def test_orphans_are_bounded_and_the_newest_stay() -> None:
    index = attached(IndexLimits(max_orphans_per_source=4), "pod-a")
    index.apply("pod-a", payload([chain(0)]))
    for number in range(2, 20, 2):
        change = index.apply("pod-a", payload([chain(number, 3), placeholder(hashes(number)[3:])]))
        assert index.stats("pod-a").orphans <= 2 * 4  # each on two tiers
        assert change.skipped.get("over_bound", 0) == (0 if number < 4 else 2 * 2 if number == 4 else 2 * 3)
    assert depth(index, 0) == BLOCKS
    assert index.stats("pod-a").truncated
    index.apply("pod-a", payload([chain(18, 0, 3)]))
    assert depth(index, 18) == BLOCKS


def test_links_that_wait_for_a_parent_are_bounded() -> None:
    """They stay when the orphans that they bind have gone, and are forgotten by themselves, counted."""
    index = attached(IndexLimits(max_orphans_per_source=6), "pod-a")
    counted: Counter[str] = Counter()
    for number in range(0, 40, 2):
        change = index.apply("pod-a", payload([chain(number, 3), removed(hashes(number)[3:])]))
        counted.update(change.skipped)
        assert len(index._shares["pod-a"].domain.waits_for) <= 6
    assert counted == {"link_forgotten": 20 * 3 - 6}
    index.apply("pod-a", payload([chain(38, 0, 3), placeholder(hashes(38)[3:])]))
    assert depth(index, 38) == BLOCKS
    index.apply("pod-a", payload([chain(0, 0, 3), placeholder(hashes(0)[3:])]))
    assert depth(index, 0) == 3


def test_dead_bindings_are_bounded_and_counted() -> None:
    index = attached(IndexLimits(max_dead_bindings_per_source=2 * BLOCKS), "pod-a")
    counted: Counter[str] = Counter()
    for number in range(0, 20, 2):
        counted.update(index.apply("pod-a", payload([chain(number)])).skipped)
        counted.update(index.apply("pod-a", payload([removed(hashes(number)[::-1])])).skipped)
        assert index.stats("pod-a").bindings <= 2 * BLOCKS
    assert counted == {"binding_forgotten": 8 * BLOCKS}
    index.apply("pod-a", payload([placeholder(hashes(number)) for number in (0, 16, 18)]))
    assert [depth(index, number) for number in (0, 16, 18)] == [0, BLOCKS, BLOCKS]
    assert index.stats("pod-a").orphans == BLOCKS


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_bindings_of_held_blocks_are_never_forgotten(size: int) -> None:
    """Also where blocks have another size than the registered one, and so are in another keyspace."""
    index = attached(IndexLimits(max_dead_bindings_per_source=0), "pod-a")
    named = hashes(0)[: 4 * BLOCKS // size]
    story = stored(prompt(0), named, size=size, start=0, parent=None)
    elsewhere = placeholder(named) | {"block_size": size}

    def held() -> int:
        found = index.match(SPACE._replace(block_size=size), prompt(0).keys(size), 4 * BLOCKS, ["pod-a"])
        return found[0].held if found else 0

    for _ in range(3):
        index.apply("pod-a", payload([story, story, removed(named)]))
    index.apply("pod-a", payload([elsewhere]))
    index.apply("pod-a", payload([removed(named)] * 3))
    assert held() == len(named)  # on the CPU
    assert index.stats("pod-a").bindings == len(named)
    index.apply("pod-a", payload([removed(named, medium="CPU")]))
    assert (held(), index.stats("pod-a").bindings) == (0, 0)


def test_bindings_that_die_once_more_with_a_life_are_the_newest_dead() -> None:
    index = attached(IndexLimits(max_dead_bindings_per_source=2 * BLOCKS), "pod-a")
    for number in (0, 2):
        index.apply("pod-a", payload([chain(number), removed(hashes(number)[::-1])]))
    index.apply("pod-a", payload([chain(0)]))
    assert index.withdraw("pod-a") == BLOCKS
    index.apply("pod-a", payload([chain(4), removed(hashes(4)[::-1])]))
    index.apply("pod-a", payload([placeholder(hashes(number)) for number in (0, 2, 4)]))
    assert [depth(index, number) for number in (0, 2, 4)] == [BLOCKS, 0, BLOCKS]


def test_members_of_a_domain_have_its_bounds_together() -> None:
    index = PyIndex(IndexLimits(max_dead_bindings_per_source=BLOCKS, max_orphans_per_source=2))
    index.attach("pod-a", POD)
    index.attach("store", STORE)
    index.apply("pod-a", payload([chain(n) for n in (0, 2, 4)]))
    index.apply("pod-a", payload([removed(hashes(n)) for n in (0, 2, 4)]))
    assert index.stats("pod-a").bindings == 2 * BLOCKS
    change = index.apply("store", payload([placeholder(range(90, 96), medium="OBJ")]))
    assert change.skipped == {"over_bound": 2}
    index.detach("pod-a")
    assert index.stats("store").bindings == BLOCKS


@pytest.mark.parametrize("what", ["rank", "group", "ownership", "block size"])
def test_a_source_that_invents_places_is_stopped(what: str) -> None:
    """Each rank and group would be a bit in every mask."""
    index = attached(IndexLimits(), "pod-a", "pod-b")
    index.apply("pod-a", payload([placeholder([1])], 0))
    lost = 0
    for number in range(1, 5000):
        event = placeholder(hashes(0))
        if what == "ownership":
            event["ownership"] = str(number)
        elif what != "rank":
            event["group_idx" if what == "group" else "block_size"] = number
        change = index.apply("pod-a", payload([event], number if what == "rank" else 0))
        lost += change.skipped.get("over_bound", 0)
    assert 0 < lost <= (5000 - 4096) * BLOCKS
    assert index.stats("pod-a").truncated
    assert len(index._spaces[SPACE].slots) <= 4098
    assert index.apply("pod-a", payload([placeholder([1])], 0)).skipped == {}
    index.apply("pod-b", payload([chain(0)]))
    assert depth(index, 0, "pod-b") == BLOCKS


LIMITS = {
    "entries of a source": IndexLimits(max_entries_per_source=25),
    "entries in all": IndexLimits(max_entries=40),
    "orphans": IndexLimits(max_orphans_per_source=3),
    "all of it": IndexLimits(max_entries=45, max_entries_per_source=20, max_orphans_per_source=4),
    "with slack": IndexLimits(max_entries=900, max_entries_per_source=600),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_is_true(limits: IndexLimits, seed: int) -> None:
    """A random history: within bounds after every batch, and for the entries that are left the oracle agrees."""
    random = Random(seed)
    names = ["pod-a", "pod-b", "store", "pod-c"]
    index = PyIndex(limits, least_trusted=lambda: random.sample(names, 2))
    oracle = Oracle()
    for name in names:
        spec = STORE if name == "store" else replace(POD, instance=name)
        index.attach(name, spec)
        oracle.attach(name, spec)
    prompts = 300 if limits.max_entries == 900 else 12
    for _ in range(150):
        name = random.choice(names)
        events = [_event(random, name, prompts) for _ in range(random.randint(1, 40 if prompts > 12 else 3))]
        change = index.apply(name, payload(events))
        oracle.apply(name, events)
        _agree_on_what_went(index, oracle, change, name)
        entries = {name: sum(index.stats(name).blocks) for name in names}
        assert max(entries.values()) <= limits.max_entries_per_source
        assert sum(entries.values()) == index._entries <= limits.max_entries
        for domain in {share.domain for share in index._shares.values()}:
            assert len(domain.unbound) <= limits.max_orphans_per_source * len(domain.members)
            assert len(domain.waits_for) <= limits.max_orphans_per_source * len(domain.members)
        asked = prompt(random.randrange(prompts))
        found = index.match(SPACE, asked.keys(SIZE), 4 * BLOCKS)
        if "link_forgotten" not in change.skipped and limits.max_orphans_per_source > 100:
            assert sorted(map(msgspec.structs.astuple, found)) == oracle.match(SPACE, asked)
        else:  # what waits for its parent may have been forgotten: less may be known, never more
            most = {answer.instance: answer.held for answer in oracle.match(SPACE, asked)}
            assert all(match.held <= most[match.instance] for match in found)


def _event(random: Random, name: str, prompts: int) -> Event:
    number = random.randrange(prompts)
    start = random.choice((0, 0, 0, 2, 3))
    end = random.randint(start + 1, BLOCKS)
    what = random.random()
    if what < 0.25:
        return removed(hashes(number)[start:end], medium="OBJ" if name == "store" else random.choice(("GPU", "CPU")))
    if name == "store":
        return placeholder(hashes(number)[start:end], medium="OBJ")
    return placeholder(hashes(number)[start:end]) if what < 0.4 else chain(number, start, end)


def _agree_on_what_went(index: PyIndex, oracle: Oracle, change: Change, name: str) -> None:
    """Take from the oracle what the index says it dropped, and nothing else."""
    gone = 0
    for other, source in oracle.sources.items():
        left = index.copies(other)
        dropped = set(source.held) - set(left)
        assert left.items() <= source.held.items()
        assert index.stats(other).truncated or not dropped
        gone += len(dropped)
        source.held = {entry: copies for entry, copies in source.held.items() if entry not in dropped}
        if other == name:
            assert {entry.block_hash for entry in dropped} <= set(change.touched)
            assert change.skipped.get("over_bound", 0) == len(dropped)
        source.shown = source.blocks()
    assert change.skipped.get("over_bound", 0) + change.skipped.get("made_room", 0) == gone
