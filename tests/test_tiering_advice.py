"""Advice for offload managers: each row of the table, what comes before it, and what must never be said."""

from __future__ import annotations

from itertools import product
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindexer.tiering.advice import RULES, Copies, Facts, Verdict, advise
from kvindexer.tiering.nearness import Copy, order, reach
from kvindexer.tiering.planning import Asker, look_around
from kvindexer.types import Tier

NONE, OWN, UNSURE, SURE = Copies
EVERYTHING: Final = [
    Facts(known, below, others, hot, bottom)
    for known, below, others, hot, bottom in product((True, False), Copies, Copies, (True, False), (True, False))
]


@pytest.mark.parametrize(
    ("row", "facts", "verdict"),
    [
        (0, Facts(known=False, below=SURE, others=SURE, hot=True, bottom=False), ("keep", "unknown")),
        (1, Facts(known=True, below=SURE, others=NONE, hot=True, bottom=False), ("drop", "lower_copy")),
        (2, Facts(known=True, below=UNSURE, others=SURE, hot=False, bottom=False), ("drop", "other_holder")),
        (3, Facts(known=True, below=NONE, others=SURE, hot=True, bottom=True), ("keep", "hot")),
        (4, Facts(known=True, below=NONE, others=SURE, hot=True, bottom=False), ("offload", "hot")),
        (5, Facts(known=True, below=UNSURE, others=NONE, hot=False, bottom=False), ("keep", "lower_copy_unsure")),
        (6, Facts(known=True, below=NONE, others=UNSURE, hot=False, bottom=True), ("keep", "other_holders_unsure")),
        (
            7,
            Facts(known=True, below=NONE, others=UNSURE, hot=True, bottom=False),
            ("offload", "other_holders_unsure"),
        ),
        (8, Facts(known=True, below=NONE, others=OWN, hot=True, bottom=True), ("keep", "own_copies_only")),
        (9, Facts(known=True, below=NONE, others=OWN, hot=False, bottom=False), ("offload", "own_copies_only")),
        (10, Facts(known=True, below=NONE, others=NONE, hot=False, bottom=True), ("keep", "last_copy")),
        (11, Facts(known=True, below=NONE, others=NONE, hot=False, bottom=False), ("offload", "last_copy")),
    ],
)
def test_each_row_decides_what_it_is_about(row: int, facts: Facts, verdict: tuple[str, str]) -> None:
    assert next(number for number, rule in enumerate(RULES) if rule.fits(facts)) == row
    assert advise(facts) == verdict


def test_every_row_has_its_case_and_everything_has_a_verdict() -> None:
    first = {next(number for number, rule in enumerate(RULES) if rule.fits(facts)) for facts in EVERYTHING}
    assert first == set(range(len(RULES)))


@pytest.mark.parametrize("facts", EVERYTHING)
def test_nothing_is_dropped_without_a_copy_that_is_certain(facts: Facts) -> None:
    if advise(facts).advice == "drop":
        assert facts.known
        assert SURE in (facts.below, facts.others)


@pytest.mark.parametrize("facts", [facts for facts in EVERYTHING if facts.bottom])
def test_nothing_is_offloaded_from_the_last_tier(facts: Facts) -> None:
    assert advise(facts).advice != "offload"


# What there is beside a copy

ASKER = Asker("pod-a", store=False, tier=Tier.GPU, rank=None)


def own(tier: Tier, rank: int = 0, *, certain: bool = True, groups: tuple[int, ...] = (0,)) -> Copy:
    return Copy("pod-a", False, (), rank, tier, certain, groups)  # noqa: FBT003 - the field's name is in the class


def other(tier: Tier, name: str = "pod-b", *, certain: bool = True, groups: tuple[int, ...] = (0,)) -> Copy:
    return Copy(name, False, (), 0, tier, certain, groups)  # noqa: FBT003


def store(*readers: str, tier: Tier = Tier.REMOTE, certain: bool = True) -> Copy:
    return Copy("shared", True, readers, 0, tier, certain)  # noqa: FBT003


def verdict(*copies: Copy, asker: Asker = ASKER, hot: bool = False) -> Verdict:
    around = look_around(asker, copies)
    bottom = asker.tier is Tier.REMOTE
    return advise(Facts(known=True, below=around.below, others=around.others, hot=hot, bottom=bottom))


def test_copies_are_counted_by_owner() -> None:
    two_ranks = other(Tier.GPU)._replace(rank=1)
    around = look_around(ASKER, [own(Tier.GPU), other(Tier.GPU), two_ranks, other(Tier.GPU, "pod-c"), store()])
    assert around.copies == (2, 0, 0, 1)
    assert around.held
    assert not around.last


def test_the_last_copy_is_alone_on_all_tiers() -> None:
    assert look_around(ASKER, [own(Tier.GPU)]).last
    for beside in (own(Tier.CPU), own(Tier.GPU, rank=1), other(Tier.DISK, certain=False), store()):
        around = look_around(ASKER._replace(rank=0), [own(Tier.GPU), beside])
        assert not around.last, beside


def test_a_copy_below_counts_for_the_rank_that_can_load_it() -> None:
    assert verdict(own(Tier.GPU), own(Tier.CPU)) == ("drop", "lower_copy")
    assert verdict(own(Tier.GPU), own(Tier.CPU, rank=1)) == ("offload", "own_copies_only")
    assert verdict(own(Tier.GPU), own(Tier.GPU, 1), own(Tier.CPU, 1)) == ("offload", "own_copies_only")
    assert verdict(own(Tier.GPU), own(Tier.GPU, 1), own(Tier.CPU, 1), own(Tier.CPU)) == ("drop", "lower_copy")
    assert verdict(own(Tier.GPU), own(Tier.CPU, certain=False)) == ("keep", "lower_copy_unsure")


def test_a_copy_on_a_nearer_tier_does_not_count() -> None:
    assert verdict(own(Tier.GPU), own(Tier.CPU), asker=ASKER._replace(tier=Tier.CPU)) == (
        "offload",
        "own_copies_only",
    )


def test_a_store_counts_as_below_for_its_readers_and_as_another_holder_for_the_rest() -> None:
    assert verdict(own(Tier.GPU), store("pod-a"), hot=True) == ("drop", "lower_copy")
    assert verdict(own(Tier.GPU), store("pod-b")) == ("drop", "other_holder")
    assert verdict(own(Tier.GPU), store("pod-b"), hot=True) == ("offload", "hot")
    assert verdict(own(Tier.GPU), store("pod-a", certain=False)) == ("keep", "lower_copy_unsure")


def test_a_stores_own_copy_is_not_another_holder() -> None:
    asker = Asker("shared", store=True, tier=Tier.REMOTE, rank=None)
    assert verdict(store("pod-a"), asker=asker) == ("keep", "last_copy")
    assert verdict(store("pod-a"), other(Tier.GPU), asker=asker) == ("drop", "other_holder")


def test_a_copy_that_lacks_a_cache_group_is_not_certain() -> None:
    """Half of a hybrid model's block can't replace the whole."""
    whole = own(Tier.GPU, groups=(0, 1))
    assert verdict(whole, other(Tier.GPU, groups=(1,))) == ("offload", "other_holders_unsure")
    assert verdict(whole, other(Tier.GPU, groups=(0, 1))) == ("drop", "other_holder")
    assert verdict(whole, own(Tier.CPU, groups=(0,))) == ("keep", "lower_copy_unsure")


def test_a_copy_that_the_index_does_not_know_of_is_judged_by_the_others() -> None:
    around = look_around(ASKER, [other(Tier.GPU)])
    assert not around.held
    assert verdict(other(Tier.GPU)) == ("drop", "other_holder")
    assert verdict() == ("offload", "last_copy")


COPIES = st.builds(
    Copy,
    st.sampled_from(["pod-a", "pod-b", "shared"]),
    st.booleans(),
    st.sampled_from([(), ("pod-a",), ("pod-b",)]),
    st.integers(0, 1),
    st.sampled_from(list(Tier)),
    st.booleans(),
    st.sampled_from([(0,), (1,), (0, 1)]),
)


@given(st.lists(COPIES, max_size=6), st.sampled_from(list(Tier)), st.none() | st.integers(0, 1), st.booleans())
def test_whatever_there_is_a_drop_leaves_a_certain_copy(
    copies: list[Copy],
    tier: Tier,
    rank: int | None,
    hot: bool,  # noqa: FBT001 - given by name
) -> None:
    """Of somebody else, or of the same instance below."""
    asker = ASKER._replace(tier=tier, rank=rank)
    if verdict(*copies, asker=asker, hot=hot).advice == "drop":
        assert any(
            copy.certain and ((copy.owner, copy.store) != ("pod-a", False) or copy.tier > tier) for copy in copies
        )


# Order


def test_copies_are_listed_nearest_first() -> None:
    expected = [
        own(Tier.GPU),
        own(Tier.CPU),
        store("pod-a"),
        other(Tier.GPU, "pod-c"),
        other(Tier.GPU, certain=False),
        other(Tier.CPU),
        store("pod-b", tier=Tier.DISK),
    ]
    assert sorted(set(expected), key=lambda copy: order(copy, "pod-a")) == expected
    assert [reach(copy, "pod-a") for copy in expected] == ["own", "own", "reads", *["other"] * 3, "apart"]
    by_tier = sorted(expected, key=lambda copy: order(copy, None))
    assert [copy.tier for copy in by_tier] == [0, 0, 0, 1, 1, 2, 3]
    assert [copy.owner for copy in by_tier[:3]] == ["pod-a", "pod-c", "pod-b"]
