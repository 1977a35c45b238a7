"""The overlay of routed prompts against a naive oracle, and its bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindexer.tiering.routings import Routing, Routings
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace

SPACES = (Keyspace("t", "m", "", 4), Keyspace("u", "m", "", 4))
INSTANCES = ("a", "b")
TRUNK = tuple(range(1, 9))


def waiting(runs: Routings | None, instance: str) -> set[int]:
    """Blocks for which the instance waits."""
    return set() if runs is None else runs.waiting(instance)


def check(runs: Routings | None, named: set[int]) -> None:
    """What is named is in one run, once; runs are as long as they say."""
    by_key = {} if runs is None else runs._runs
    assert by_key.keys() == named
    lying = set(by_key.values())
    assert Counter(key for run in lying for key in run.keys) == dict.fromkeys(named, 1)
    assert all(by_key[key] is run for run in lying for key in run.keys)
    assert {run.keys[0]: run for run in lying} == ({} if runs is None else runs._first)
    for run in lying:
        assert run.named
        assert run.awaited.keys() <= run.named.keys()
        assert (run.stop, run.last, run.mask) == (run.at + len(run.keys), run.keys[-1], sum(run.awaited))


@dataclass
class Told:
    """A routing of the oracle."""

    space: Keyspace
    instance: str
    keys: list[int]
    ends_at: float
    left: set[int]
    """What no event has spoken of since."""
    name: tuple[int, int] | None
    """Last key and length; None: a living one with another prompt has that name."""


@dataclass
class Oracle:
    """Every routing with what is left of it; a block is there while any living routing names it."""

    told: list[Told] = field(default_factory=list)

    def route(self, space: Keyspace, instance: str, keys: list[int], ends_at: float) -> None:
        if not keys:
            return
        name = (keys[-1], len(keys))
        same = next(
            (each for each in self.told if (each.space, each.instance, each.name) == (space, instance, name)), None
        )
        if same is not None and same.keys == keys:  # it is on its way again, until the later of both ends
            same.ends_at, same.left = max(same.ends_at, ends_at), set(keys)
        else:
            self.told.append(Told(space, instance, keys, ends_at, set(keys), None if same else name))

    def held(self, space: Keyspace, instance: str) -> set[int]:
        return set().union(*(each.left for each in self.told if (each.space, each.instance) == (space, instance)))

    def named(self, space: Keyspace) -> set[int]:
        return set().union(*(each.keys for each in self.told if each.space == space))

    def expire(self, now: float) -> None:
        self.told = [each for each in self.told if each.ends_at > now]

    def confirm(self, space: Keyspace, instance: str, keys: set[int]) -> None:
        for each in self.told:
            if (each.space, each.instance) == (space, instance):
                each.left.difference_update(keys)


CHAINS = st.tuples(st.integers(0, 8), st.lists(st.integers(100, 104), max_size=3)).map(
    lambda parts: [*TRUNK[: parts[0]], *(10 * parts[0] + tail for tail in dict.fromkeys(parts[1]))]
)
"""Nearly: what comes behind the trunk may be in any order."""
PROMPTS = st.one_of(
    CHAINS,
    CHAINS.map(lambda keys: [*keys, *keys[2:6], *keys]),
    st.tuples(CHAINS, st.integers(0, 5)).map(lambda of: of[0][of[1] :]),
    CHAINS.flatmap(st.permutations),
)
"""As they are, with repetitions, without a beginning, in disorder."""
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
                assert waiting(overlay.routings(where), who) == oracle.held(where, who)
                assert overlay.awaits(who) == any(oracle.held(each, who) for each in SPACES)
            check(overlay.routings(where), oracle.named(where))
        assert overlay.alive == bool(oracle.told)
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
            assert set(keys[:noted]) <= waiting(overlay.routings(space), instance)
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


def test_prompts_alike_share_runs_which_grow_together_again() -> None:
    """Where one parted that is over, nothing is left of it when another one goes along."""
    runs, trunk = Routings(), list(range(64))
    long, parting = routing("a", trunk, 1.0), routing("b", [*trunk[:20], *range(100, 120)], 2.0)
    runs.begin(long)
    assert runs.along(trunk) == ([64], [1])
    runs.begin(parting)
    assert runs.along(trunk) == ([20, 64], [3, 1])
    assert runs.along([*trunk[:20], 100, 999]) == ([20, 21], [3, 2])
    assert runs.along(trunk[:30]) == ([20, 30], [3, 1])
    assert runs.confirm("a", range(30, 40)) == 10
    assert runs.along(trunk) == ([20, 30, 40, 64], [3, 1, 0, 1])
    assert runs.end(parting) == 40
    runs.expect(long)
    assert runs.along(trunk) == ([64], [1])


@pytest.mark.parametrize("order", [1, -1])
def test_events_of_block_after_block_leave_no_edges(order: int) -> None:
    runs, prompt = Routings(), list(range(64))
    for who in "ab":
        runs.begin(routing(who, prompt, 1.0))
    for key in prompt[20:40][::order]:
        assert runs.confirm("a", [key]) == 1
    assert runs.along(prompt) == ([20, 40, 64], [3, 2, 3])


def test_a_run_that_goes_on_as_one_branch_is_not_taken_for_another_one() -> None:
    """Two prompts to one instance, which part: the later one's run has no edge where the earlier one leaves it."""
    runs, trunk = Routings(), list(range(15))
    early, late = [*trunk, 100, 101], [*trunk, 200]
    runs.begin(routing("a", early, 1.0))
    runs.begin(routing("a", early[:16], 2.0))
    runs.begin(routing("a", late, 3.0))
    runs.begin(routing("b", late, 3.0))
    assert runs.along(late) == ([16], [3])
    assert runs.along(early) == ([15, 16, 17], [3, 1, 1])


def test_bits_are_given_anew() -> None:
    runs, routings = Routings(), {who: routing(who, [1, 2, 3], 1.0) for who in "abcd"}
    for who in "abc":
        runs.begin(routings[who])
    a, b, c = (runs.bits[who] for who in "abc")
    runs.end(routings["a"])
    assert runs.along([1, 2]) == ([2], [b | c])
    runs.begin(routings["d"])
    assert runs.bits == {"b": b, "c": c, "d": a}
    assert runs.names == {b: "b", c: "c", a: "d"}
    for who in "bcd":
        runs.end(routings[who])
    assert not runs
    assert runs.along([1, 2]) == ([], [])


def routing(instance: str, keys: list[int], ends_at: float) -> Routing:
    place = (SPACES[0], instance)
    return Routing((place, keys[-1], len(keys), 0), place, keys, (ends_at, 0))
