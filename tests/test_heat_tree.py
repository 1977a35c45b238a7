"""The tree of runs against a table of single blocks, which knows every weight by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindexer.tiering.tree import ROOT, Runs

Path = tuple[int, ...]

PATHS = st.lists(st.integers(0, 2), min_size=0, max_size=12).map(tuple)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), PATHS, st.integers(1, 5)),
        st.tuples(st.just("look"), PATHS, st.just(0)),
        st.tuples(st.just("lighten"), st.just(()), st.just(0)),
        st.tuples(st.just("divide"), st.just(()), st.sampled_from([2, 4])),
    ),
    max_size=40,
)


def key(path: Path) -> int:
    """Of a path's last block: a chain, it stands for all of the path."""
    return hash((1, *path)) % 2**64


def keys(path: Path) -> list[int]:
    return [key(path[: end + 1]) for end in range(len(path))]


class Table:
    """Every block by itself."""

    def __init__(self) -> None:
        self.weights: dict[Path, float] = {}
        self.floor = 0.0

    def count(self, path: Path, weight: float) -> None:
        for end in range(1, len(path) + 1):
            self.weights[path[:end]] = self.weights.get(path[:end], self.floor) + weight

    def lighten(self) -> None:
        """Drop what weighs no more than the middle one, by weight."""
        if self.weights:
            self.floor = sorted(self.weights.values())[len(self.weights) // 2]
            self.weights = {path: weight for path, weight in self.weights.items() if weight > self.floor}

    def divide(self, by: float) -> None:
        self.weights = {path: weight / by for path, weight in self.weights.items()}
        self.floor /= by


def same(runs: Runs, table: Table) -> None:
    """The tree says what the table says, of every block and of its place."""
    placed = {
        key: (start + number, above if number == 0 else run.keys[number - 1], run.weight)
        for run, start, above in runs.all()
        for number, key in enumerate(run.keys)
    }
    assert placed == {
        key(path): (len(path) - 1, key(path[:-1]) if len(path) > 1 else ROOT, weight)
        for path, weight in table.weights.items()
    }
    assert (runs.blocks, runs.floor) == (len(table.weights), table.floor)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_the_tree_says_what_a_table_of_blocks_says(steps: list[tuple[str, Path, int]]) -> None:
    """Weights are small integers and halves of them, so sums are exact.  Single blocks are looked up at any time."""
    runs, table = Runs(), Table()
    for what, path, number in steps:
        if what == "count":
            passed = runs.count(keys(path), number)
            assert bool(path) <= passed <= len(path)
            table.count(path, number)
        elif what == "look":
            assert runs.weight(key(path)) == table.weights.get(path, table.floor)
        elif what == "lighten":
            runs.lighten()
            table.lighten()
        else:
            runs.divide(number)
            table.divide(number)
        same(runs, table)
    for path in list(table.weights):
        assert runs.weight(key(path)) == table.weights[path]


def test_a_prompt_costs_its_runs_and_not_its_blocks() -> None:
    runs = Runs()
    trunk = keys(tuple([0] * 1000))
    assert [runs.count(trunk, 1), runs.count(trunk, 1)] == [1, 1]
    assert runs.count([*trunk[:500], *range(1, 500)], 1) == 2
    assert runs.count(trunk, 1) == 2
    assert runs.count(trunk[:750], 1) == 2
    assert runs.count(trunk, 1) == 3


@pytest.mark.parametrize("wild", [[1, 2, 1, 2, 1], [3, 3, 3], [1, 9, 1], [1, 2], [1]])
def test_keys_that_are_no_chain_count_as_many_blocks_as_there_are(wild: list[int]) -> None:
    """No walk through them fails or goes on for ever, and the sizes stay true."""
    runs = Runs()
    for prompt in ([1, 2, 1, 2, 1], wild, [3, 3], wild[::-1], wild):
        runs.count(prompt, 1)
        assert runs.blocks == sum(len(placed.run.keys) for placed in runs.all())
    runs.weight(1)
    runs.lighten()
    assert runs.blocks == sum(len(placed.run.keys) for placed in runs.all())
