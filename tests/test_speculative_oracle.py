"""What long prompts will be held of soon, against a naive oracle: index and overlay together.

The fleet has what makes a difference: ranks, a tier below the GPU, cache groups, an instance that holds nothing.
Prompts have up to a hundred blocks; they part and end at a few places, just before and just behind.  They are
routed, routed again, computed in order and out of order, forgotten in the middle, lost without an event.

The oracle keeps a list of blocks for every routing and a set for every place, and walks block by block: an instance
gets as far as the blocks that one of its ranks holds, and on while the next one is on its way to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_server import batch
from kvindexer.api.lookahead import Ahead, Lookahead
from kvindexer.api.lookup import Found, find
from kvindexer.api.prompt import KeyPrompt
from kvindexer.index.engine import PyIndex
from kvindexer.tiering.speculative import Speculation
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import Keyspace, SourceSpec

SIZE = 2
SPACE = Keyspace("default", "m", "", SIZE)
LONGEST = 100
MARK = 16
"""Things begin and end at multiples of it, and one before and behind."""
INSTANCES = ("plain", "ranked", "hybrid", "empty")
GROUPS: dict[str, tuple[dict[str, Any], ...]] = {
    "hybrid": (
        {"group_idx": 0},
        {"group_idx": 1},
        {"group_idx": 2, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 3},
    )
}
"""Those of instances that have more than one; a block is held if the first two have it."""


class Place(NamedTuple):
    """Where a block lies."""

    instance: str
    rank: int
    group: int
    medium: str


class Blocks(NamedTuple):
    """A prompt of the oracle: the number of the prompt that each block is of, up to where it goes its own way."""

    names: tuple[int, ...]

    @property
    def keys(self) -> list[int]:
        return list(_keys(self.names))

    @property
    def tokens(self) -> list[int]:
        return [token for name in self.names for token in (name, 7)]


@cache
def _keys(names: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prompt_keys(pack_tokens(Blocks(names).tokens), SIZE))


@dataclass
class Routing:
    """A prompt on its way to an instance, and what no event has spoken of since."""

    order: tuple[float, int]
    awaited: set[int]


@dataclass
class Oracle:
    """Every routing and every place, in full."""

    bound: int
    held: dict[Place, Counter[int]] = field(default_factory=dict)
    routings: dict[tuple[str, tuple[int, ...]], Routing] = field(default_factory=dict)
    serial: int = 0

    def route(self, instance: str, keys: list[int], ends_at: float) -> None:
        keys = keys[: self.bound]
        self.serial += 1
        order, name = (ends_at, self.serial), (instance, tuple(keys))
        if name in self.routings:
            order = max(order, self.routings[name].order)
        else:
            while self.named + len(keys) > self.bound:
                del self.routings[min(self.routings, key=lambda each: self.routings[each].order)]
        self.routings[name] = Routing(order, set(keys))

    @property
    def named(self) -> int:
        return sum(len(keys) for _, keys in self.routings)

    def expire(self, now: float) -> None:
        self.routings = {name: routing for name, routing in self.routings.items() if routing.order[0] > now}

    def heard(self, instance: str, keys: list[int]) -> None:
        for (whose, _), routing in self.routings.items():
            if whose == instance:
                routing.awaited.difference_update(keys)

    def store(self, place: Place, keys: list[int]) -> None:
        held = self.held.setdefault(place, Counter())
        for key in keys:
            held[key] = held[key] + 1 if place.medium == "GPU" else 1

    def remove(self, place: Place, keys: list[int]) -> None:
        self.held[place] = self.held.get(place, Counter()) - Counter(set(keys))

    def has(self, instance: str, rank: int, key: int) -> bool:
        groups = (0, 1) if instance in GROUPS else (0,)
        return all(
            any(self.held.get(Place(instance, rank, group, medium), Counter())[key] for medium in ("GPU", "CPU"))
            for group in groups
        )

    def ahead(self, keys: list[int]) -> dict[str, int]:
        """Instances that get further than what they hold, and how far."""
        found = {}
        for instance in INSTANCES:
            awaited = set().union(*(each.awaited for (whose, _), each in self.routings.items() if whose == instance))
            depths, reached = [], []
            for rank in (0, 1):
                depth = 0
                while depth < len(keys) and self.has(instance, rank, keys[depth]):
                    depth += 1
                depths.append(depth)
                while depth < len(keys) and keys[depth] in awaited:
                    depth += 1
                reached.append(depth)
            if max(reached) > max(depths):
                found[instance] = max(reached)
        return found


class World:
    """The real parts, as the service has them, and the oracle beside them."""

    def __init__(self, prompts: list[Blocks], bound: int) -> None:
        self.prompts = prompts
        self.index = PyIndex()
        self.speculation = Speculation(bound)
        self.oracle = Oracle(bound)
        self.now = 0.0
        self.lookahead = Lookahead(self.index, self.speculation, lambda: self.now)
        for instance in INSTANCES:
            spec = SourceSpec(instance=instance, model="m", block_size=SIZE, endpoint=f"tcp://{instance}:1")
            self.index.attach(instance, spec)
        for instance in INSTANCES[:-1]:
            for prompt in prompts:  # once and gone: from now on every hash is known
                for group in GROUPS.get(instance, ({},)):
                    self._apply(instance, 0, _stored(prompt, 0, len(prompt.names), group))
                    self._apply(instance, 0, _removed(prompt.keys, group))

    def _apply(self, instance: str, rank: int, event: dict[str, Any]) -> list[int]:
        """What the events of a message speak of, as the fleet finds it out."""
        change = self.index.apply(instance, batch(event, rank=rank))
        found = self.index.resolve(instance, set(change.touched))
        return [binding.key for binding in found if binding is not None]

    def route(self, prompt: Blocks, instance: str, ttl_s: int) -> None:
        self.speculation.expire(self.now)
        self.oracle.expire(self.now)
        noted = self.speculation.add(SPACE, instance, prompt.keys, self.now + ttl_s)
        assert noted == min(len(prompt.names), self.oracle.bound)
        self.oracle.route(instance, prompt.keys, self.now + ttl_s)

    def event(self, prompt: Blocks, place: Place, start: int, *, stores: bool, heard: bool) -> None:
        """The instance stores or removes blocks [start, end of the prompt); unheard, as by a copy or a loss."""
        keys = prompt.keys[start:]
        group = GROUPS.get(place.instance, ({},) * (place.group + 1))[place.group] | {"medium": place.medium}
        if stores:
            touched = self._apply(place.instance, place.rank, _stored(prompt, start, len(prompt.names), group))
            self.oracle.store(place, keys)
        else:
            touched = self._apply(place.instance, place.rank, _removed(keys, group))
            self.oracle.remove(place, keys)
        if heard:
            self.speculation.confirm(SPACE, place.instance, touched)
            self.oracle.heard(place.instance, keys)

    def check(self, prompt: Blocks, candidates: set[str] | None) -> None:
        keys = prompt.keys
        known = None if candidates is None else dict.fromkeys(candidates, SIZE)
        asked = KeyPrompt(keys)
        found = find(self.index, [SPACE], asked, known)
        self.oracle.expire(self.now)
        ahead = self.lookahead.ahead(found, asked, known) if self.speculation.alive else None
        expected = self.oracle.ahead(keys)
        if candidates is not None:
            expected = {instance: end for instance, end in expected.items() if instance in candidates}
        assert {instance: soon.tokens // SIZE for instance, soon in (ahead or {}).items()} == expected
        assert ahead is None or ahead
        self.speculation.expire(self.now)
        assert self.speculation.references == self.oracle.named <= self.oracle.bound
        self._check_runs(keys)

    def _check_runs(self, keys: list[int]) -> None:
        """What living routings name and no more, who waits for it, bits for each by itself."""
        runs = self.speculation.routings(SPACE)
        if runs is None:
            assert not self.oracle.routings
            return
        living = self.oracle.routings.items()
        assert runs.bits.keys() == {whose for (whose, _), _ in living}
        assert sorted(runs.bits.values()) == sorted({1 << bit.bit_length() - 1 for bit in runs.bits.values()})
        assert runs.names == {bit: whose for whose, bit in runs.bits.items()}
        named = [any(key in routed for _, routed in self.oracle.routings) for key in keys]
        waiting = [
            sum({runs.bits[whose] for (whose, _), routing in living if key in routing.awaited}) for key in keys
        ]
        told: list[int] = []
        for stop, mask in zip(*runs.along(keys), strict=True):
            told += [mask] * (stop - len(told))
        assert told == waiting[: named.index(False) if False in named else None]


def _stored(prompt: Blocks, start: int, end: int, fields: dict[str, Any]) -> dict[str, Any]:
    keys = prompt.keys
    return {
        "type": "BlockStored",
        "block_hashes": keys[start:end],
        "parent_block_hash": keys[start - 1] if start else None,
        "token_ids": prompt.tokens[start * SIZE : end * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * (end - start),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        **fields,
    }


def _removed(keys: list[int], fields: dict[str, Any]) -> dict[str, Any]:
    place = {name: value for name, value in fields.items() if name in ("group_idx", "medium")}
    return {"type": "BlockRemoved", "block_hashes": keys, "medium": "GPU", "group_idx": 0, **place}


# Where things end

EDGES = (0, 1, MARK - 1, MARK, MARK + 1, 2 * MARK, 3 * MARK - 1, 3 * MARK)


@pytest.mark.parametrize("others", [0, 3 * MARK - 2, LONGEST])
def test_held_heard_and_routed_end_at_few_places_in_every_combination(others: int) -> None:
    """An instance holds something, is routed more, events speak of a part or of none; another was routed, too."""
    world = World([Blocks((0,) * LONGEST)], 10_000)
    names = world.prompts[0].names
    where = Place("ranked", 0, 0, "GPU"), Place("ranked", 1, 0, "GPU")
    for held, heard, until, routed in combinations_with_replacement(EDGES, 4):
        begun, spoken = Blocks(names[:held]), Blocks(names[:until])
        if held:
            world.event(begun, where[0], 0, stores=True, heard=False)
        for length, instance in ((others, "plain"), (routed, "ranked")):
            if length:
                world.route(Blocks(names[:length]), instance, 1)
        if heard < until:
            world.event(spoken, where[1], heard, stores=True, heard=True)
        for length in (routed, routed + 1, 3 * MARK, LONGEST):
            if length:
                world.check(Blocks(names[:length]), None)
        if held:
            world.event(begun, where[0], 0, stores=False, heard=False)
        if heard < until:
            world.event(spoken, where[1], heard, stores=False, heard=False)
        world.now += 1


def test_what_is_behind_a_hole_does_not_count() -> None:
    """Of a hundred blocks the twenty in the middle are heard of first: on another rank, or child before parent."""
    world = World([Blocks((0,) * LONGEST)], 10_000)
    prompt, middle = world.prompts[0], Blocks((0,) * 60)
    world.route(prompt, "ranked", 1)
    world.event(middle, Place("ranked", 1, 0, "GPU"), 40, stores=True, heard=True)
    found = find(world.index, [SPACE], KeyPrompt(prompt.keys), None)
    assert world.lookahead.ahead(found, KeyPrompt(prompt.keys), None) == {"ranked": Ahead(40 * SIZE, SIZE)}


def test_of_several_ranks_the_one_counts_that_gets_furthest_whichever_comes_first() -> None:
    """Of a prompt that is given in parts, the first one from its third block on."""
    world = World([Blocks((0,) * 12)], 10_000)
    prompt = world.prompts[0]
    for rank, held in enumerate((2, 5)):
        world.event(Blocks((0,) * held), Place("ranked", rank, 0, "GPU"), 0, stores=True, heard=True)
    for start, stop in ((2, 4), (5, 8)):
        world.speculation.add(SPACE, "ranked", prompt.keys[start:stop], 1)
    asked = KeyPrompt(prompt.keys)
    ((space, matches),) = find(world.index, [SPACE], asked, None)
    for several in (matches, matches[::-1]):
        ahead = world.lookahead.ahead([Found(space, several)], asked, None)
        assert ahead == {"ranked": Ahead(8 * SIZE, SIZE)}


def test_a_rank_that_gets_as_far_as_another_one_is_gets_no_further() -> None:
    """Rank 1 holds all; rank 0 begins, and what it lacks is on its way to the instance."""
    world = World([Blocks((0,) * 20)], 10_000)
    prompt = world.prompts[0]
    world.event(prompt, Place("ranked", 1, 0, "GPU"), 0, stores=True, heard=True)
    world.route(prompt, "ranked", 1)
    world.event(Blocks((0,) * 5), Place("ranked", 0, 0, "GPU"), 0, stores=True, heard=True)
    found = find(world.index, [SPACE], KeyPrompt(prompt.keys), None)
    assert len(found[0].matches) == 2
    assert world.lookahead.ahead(found, KeyPrompt(prompt.keys), None) is None


# Histories

Draw = Callable[[st.SearchStrategy[Any]], Any]
DEPTHS = st.one_of(
    st.integers(0, LONGEST),
    st.builds(lambda mark, by: max(mark * MARK + by, 0), st.integers(0, LONGEST // MARK), st.integers(-1, 1)),
)
"""Where blocks begin and end: anywhere, and around few places."""


@st.composite
def families(draw: st.DrawFn) -> list[Blocks]:
    """Prompts that share beginnings."""
    prompts: list[Blocks] = []
    for number in range(draw(st.integers(1, 3))):
        shared = draw(st.sampled_from(prompts)).names[: draw(DEPTHS)] if prompts else ()
        length = draw(st.sampled_from((LONGEST, 3 * MARK, 3 * MARK + 1))) if draw(st.booleans()) else draw(DEPTHS)
        prompts.append(Blocks(shared + (number,) * max(length - len(shared), 1)))
    return prompts


@st.composite
def places(draw: st.DrawFn) -> list[Place]:
    """One place; of an instance with groups one, or the same for each group."""
    instance = draw(st.sampled_from(("ranked", "ranked", "plain", "hybrid")))
    rank = draw(st.integers(0, 1)) if instance == "ranked" else 0
    medium = draw(st.sampled_from(("GPU", "GPU", "CPU")))
    groups = range(len(GROUPS.get(instance, ({},))))
    chosen = groups if draw(st.booleans()) else [draw(st.sampled_from(groups))]
    return [Place(instance, rank, group, medium) for group in chosen]


def parts(draw: Draw, world: World) -> Blocks:
    """A prompt, or a beginning of it."""
    names = draw(st.sampled_from(world.prompts)).names
    return Blocks(names[: max(draw(DEPTHS), 1)] if draw(st.booleans()) else names)


def live(data: st.DataObject, steps: int) -> None:
    """One history: after every step all prompts, and a beginning of one, are asked for."""
    draw = data.draw
    world = World(draw(families()), draw(st.sampled_from((10_000, 10_000, 230, 90, 17))))
    doing: dict[str, Callable[[], None]] = {
        "route": lambda: world.route(
            parts(draw, world), draw(st.sampled_from((*INSTANCES, "ranked"))), draw(st.integers(1, 9))
        ),
        "event": lambda: _an_event(draw, world),
        "wait": lambda: _wait(draw, world),
    }
    for _ in range(draw(st.integers(1, 3)) * steps // 3):
        doing[draw(st.sampled_from(("route", "route", "route", "event", "event", "event", "wait")))]()
        candidates = draw(st.none() | st.sets(st.sampled_from(INSTANCES), min_size=1))
        for prompt in (*world.prompts, parts(draw, world)):
            world.check(prompt, candidates)
    world.now += 10
    world.check(world.prompts[0], None)
    assert (world.speculation.alive, world.speculation.references, world.speculation.blocks) == (False, 0, 0)
    assert world.speculation.routings(SPACE) is None


def _an_event(draw: Draw, world: World) -> None:
    prompt = parts(draw, world)
    start = draw(st.integers(0, 1)) and min(draw(DEPTHS), len(prompt.names) - 1)
    stores, heard = draw(st.sampled_from(((True, True), (True, True), (False, True), (True, False), (False, False))))
    for place in draw(places()):
        world.event(prompt, place, start, stores=stores, heard=heard)


def _wait(draw: Draw, world: World) -> None:
    world.now += draw(st.integers(1, 3))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_instances_get_as_far_as_the_oracle_says_whatever_has_happened(data: st.DataObject) -> None:
    live(data, 12)


@pytest.mark.proof
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_they_do_in_many_long_histories_too(data: st.DataObject) -> None:
    live(data, 36)
