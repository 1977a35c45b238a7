"""Tiers: what media mean, what groups need, what a prefix is worth."""

from __future__ import annotations

import pytest

from kvindexer.settings import Settings
from kvindexer.tiering.groups import EVERY_BLOCK, GroupRule, group_rule
from kvindexer.tiering.media import MEDIA, MediaTable, tier_named
from kvindexer.tiering.weights import DEFAULT_WEIGHTS, score
from kvindexer.types import TIERS, Tier

SPELLINGS = {
    Tier.GPU: ("GPU", "gpu", "Gpu"),
    Tier.CPU: ("CPU", "cpu", "CPU_PINNED", "cpu_pinned", "CPU_TIER1", "CPU_TIER2"),
    Tier.DISK: ("DISK", "disk", "STORAGE", "Storage", "FS"),
    Tier.REMOTE: ("SHARED_STORAGE", "OBJECT_STORE", "OBJ", "obj", "EXTERNAL"),
}


@pytest.mark.parametrize(
    ("medium", "tier"), [(medium, tier) for tier, media in SPELLINGS.items() for medium in media]
)
def test_every_known_medium_has_its_tier_in_any_case(medium: str, tier: Tier) -> None:
    assert MediaTable().tier(medium) == (tier, True)


def test_no_known_medium_is_left_out_above() -> None:
    assert set(MEDIA) == {medium.upper() for media in SPELLINGS.values() for medium in media}


@pytest.mark.parametrize("medium", ["NVME", "", "GPU ", "ＧＰＵ"])  # noqa: RUF001 - letters that only look alike
def test_an_unknown_medium_is_remote_and_said_to_be_unknown(medium: str) -> None:
    assert MediaTable().tier(medium) == (Tier.REMOTE, False)


@pytest.mark.parametrize("locality", ["REMOTE", "remote"])
def test_what_lies_elsewhere_is_remote_whatever_it_lies_on(locality: str) -> None:
    assert MediaTable().tier("CPU", locality) == (Tier.REMOTE, True)


@pytest.mark.parametrize("locality", [None, "LOCAL", "local", "SOMEWHERE"])
def test_any_other_locality_leaves_the_medium_alone(locality: str | None) -> None:
    assert MediaTable().tier("CPU", locality) == (Tier.CPU, True)


def test_rows_of_the_settings_come_on_top() -> None:
    table = MediaTable({"nvme": "disk", "Storage": "remote"})
    assert table.tier("NVMe") == (Tier.DISK, True)
    assert table.tier("STORAGE") == (Tier.REMOTE, True)
    assert table.tier("DISK") == (Tier.DISK, True)
    assert MediaTable().tier("nvme") == (Tier.REMOTE, False)  # and stay in their table


def test_a_row_with_a_wrong_tier_names_it_and_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"'tape' is no tier: gpu, cpu, disk, remote"):
        MediaTable({"LTO": "tape"})


@pytest.mark.parametrize("tier", TIERS)
def test_tiers_are_named_by_their_labels(tier: Tier) -> None:
    assert tier_named(tier.label) is tier
    assert tier_named(tier.name) is tier


@pytest.mark.parametrize("kind", [None, "full_attention", "mla_attention", "sink_full_attention"])
def test_full_attention_needs_every_block(kind: str | None) -> None:
    assert group_rule(kind, None, 16) == GroupRule(EVERY_BLOCK, known=True)


@pytest.mark.parametrize("kind", ["sliding_window", "sliding_window_mla"])
@pytest.mark.parametrize(
    ("window", "block_size", "tail"),
    [(1, 16, 1), (2, 16, 1), (17, 16, 1), (18, 16, 2), (33, 16, 2), (34, 16, 3), (1024, 32, 32), (1025, 32, 32)],
)
def test_a_window_needs_the_blocks_it_reaches_back_into(kind: str, window: int, block_size: int, tail: int) -> None:
    """The next token sees window - 1 tokens before it."""
    assert group_rule(kind, window, block_size) == GroupRule(tail, known=True)


def test_mamba_needs_the_block_at_the_boundary() -> None:
    assert group_rule("mamba", None, 16) == GroupRule(1, known=True)


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        ("chunked_local_attention", None),
        ("cross_attention", None),
        ("encoder_only_attention", None),
        ("unknown", None),
        ("of_next_year", 512),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("sliding_window", -1),
    ],
)
def test_what_is_not_known_is_taken_for_full_attention_and_flagged(kind: str, window: int | None) -> None:
    assert group_rule(kind, window, 16) == GroupRule(EVERY_BLOCK, known=False)


@pytest.mark.parametrize(
    ("cumulative", "worth"),
    [
        ((0, 0, 0, 0), 0.0),
        ((10, 10, 10, 10), 10.0),
        ((0, 10, 10, 10), 8.0),
        ((0, 0, 10, 10), 4.0),
        ((0, 0, 0, 10), 2.0),
        ((4, 8, 8, 8), 4 + 4 * 0.8),
        ((1, 2, 3, 4), 1 + 0.8 + 0.4 + 0.2),
    ],
)
def test_each_tier_adds_what_it_has_beyond_the_nearer_ones(
    cumulative: tuple[int, int, int, int], worth: float
) -> None:
    assert score(cumulative, 10) == pytest.approx(worth)


@pytest.mark.parametrize(("usable", "worth"), [(8, 4 + 4 * 0.8), (6, 4 + 2 * 0.8), (3, 3.0), (0, 0.0)])
def test_what_the_engine_can_not_reuse_is_worth_nothing(usable: int, worth: float) -> None:
    assert score((4, 8, 8, 8), usable) == pytest.approx(worth)


def test_weights_are_a_setting() -> None:
    assert score((1, 2, 3, 4), 4, (1.0, 1.0, 1.0, 1.0)) == 4.0
    assert len(DEFAULT_WEIGHTS) == len(TIERS)
    assert sorted(DEFAULT_WEIGHTS, reverse=True) == list(DEFAULT_WEIGHTS)
    assert tuple(Settings().tier_weights[tier.label] for tier in TIERS) == DEFAULT_WEIGHTS
