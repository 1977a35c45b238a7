"""Records: a copy kept up to date by them is the index, and an index that is loaded from them goes on like it.

The histories are those of the oracle's fleets: ranks, groups, owners, offload chunks, other block sizes, orphans that
wait for their parents, stores that share hashes with their readers.
"""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from copying import Copy, everything
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import IndexLimits
from kvindexer.types import TIERS, Tier
from oracle import Event, cleared, payload, removed
from test_index_oracle import FLEETS, PROMPTS, RANKS, SPACES, SPECS, removals, stores

NARROW = (
    IndexLimits(max_dead_bindings_per_source=2, max_orphans_per_source=3),
    IndexLimits(max_entries_per_source=7, max_entries=12),
    IndexLimits(max_entries=9, max_dead_bindings_per_source=4),
)
QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Copied(RuleBasedStateMachine):
    """A fleet, a copy of its index, and now and then a second index that was loaded from that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet: tuple[str, ...] = ()
        self.twin: PyIndex | None = None

    @initialize(fleet=st.sampled_from(FLEETS), limits=st.sampled_from((None, None, *NARROW)))
    def begin(self, fleet: tuple[str, ...], limits: IndexLimits | None) -> None:
        self.fleet, self.limits = fleet, limits
        self.index = self.attached(fleet)
        self.copy = Copy(self.index)
        for name in fleet:
            self.copy.take(name)

    def attached(self, fleet: tuple[str, ...]) -> PyIndex:
        index = PyIndex(self.limits, least_trusted=lambda: sorted(self.fleet))
        for name in fleet:
            index.attach(name, SPECS[name])
        return index

    def say(self, name: str, said: list[Event], rank: int | None = None) -> None:
        packed = payload(said, rank)
        change = self.index.apply(name, packed)
        self.copy.follow(name, change)
        if self.twin is not None:
            told = self.twin.apply(name, packed)
            assert told._replace(touched=change.touched, touched_of=change.touched_of) == change

    @rule(data=st.data(), rank=RANKS, again=st.integers(1, 3))
    def store(self, data: st.DataObject, rank: int | None, again: int) -> None:
        name = data.draw(st.sampled_from(self.fleet))
        said = [event for _ in range(again) for event in data.draw(stores(name))]
        self.say(name, said, rank)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.fleet))
        held: list[Any] = sorted(self.index.copies(name), key=repr)
        if held:
            rank = data.draw(st.sampled_from(held))[0]
            gone = data.draw(removals([entry for entry in held if entry[0] == rank]))
            self.say(name, [*gone, *(data.draw(stores(name)) if data.draw(st.booleans()) else [])], rank)

    @rule(data=st.data(), rank=RANKS)
    def forget(self, data: st.DataObject, rank: int | None) -> None:
        """All that one rank has held goes, and nobody else may know what it was."""
        name = data.draw(st.sampled_from(self.fleet))
        held = self.index.copies(name)
        gone = [h for (its_rank, *_, h), copies in held.items() if its_rank == (rank or 0) for _ in range(copies)]
        self.say(name, [removed(gone), cleared()], rank)

    @rule(data=st.data(), tiers=st.sets(st.sampled_from(TIERS), min_size=1))
    def withdraw(self, data: st.DataObject, tiers: set[Tier]) -> None:
        """The source is copied anew; those that share its hashes follow with the next batch."""
        name = data.draw(st.sampled_from(self.fleet))
        self.index.withdraw(name, tiers)
        self.copy.take(name)
        if self.twin is not None:
            self.twin.withdraw(name, tiers)
        self.say(name, [])

    @rule(order=st.randoms(use_true_random=False))
    def load(self, order: Random) -> None:
        """What the copy says makes an index like the first one, whatever order it comes in."""
        twin = self.attached(tuple(order.sample(self.fleet, len(self.fleet))))
        for name in order.sample(self.fleet, len(self.fleet)):
            kept = list(self.copy.records[name].items())
            order.shuffle(kept)
            parts = order.randint(1, 3)
            for part in range(parts):
                chosen = kept[part::parts]
                twin.load(name, [h for h, _ in chosen], [record for _, record in chosen])
            twin.loaded(name, self.index.facts(name))
        for name in self.fleet:
            assert everything(twin, name) == everything(self.index, name)
        self.twin = twin
        self.the_loaded_index_is_equal()
        if self.limits is not None:  # what goes first at a bound is not in the records
            self.twin = None

    @invariant()
    def the_copy_is_the_index(self) -> None:
        for name in self.fleet:
            assert self.copy.records[name] == everything(self.index, name)

    @precondition(lambda self: self.twin is not None)
    @invariant()
    def the_loaded_index_is_equal(self) -> None:
        one, other = self.index, self.twin
        assert other is not None
        for name in self.fleet:
            assert other.copies(name) == one.copies(name)
            assert other.stats(name) == one.stats(name)
            assert other.facts(name) == one.facts(name)
        covers = any(SPECS[name].offload_blocks_per_chunk > 1 for name in self.fleet)
        if covers and self.limits is not None:
            return  # a chunk goes on covering blocks whose keys were forgotten at a bound
        for space in SPACES:
            for prompt in PROMPTS:
                asked = space, prompt.keys(space.block_size), len(prompt.tokens)
                assert sorted(map(repr, other.match(*asked))) == sorted(map(repr, one.match(*asked)))


TestCopied = Copied.TestCase
TestCopied.settings = settings(QUICK, max_examples=200, stateful_step_count=25)
