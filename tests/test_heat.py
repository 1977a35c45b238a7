"""Heat: the bound on its error, decay, budget, keyspaces apart, and where shared prefixes end."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindexer.tiering.advice import Heat
from kvindexer.tiering.heat import MIN_SHARE, HeatCounts
from kvindexer.types import Keyspace

SPACE = Keyspace("t", "m", "", 16)
OTHER = Keyspace("u", "m", "", 16)
LONG_S = 1e9
"""A half-life so long that a count is a count."""


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def counts(clock: Clock, *, blocks: int = 1024, half_life_s: float = LONG_S, a_second: float = 1e9) -> HeatCounts:
    return HeatCounts(blocks, half_life_s, a_second, clock, Random(1))


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Keys of blocks: so many of this name, one part behind the other."""
    return [1_000_000 * name + block for name, length in parts for block in range(length)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), tails=st.integers(1, 40), skew=st.floats(0.3, 2.0))
def test_an_estimate_is_at_most_the_truth_and_lacks_at_most_the_error(seed: int, tails: int, skew: float) -> None:
    """Against exact counts, with far more different blocks than there is room for."""
    dice, clock = Random(seed), Clock()
    heat, truth = counts(clock, blocks=MIN_SHARE), Counter[int]()
    total = 0
    for number in range(300):
        trunk = int(dice.paretovariate(skew)) % 50
        keys = prompt((trunk, 5), (100 + number, dice.randrange(tails)))
        heat.asked(SPACE, keys)
        truth.update(keys)
        total += len(keys)
        assert heat.blocks <= MIN_SHARE
    error = heat.error_per_minute(SPACE)
    for key, asked in truth.items():
        assert asked - error - 1e-4 <= heat.heat(SPACE, key) <= asked + 1e-4
    assert error <= 4 * total / MIN_SHARE


def test_along_a_prompt_heat_never_grows() -> None:
    dice, clock = Random(2), Clock()
    heat = counts(clock, blocks=MIN_SHARE)
    prompts = [prompt((dice.randrange(20), 8), (dice.randrange(20, 400), 8)) for _ in range(500)]
    for keys in prompts:
        clock.now += dice.random()
        heat.asked(SPACE, keys)
    for keys in prompts:
        along = [heat.heat(SPACE, key) for key in keys]
        assert along[:8] == sorted(along[:8], reverse=True)


def test_old_questions_fade_by_half_each_half_life_and_a_steady_stream_is_its_rate() -> None:
    clock = Clock()
    heat = counts(clock, half_life_s=600.0)
    for _ in range(6 * 3600):
        clock.now += 1.0
        heat.asked(SPACE, [1, 2])
    assert heat.heat(SPACE, 2) == pytest.approx(60.0, rel=0.01)
    clock.now += 600.0
    assert heat.heat(SPACE, 2) == pytest.approx(30.0, rel=0.01)
    clock.now += 6000.0
    assert heat.heat(SPACE, 2) < 0.1


def test_numbers_stay_finite_for_ever() -> None:
    clock = Clock()
    heat = counts(clock, half_life_s=1.0)
    for _ in range(2_000):
        clock.now += 10.0
        heat.asked(SPACE, [1])
    assert 0 < heat.heat(SPACE, 1) < 1e3
    assert heat.error_per_minute(SPACE) == 0.0


def test_a_question_or_two_right_after_the_start_is_no_rate_of_thousands() -> None:
    clock = Clock()
    heat = counts(clock, half_life_s=600.0)
    heat.asked(SPACE, [1])
    heat.asked(SPACE, [1])
    assert heat.heat(SPACE, 1) == pytest.approx(2.0, rel=0.05)


def test_over_the_budget_prompts_are_left_out_and_estimates_are_right_on_average() -> None:
    clock, dice = Clock(), Random(3)
    heat = counts(clock, half_life_s=600.0, a_second=100.0)
    for _ in range(200_000):
        clock.now += dice.expovariate(100.0)
        heat.asked(SPACE, prompt((1, 10)) if dice.random() < 0.25 else prompt((2, 10)))
    assert 0.05 < heat.counted / (heat.counted + heat.left_out) < 0.2
    assert heat.heat(SPACE, prompt((1, 10))[9]) == pytest.approx(1500, rel=0.1)
    assert heat.heat(SPACE, prompt((2, 10))[9]) == pytest.approx(4500, rel=0.1)


def test_shared_prefixes_end_where_prompts_part() -> None:
    clock = Clock()
    heat = counts(clock)
    for number in range(20):
        heat.asked(SPACE, prompt((1, 6), (10 + number, 4)))
        if number < 5:
            heat.asked(SPACE, prompt((1, 6), (2, 3), (50 + number, 2)))
    found = [(block.key, block.blocks, round(block.asked_per_minute)) for block in heat.prefixes(SPACE, 10)]
    assert found == [(prompt((1, 6))[-1], 6, 25), (prompt((2, 3))[-1], 9, 5)]
    assert heat.prefixes(SPACE, 10)[0].above == prompt((1, 6))[-2]


def test_a_prompt_that_was_asked_for_once_is_no_shared_prefix() -> None:
    clock = Clock()
    heat = counts(clock)
    for number in range(20):
        heat.asked(SPACE, prompt((number, 6)))
    assert heat.prefixes(SPACE, 10) == []
    assert heat.hottest(SPACE, 10) == []


def test_no_keyspace_pushes_out_anothers_counts() -> None:
    """A tenant that asks for ever new prompts costs the other half of the room, and no counts."""
    clock = Clock()
    heat = counts(clock, blocks=2 * MIN_SHARE)
    for _ in range(3):
        heat.asked(OTHER, prompt((1, 20)))
    for number in range(3_000):
        heat.asked(SPACE, prompt((number, 20)))
    assert heat.heat(OTHER, prompt((1, 20))[-1]) == pytest.approx(3.0, rel=0.01)
    assert heat.heat(SPACE, prompt((1, 20))[-1]) == 0.0
    assert heat.heat(OTHER, prompt((2_999, 20))[-1]) == 0.0
    assert heat.blocks <= 2 * MIN_SHARE


def test_of_more_keyspaces_than_fit_the_one_goes_that_nobody_asks_for() -> None:
    clock = Clock()
    heat = counts(clock, blocks=4 * MIN_SHARE)
    for number in range(10):
        clock.now += 1
        heat.asked(SPACE, [1])
        heat.asked(Keyspace("t", f"m{number}", "", 16), list(range(300)))
    assert heat.heat(SPACE, 1) == pytest.approx(10.0, rel=0.01)
    assert heat.blocks <= 4 * MIN_SHARE


def test_keys_that_are_no_chain_do_no_harm() -> None:
    clock = Clock()
    heat = counts(clock)
    for keys in ([1, 2, 1, 2, 1], [3, 3, 3], [2, 1], [], [5, 6], [6, 5]) * 3:
        heat.asked(SPACE, keys)
    assert all(0 < block.blocks <= 6 for block in heat.prefixes(SPACE, 10) + heat.hottest(SPACE, 10))


def test_offload_plans_can_use_it() -> None:
    heat: Heat = counts(Clock())
    assert heat.heat(SPACE, 1) == 0.0
