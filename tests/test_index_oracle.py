"""Generated histories of a fleet: after every step the index answers what the naive oracle answers.

The fleet has what goes wrong together: publishers that share an instance, ranks, a hybrid model, offload chunks, a
set-like engine, one with another block size than it was registered with, and stores that share hashes with readers.
Prompts share prefixes, branch, go on for several turns and repeat themselves; salts and LoRAs tell equal tokens
apart.  Events come late, twice, child before parent, or without saying what they mean.  They never lie: an engine
hash is a function of the blocks up to its own.
"""

from __future__ import annotations

from hashlib import blake2b
from random import Random
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from copying import everything
from kvindexer.index.engine import PyIndex
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier
from oracle import Event, Oracle, Prompt, cleared, payload, placeholder, removed, stored

SIZE, WIDE = 4, 8
SPACES = (Keyspace("default", "tiny", "", SIZE), Keyspace("default", "tiny", "", WIDE))
SHARED, BRANCH = tuple(range(8)), tuple(range(100, 112))
TURN = (*SHARED, *range(8, 20))
PROMPTS = (
    Prompt((*TURN, *range(20, 33))),  # later turn, with a partial tail
    Prompt(TURN),
    Prompt((*SHARED, *BRANCH)),
    Prompt((7, 7, 7, 7) * 5),
    Prompt(TURN, salt="blue"),
    Prompt(TURN, lora="blue"),
    Prompt(TURN[:16], lora="blue", salt="blue"),
    Prompt((1, 2, 3)),
)


def spec(instance: str, **more: Any) -> SourceSpec:
    return SourceSpec(instance=instance, model="tiny", block_size=SIZE, endpoint=f"tcp://{instance}:1", **more)


SPECS = {
    "plain": spec("pod-a"),
    "offloader of plain": spec("pod-a"),
    "ranked": spec("pod-b", rank=1, speculative_blocks=1, clear_lower_tiers=True),
    "chunked": spec("pod-c", offload_blocks_per_chunk=2),
    "hybrid": spec("pod-h"),
    "set-like": spec("pod-s", type="sglang"),
    "full report": spec("pod-f", report_mode="full", offload_connector=False),
    "wide": spec("pod-w"),
    "windowed": spec("pod-n", speculative_blocks=1),
    "store": spec("store", type="store", tier="remote", readers=("pod-a", "pod-b", "pod-w", "pod-h")),
    "chunk store": spec("disks", type="store", tier="disk", readers=("pod-b",), offload_blocks_per_chunk=3),
}
FLEETS = (
    ("plain", "offloader of plain", "store"),
    ("wide", "plain", "store"),
    ("hybrid", "store"),
    ("hybrid", "store"),
    ("chunked",),
    ("ranked", "chunk store"),
    ("plain", "ranked", "store"),
    ("set-like", "full report", "ranked"),
    ("windowed", "full report"),
    ("wide", "hybrid", "plain", "chunked", "store"),
)
RANKS = st.sampled_from((None, None, None, 0, 1))
MEDIA = ("GPU", "CPU", "STORAGE", "OBJ")
GROUPS: dict[int, dict[str, Any]] = {
    0: {"group_idx": 0, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 9},
    1: {"group_idx": 1},
    2: {"group_idx": 2, "kv_cache_spec_kind": "mamba"},
}


def hashes(prompt: Prompt, size: int, kind: str = "") -> list[int]:
    """An engine's hashes of the prompt's full blocks; another kind is another hash of the same block."""
    blocks = prompt.blocks(size)
    named = [repr((kind, size, blocks[: n + 1])).encode() for n in range(len(blocks))]
    return [int.from_bytes(blake2b(name, digest_size=8).digest(), "big") for name in named]


def part(prompt: Prompt, size: int, start: int, end: int, kind: str = "", **more: Any) -> Event:
    """A store of blocks [start, end) that says everything."""
    named = hashes(prompt, size, kind)
    parent = named[start - 1] if start else None
    return stored(prompt, named[start:end], size=size, start=start, parent=parent, **more)


@st.composite
def stores(draw: st.DrawFn, source: str) -> list[Event]:
    """What one source may say of blocks that it has computed, or has copied to a lower tier."""
    prompt = draw(st.sampled_from(PROMPTS[:-1]))
    size = WIDE if source == "wide" and draw(st.integers(0, 3)) else SIZE
    blocks = len(prompt.blocks(size))
    start = draw(st.sampled_from((0, 0, 0, *range(blocks))))
    end = draw(st.integers(start + 1, blocks))
    kind = draw(st.sampled_from(("", "", "lookahead")))
    whole = part(prompt, size, start, end, kind, **(GROUPS[0] if source == "windowed" else {}))
    if draw(st.sampled_from(("gpu", "gpu", "gpu" if "store" not in source else "lower", "lower"))) == "lower":
        return [draw(below_the_gpu(whole)) for _ in range(draw(st.integers(1, 2)))]
    if source == "hybrid":
        return draw(hybrid_store(prompt, start, end, kind))
    if end - start > 1 and draw(st.booleans()):
        middle = draw(st.integers(start + 1, end - 1))
        group = {name: whole[name] for name in GROUPS[0]}
        halves = [part(prompt, size, *ends, **group) for ends in ((start, middle, kind), (middle, end, kind))]
        return draw(st.permutations(halves))
    return [whole] * draw(st.integers(1, 2))


@st.composite
def removals(draw: st.DrawFn, held: list[tuple[Any, ...]]) -> list[Event]:
    """Some of what is held, in any order, and perhaps something that is not."""
    chosen = draw(st.lists(st.sampled_from(held), min_size=1, max_size=6))
    return [
        removed(
            [block_hash + draw(st.sampled_from((0, 0, 0, 0, 1)))], medium=MEDIA[tier], group_idx=group, ownership=o
        )
        for _, group, tier, o, block_hash in chosen
    ]


@st.composite
def below_the_gpu(draw: st.DrawFn, whole: Event) -> Event:
    """The same blocks on a lower tier: named only, told in full, or without what makes them unmistakable."""
    more = {
        "medium": draw(st.sampled_from(MEDIA[1:])),
        "ownership": draw(st.sampled_from((None, None, "second tier"))),
        "group_idx": draw(st.sampled_from((0, 0, 1))),
    }
    how = draw(st.sampled_from(("named", "named", "told", "half told")))
    if how == "named":
        return placeholder(whole["block_hashes"][draw(st.integers(0, 1)) :], **more)
    return {**whole, **more, **({"extra_keys": None} if how == "half told" else {})}


@st.composite
def hybrid_store(draw: st.DrawFn, prompt: Prompt, start: int, end: int, kind: str) -> list[Event]:
    """The same blocks by groups: the window keeps the end of the range only, and its event does not say so."""
    kept = draw(st.integers(start, end))
    told = part(prompt, SIZE, start, end, kind)
    window = {**told, "block_hashes": told["block_hashes"][kept - start :], **GROUPS[0]}
    window["extra_keys"] = told["extra_keys"][kept - start :]
    boundary = {**told, "block_hashes": told["block_hashes"][-1:], "extra_keys": told["extra_keys"][-1:], **GROUPS[2]}
    by_group = [window, {**told, **GROUPS[1]}, *([boundary] if draw(st.integers(0, 7)) == 0 else [])]
    return draw(st.permutations(by_group))


class Fleet(RuleBasedStateMachine):
    """Sources that come, speak and go."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PyIndex()
        self.oracle = Oracle()
        self.fleet: tuple[str, ...] = ()
        self.turn = 0

    @initialize(fleet=st.sampled_from(FLEETS), order=st.randoms(use_true_random=False))
    def begin(self, fleet: tuple[str, ...], order: Random) -> None:
        """Some are there from the start; whoever shares hashes with a later one brings what it knows."""
        self.fleet = fleet
        for name in order.sample(fleet, order.randint(1, len(fleet))):
            self.attach(name)

    def attach(self, name: str) -> None:
        self.index.attach(name, SPECS[name])
        self.oracle.attach(name, SPECS[name])

    def held(self, name: str) -> list[tuple[Any, ...]]:
        return sorted(self.oracle.copies(name), key=repr)

    def any_source(self, data: st.DataObject) -> str:
        if not self.oracle.sources:
            self.attach(self.fleet[0])
        return data.draw(st.sampled_from([name for name in self.fleet if name in self.oracle.sources]))

    def say(self, name: str, said: list[Event], rank: int | None) -> None:
        change = self.index.apply(name, payload(said, rank))
        self.oracle.apply(name, said, rank)
        assert change.events == (len(said) if name in self.oracle.sources else 0)
        assert set(change.skipped) <= {"not_held", "other_block_size", "unknown_source"}

    @rule(data=st.data(), rank=RANKS)
    def store(self, data: st.DataObject, rank: int | None) -> None:
        name = self.any_source(data)
        self.say(name, data.draw(stores(name)), rank)

    @rule(data=st.data(), rank=RANKS)
    def store_again(self, data: st.DataObject, rank: int | None) -> None:
        """More of everything, in one batch."""
        name = self.any_source(data)
        said = [data.draw(stores(name)) for _ in range(3)]
        self.say(name, [event for events in said for event in events], rank)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Some copies of what the source holds go, from one rank."""
        name = self.any_source(data)
        if held := self.held(name):
            rank = data.draw(st.sampled_from(held))[0]
            self.say(name, data.draw(removals([entry for entry in held if entry[0] == rank])), rank)

    @rule(data=st.data(), rank=RANKS)
    def remove_and_store(self, data: st.DataObject, rank: int | None) -> None:
        name = self.any_source(data)
        gone = data.draw(removals(self.held(name))) if self.held(name) else []
        said = [*gone, *data.draw(stores(name))]
        self.say(name, data.draw(st.permutations(said)), rank)

    @rule(
        data=st.data(),
        what=st.sampled_from(("save", "save", "save", "withdraw", "withdraw", "clear", "go", "come", "come")),
    )
    def upheave(self, data: st.DataObject, what: str) -> None:
        """A source is saved and loaded, loses tiers, is reset, leaves, or comes (again)."""
        name = self.any_source(data)
        match what:
            case "save":
                self.save_and_load(name)
            case "withdraw":
                self.withdraw(name, data.draw(st.sets(st.sampled_from(TIERS), min_size=1)))
            case "clear":
                self.say(name, [cleared(), *data.draw(stores(name))], data.draw(RANKS))
            case "go":
                self.index.detach(name)
                self.oracle.detach(name)
                self.say(name, data.draw(stores(name)), None)
            case _:
                away = [name for name in self.fleet if name not in self.oracle.sources]
                self.attach(data.draw(st.sampled_from(away or self.fleet)))

    def save_and_load(self, name: str) -> None:
        saved, facts = everything(self.index, name), self.index.facts(name)
        self.index.attach(name, SPECS[name])
        self.index.load(name, list(saved), list(saved.values()))
        self.index.loaded(name, facts)

    def withdraw(self, name: str, tiers: set[Tier]) -> None:
        before = len(self.oracle.copies(name))
        self.oracle.withdraw(name, tiers)
        assert self.index.withdraw(name, tiers) == before - len(self.oracle.copies(name))

    @invariant()
    def copies_are_equal(self) -> None:
        for name in self.oracle.sources:
            held = self.oracle.copies(name)
            assert self.index.copies(name) == held
            stats = self.index.stats(name)
            assert stats.blocks == tuple(sum(entry.tier is tier for entry in held) for tier in TIERS)
            assert stats.orphans == self.oracle.orphans(name)
            assert not stats.truncated

    @invariant()
    def matches_are_equal(self) -> None:
        """Every other time for some instances only."""
        self.turn += 1
        only = {"pod-a", "pod-h", "pod-x"} if self.turn % 2 else None
        for space in SPACES if "wide" in self.fleet else SPACES[:1]:
            for prompt in PROMPTS:
                self.ask(space, prompt, only)

    def ask(self, space: Keyspace, prompt: Prompt, only: set[str] | None) -> None:
        keys = prompt.keys(space.block_size)
        found = self.index.match(space, keys, len(prompt.tokens), only)
        assert sorted(map(msgspec.structs.astuple, found)) == self.oracle.match(space, prompt, only)
        if prompt is PROMPTS[self.turn % len(PROMPTS)]:
            path = prompt.blocks(space.block_size)
            for block, places in enumerate(self.index.locate(space, keys)):
                assert len(places) == len(set(places))
                assert {tuple(each) for each in places} == self.oracle.locate(space, path[: block + 1])


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=250,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
