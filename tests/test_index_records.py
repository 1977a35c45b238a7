"""Records, case by case: their bytes, what names them when they change, and what damaged ones do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recordings
from copying import Copy, everything
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Change, IndexLimits
from kvindexer.types import EngineHash, Keyspace, SourceSpec, Tier
from oracle import Event, Prompt, payload, placeholder, removed, stored

SIZE = 4
SPACE = Keyspace("default", "tiny", "", SIZE)
LIMITED = IndexLimits(max_dead_bindings_per_source=2, max_orphans_per_source=3)
PROMPT = Prompt(tuple(range(100, 140)))
HASHES = tuple(range(1, 11))
POD = SourceSpec(instance="pod-a", model="tiny", block_size=SIZE, endpoint="tcp://pod-a:1")
STORE = replace(POD, instance="store", type="store", tier="remote", readers=("pod-a", "pod-b"))
OTHER = replace(POD, instance="pod-b", endpoint="tcp://pod-b:1")


def whole(start: int = 0, end: int = 10, **more: Any) -> Event:
    return stored(
        PROMPT, HASHES[start:end], size=SIZE, start=start, parent=HASHES[start - 1] if start else None, **more
    )


def followed(limits: IndexLimits | None = None, **specs: SourceSpec) -> tuple[PyIndex, Copy]:
    index = PyIndex(limits)
    for name, its_spec in specs.items():
        index.attach(name, its_spec)
    copy = Copy(index)
    for name in specs:
        copy.take(name)
    return index, copy


def say(copy: Copy, source: str, *said: Event) -> Change:
    change = copy.index.apply(source, payload(said))
    copy.follow(source, change)
    for name, kept in copy.records.items():
        assert kept == everything(copy.index, name)
    return change


def test_the_usual_record_is_ten_bytes() -> None:
    """Pinned: other programs' copies are read back by later versions of this one."""
    index, _ = followed(s=POD)
    index.apply("s", payload([whole(0, 2), whole(1, 2, medium="CPU", group_idx=3), whole(1, 2)]))
    first, second, none = index.records("s", [*HASHES[:2], 999])
    keys = [key.to_bytes(8, "little") for key in PROMPT.keys(SIZE)[:2]]
    assert first == b"\x01" + keys[0] + b"\x00"
    assert second == b"\x01" + keys[1] + b"\x20\x02" + b"\x09\x03"
    assert none == b""
    index.apply("s", payload([whole(5, 6, block_size=8, token_ids=list(range(8)))], rank=300))
    (waiting,) = index.records("s", HASHES[5:6])
    assert waiting[:9] == b"\x0a" + HASHES[4].to_bytes(8, "little")
    assert waiting[17:] == b"\x08" + b"\x44\xac\x02\x08"


def test_an_orphan_of_a_reader_whose_parent_another_reader_names() -> None:
    """Its record has a link now, though its source said nothing and does not keep the domain."""
    index, copy = followed(a=POD, b=OTHER, shared=STORE)
    say(copy, "b", placeholder(HASHES[3:4]))
    change = say(copy, "a", whole(2, 5))
    assert HASHES[3] in change.touched_of["b"]
    change = say(copy, "shared", whole(0, 2, medium="OBJ"))
    assert HASHES[3] in change.touched_of["b"]
    assert set(HASHES[2:5]) <= set(change.touched_of["a"])
    assert index.stats("b").orphans == 0


def test_what_nobody_holds_is_in_the_keepers_records_alone() -> None:
    index, copy = followed(a=POD, b=OTHER, shared=STORE)
    say(copy, "a", whole(0, 4), whole(6, 8))
    say(copy, "b", whole(0, 2))
    change = say(copy, "a", removed(HASHES))
    assert set(HASHES[:8]) <= set(change.touched_of["shared"])
    assert set(copy.records["shared"]) == {*HASHES[2:4], *HASHES[6:8]}
    assert copy.records["a"] == {}
    index.detach("shared")  # now the domain is kept by the member with the smallest name
    assert set(everything(index, "a")) == {*HASHES[2:4], *HASHES[6:8]}
    assert set(everything(index, "b")) == set(HASHES[:2])


def test_what_is_forgotten_at_a_bound_is_named() -> None:
    _, copy = followed(LIMITED, s=POD)
    say(copy, "s", whole(0, 4), removed(HASHES[:2]))
    change = say(copy, "s", removed(HASHES[2:4]))
    assert set(HASHES[:2]) <= set(change.touched)
    for parent in range(50, 56):
        change = say(
            copy, "s", stored(PROMPT, [parent + 100], size=SIZE, start=1, parent=parent), removed([parent + 100])
        )
    assert 152 in change.touched
    assert change.skipped == {"link_forgotten": 1}


def test_other_sources_that_make_room_are_named() -> None:
    index = PyIndex(IndexLimits(max_entries=12), least_trusted=lambda: ["old", "shared"])
    for name, its_spec in {"old": POD, "shared": STORE, "new": OTHER}.items():
        index.attach(name, its_spec)
    copy = Copy(index)
    for name in ("old", "shared", "new"):
        copy.take(name)
    say(copy, "old", whole(0, 6))
    say(copy, "shared", whole(0, 4, medium="OBJ"))
    change = say(copy, "new", whole(0, 6))
    assert change.skipped == {"made_room": 4}
    assert set(change.touched_of["old"]) == set(HASHES[:4])


def test_what_goes_when_records_are_loaded_is_named_by_the_next_batch() -> None:
    """Of whatever source: those that made room for what was loaded have said nothing."""
    one, full = followed(s=POD)
    say(full, "s", whole(0, 8))
    index = PyIndex(IndexLimits(max_entries=10, max_entries_per_source=6), least_trusted=lambda: ["old", "gone"])
    copy = Copy(index)
    for name, its_spec in {"old": OTHER, "gone": OTHER, "s": POD}.items():
        index.attach(name, its_spec)
        copy.take(name)
    say(copy, "old", whole(0, 6))
    say(copy, "gone", whole(0, 3))
    index.load("s", list(full.records["s"]), list(full.records["s"].values()))
    index.loaded("s", one.facts("s"))
    assert sum(index.stats("old").blocks) + sum(index.stats("gone").blocks) == 4
    copy.records["s"] = dict(full.records["s"])
    index.detach("gone")
    del copy.records["gone"]
    change = say(copy, "s")
    assert set(change.touched_of) == {"old"}


def test_a_hash_waits_behind_the_parent_that_was_named_last() -> None:
    """And no more once it is bound, whoever turns up."""
    index, copy = followed(s=POD)
    say(copy, "s", stored(PROMPT, [7], size=SIZE, start=1, parent=70))
    say(copy, "s", stored(PROMPT, [7], size=SIZE, start=1, parent=71))
    domain = index._shares["s"].domain
    assert domain.waits_for == {7: 71}
    assert list(domain.waiting) == [71]
    say(copy, "s", stored(PROMPT, [70], size=SIZE))
    assert index.stats("s").orphans == 1
    say(copy, "s", stored(PROMPT, [7], size=SIZE))
    assert not domain.waits_for
    assert not domain.waiting


@pytest.mark.parametrize("backwards", [False, True])
def test_offload_chunks_cover_their_blocks_whatever_is_loaded_first(*, backwards: bool) -> None:
    chunked = replace(POD, offload_blocks_per_chunk=3)
    index, copy = followed(s=chunked)
    say(copy, "s", whole(0, 6), placeholder([HASHES[2], HASHES[5]]), removed(HASHES))
    say(copy, "s", placeholder([HASHES[8]]), whole(7, 9))
    kept = sorted(copy.records["s"].items(), reverse=backwards)
    other, _ = followed(s=chunked)
    for block_hash, record in kept:
        other.load("s", [block_hash], [record])
    other.loaded("s", index.facts("s"))
    asked = SPACE, PROMPT.keys(SIZE), len(PROMPT.tokens)
    assert [match.alone for match in other.match(*asked)] == [(0, 6, 0, 0)]
    for each in (index, other):
        each.apply("s", payload([whole(0, 7)]))
        each.apply("s", payload([removed(HASHES)]))
        assert [match.alone for match in each.match(*asked)] == [(0, 9, 0, 0)]
        each.apply("s", payload([removed(HASHES, medium="CPU")]))
        assert each.match(*asked) == []


def test_equal_states_give_equal_bytes_whatever_led_to_them() -> None:
    one, _ = followed(s=POD)
    other, _ = followed(s=POD)
    cpu = whole(0, 6, medium="CPU", group_idx=1)
    one.apply("s", payload([whole(0, 6), cpu], rank=1))
    one.apply("s", payload([whole(0, 3), whole(8, 9)]))
    other.apply("s", payload([whole(8, 9), whole(2, 3), whole(0, 2), placeholder([77])]))
    other.apply("s", payload([cpu, whole(3, 6), whole(0, 4), removed([HASHES[3]])], rank=1))
    other.apply("s", payload([removed([77], medium="CPU"), whole(0, 1), removed(HASHES[:1])]))
    assert everything(one, "s") == everything(other, "s")
    one.apply("s", payload([placeholder([77])]))
    one.apply("s", payload([removed([77], medium="CPU")]))
    assert one.facts("s") == other.facts("s")


@pytest.mark.parametrize("name", [recordings.WITH_TRUTH[0], recordings.WITH_TRUTH[-1]])
@pytest.mark.parametrize("limits", [None, IndexLimits(max_dead_bindings_per_source=10, max_entries_per_source=200)])
def test_a_copy_follows_a_recorded_stream(name: str, limits: IndexLimits | None) -> None:
    _, copy = followed(limits, s=replace(POD, block_size=16 if name.startswith("pool") else 32))
    for frame in recordings.frames(name):
        copy.follow("s", copy.index.apply("s", frame.payload))
        assert copy.records["s"] == everything(copy.index, "s")


def rich() -> PyIndex:
    """Something of everything that records can say."""
    index, _ = followed(s=replace(POD, offload_blocks_per_chunk=2), shared=STORE)
    index.apply("s", payload([whole(0, 4), whole(0, 2), whole(5, 7), placeholder(HASHES[1:4:2])], rank=1))
    index.apply("s", payload([placeholder([900], ownership="other", group_idx=2), removed(HASHES[2:3])], rank=1))
    index.apply("shared", payload([whole(7, 9, block_size=8, token_ids=list(range(16)), medium="OBJ")]))
    return index


DAMAGE = st.tuples(st.sampled_from(("cut", "flip", "replace", "grow")), st.integers(0, 2**16), st.binary(max_size=40))


def damaged(packed: bytes, damage: tuple[str, int, bytes]) -> bytes:
    how, where, junk = damage
    at = where % max(1, len(packed))
    match how:
        case "cut":
            return packed[:at]
        case "flip":
            return packed[:at] + bytes((packed[at] ^ (1 + where % 255),)) + packed[at + 1 :]
        case "replace":
            return junk
        case _:
            return packed[:at] + junk + packed[at:]


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    source=st.sampled_from(("s", "shared")),
    damages=st.lists(st.none() | DAMAGE, min_size=1),
    facts=st.none() | DAMAGE,
)
def test_damaged_records_are_value_errors_or_loaded(
    source: str, damages: list[tuple[str, int, bytes] | None], facts: tuple[str, int, bytes] | None
) -> None:
    """Never another error, neither then nor later, and nothing is left when the source goes."""
    one = rich()
    kept = everything(one, source)
    records = [
        record if damage is None else damaged(record, damage)
        for record, damage in zip(kept.values(), damages * len(kept), strict=False)
    ]
    index, _ = followed(s=replace(POD, offload_blocks_per_chunk=2), shared=STORE)
    index.apply("shared", payload([placeholder(HASHES, medium="OBJ")]))
    for part in range(2):
        try:
            index.load(source, list(kept)[part::2], records[part::2])
        except ValueError as error:
            assert "damaged record" in str(error) or isinstance(error, UnicodeDecodeError)  # noqa: PT017
    try:
        index.loaded(source, one.facts(source) if facts is None else damaged(one.facts(source), facts))
    except ValueError as error:
        assert "facts" in str(error) or "groups" in str(error)  # noqa: PT017
    for name in ("s", "shared"):
        everything(index, name)
        index.apply(name, payload([whole(0, 8), placeholder(HASHES), removed(HASHES)]))
    for name in ("s", "shared"):
        index.withdraw(name)
        assert index.copies(name) == {}
    for tier in index._shares["s"].space.tiers:
        assert not tier
    index.detach("s")
    index.detach("shared")
    assert not index._spaces


def test_records_and_hashes_must_be_as_many() -> None:
    index, _ = followed(s=POD)
    with pytest.raises(ValueError, match="zip"):
        index.load("s", [1, 2], [b""])
    with pytest.raises(ValueError, match="layout"):
        index.loaded("s", b"\x93\x63\xc2\x90")


def test_a_damaged_part_is_not_counted_at_all() -> None:
    index, copy = followed(s=POD)
    say(copy, "s", whole(0, 4))
    other, _ = followed(s=POD)
    kept = copy.records["s"]
    with pytest.raises(ValueError, match="damaged record"):
        other.load("s", list(kept), [*list(kept.values())[:3], b"\x01\x02"])
    assert other.copies("s") == {}
    other.load("s", list(kept), list(kept.values()))
    other.load("s", list(kept), list(kept.values()))  # again: records are absolute
    other.loaded("s", index.facts("s"))
    assert other.copies("s") == index.copies("s")
    assert other.copies("s")[0, 0, Tier.GPU, None, EngineHash(HASHES[0])] == 1


def test_facts_tell_what_no_record_does() -> None:
    """A connector whose last block below the GPU is gone, the window of a group, entries that went at a bound."""
    window: dict[str, Any] = {
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 9,
    }
    index, copy = followed(IndexLimits(max_entries_per_source=20), s=POD)
    say(copy, "s", whole(), placeholder(HASHES[:2]), removed(HASHES[:2], medium="CPU"), whole(**window))
    asked = SPACE, PROMPT.keys(SIZE), len(PROMPT.tokens)
    for truncated in (False, True):
        other, _ = followed(s=POD)
        other.load("s", list(copy.records["s"]), list(copy.records["s"].values()))
        other.loaded("s", index.facts("s"))
        assert other.match(*asked) == index.match(*asked)
        assert other.truncated("s") is index.truncated("s") is truncated
        assert other.facts("s") == index.facts("s")
        say(copy, "s", placeholder([900, 901]))
