"""The overlay of routed prompts against a naive oracle, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvindexer.tiering.marks import EVERY, Marks
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace

SPACES = (Keyspace("t", "m", "", 4), Keyspace("u", "m", "", 4))
INSTANCES = ("a", "b")
TRUNK = tuple(range(1, 9))


def marked(marks: Marks | None, key: int) -> set[str]:
    """Instances that prompts went to which begin with this block."""
    if marks is None:
        return set()
    return {who for mask in marks.along([key]) for who, bit in marks.bits.items() if mask & bit}


@dataclass
class Oracle:
    """Every routing with what is left of it; a block is there while any living routing names it."""

    routings: list[tuple[Keyspace, str, set[int], float]] = field(default_factory=list)
    begun: list[tuple[Keyspace, int, str, float]] = field(default_factory=list)
    """The first key of each routing."""

    def route(self, space: Keyspace, instance: str, keys: list[int], ends_at: float) -> None:
        self.routings.append((space, instance, set(keys), ends_at))
        self.begun += [(space, key, instance, ends_at) for key in keys[:1]]

    def held(self, space: Keyspace, instance: str) -> set[int]:
        return set().union(*(keys for where, who, keys, _ in self.routings if (where, who) == (space, instance)))

    def expire(self, now: float) -> None:
        self.routings = [routing for routing in self.routings if routing[3] > now]
        self.begun = [begun for begun in self.begun if begun[3] > now]

    def confirm(self, space: Keyspace, instance: str, keys: set[int]) -> None:
        for where, who, left, _ in self.routings:
            if (where, who) == (space, instance):
                left.difference_update(keys)


PROMPTS = st.tuples(st.integers(0, 8), st.lists(st.integers(100, 104), max_size=3)).map(
    lambda parts: [*TRUNK[: parts[0]], *(10 * parts[0] + tail for tail in dict.fromkeys(parts[1]))]
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("route"), st.sampled_from(SPACES), st.sampled_from(INSTANCES), PROMPTS, st.integers(1, 5)),
        st.tuples(st.just("confirm"), st.sampled_from(SPACES), st.sampled_from(INSTANCES), PROMPTS, st.just(0)),
        st.tuples(st.just("wait"), st.just(SPACES[0]), st.just(""), st.just([]), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_after_any_sequence_the_overlay_is_what_a_count_of_references_would_be(
    steps: list[tuple[str, Keyspace, str, list[int], int]],
) -> None:
    """Routed, routed again, confirmed, waited: each instance's blocks are those of the naive oracle."""
    overlay, oracle, now = Speculation(10_000), Oracle(), 0.0
    for kind, space, instance, keys, number in steps:
        if kind == "route":
            overlay.add(space, instance, keys, now + number)
            oracle.route(space, instance, keys, now + number)
        elif kind == "confirm":
            overlay.confirm(space, instance, keys)
            oracle.confirm(space, instance, set(keys))
        else:
            now += number
        overlay.expire(now)
        oracle.expire(now)
        for where in SPACES:
            for who in INSTANCES:
                assert set(overlay.instances(where).get(who, ())) == oracle.held(where, who)
                assert overlay.awaits(who) == any(oracle.held(each, who) for each in SPACES)
            marks = overlay.marks(where)
            for key in (TRUNK[0], *range(100, 105)):
                begun = {who for place, first, who, _ in oracle.begun if (place, first) == (where, key)}
                assert marked(marks, key) == begun
        assert overlay.alive or not any(keys for *_, keys, _ in oracle.routings)
    overlay.expire(now + 5)
    assert (overlay.alive, overlay.references, overlay.blocks) == (False, 0, 0)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, bound=st.integers(1, 12))
def test_there_are_never_more_blocks_than_the_bound(
    steps: list[tuple[str, Keyspace, str, list[int], int]], bound: int
) -> None:
    """And the newest prompt is there, as far as there is room, whatever went for it."""
    overlay, now = Speculation(bound), 0.0
    for kind, space, instance, keys, number in steps:
        if kind == "wait":
            now += number
        overlay.expire(now)
        if kind == "route":
            noted = overlay.add(space, instance, keys, now + number)
            assert noted == min(len(keys), bound)
            assert set(keys[:noted]) <= set(overlay.instances(space).get(instance, ()))
        assert overlay.blocks <= overlay.references <= bound


def test_every_block_that_left_is_counted_once() -> None:
    overlay = Speculation(8)
    overlay.add(SPACES[0], "a", [1, 2, 3], 1.0)
    overlay.add(SPACES[0], "a", [1, 2, 4], 2.0)
    overlay.confirm(SPACES[0], "a", [1, 9])
    overlay.expire(1.0)
    assert (overlay.confirmed, overlay.expired, overlay.made_room) == (1, 1, 0)
    overlay.add(SPACES[0], "b", list(range(10, 20)), 5.0)
    assert (overlay.confirmed, overlay.expired, overlay.made_room, overlay.blocks) == (1, 1, 4, 8)
    overlay.expire(5.0)
    assert (overlay.confirmed, overlay.expired, overlay.made_room, overlay.routed) == (1, 9, 4, 3)


def test_a_prompt_routed_again_takes_no_more_room() -> None:
    overlay = Speculation(100)
    for number in range(1_000):
        overlay.add(SPACES[0], "a", list(TRUNK), 1.0 + number)
    assert overlay.references == len(TRUNK)
    overlay.expire(999.5)
    assert overlay.alive
    overlay.expire(1000.0)
    assert not overlay.alive


def test_marks_are_those_of_the_prompts_that_live_and_bits_are_given_anew() -> None:
    marks, prompts = Marks(), {who: list(range(3 * EVERY)) for who in "abc"}
    prompts["b"] = [*range(EVERY + 1), *range(1000, 1000 + EVERY)]
    for who, keys in prompts.items():
        marks.add(who, keys)
    a, b, c = (marks.bits[who] for who in "abc")
    assert marks.along(prompts["a"]) == [a | b | c, a | b | c, a | c]
    assert marks.along(prompts["b"][:EVERY]) == [a | b | c]
    marks.add("a", prompts["a"][:1])
    marks.drop("a", prompts["a"])
    assert marks.along(prompts["a"]) == [a | b | c, b | c, c]
    marks.drop("a", prompts["a"][:1])
    marks.add("d", prompts["a"])
    assert marks.bits == {"b": b, "c": c, "d": a}
    for who in "bcd":
        marks.drop(who, prompts.get(who, prompts["a"]))
    assert not marks
    assert marks.along(prompts["a"]) == []
