"""The tables of reasons: a situation for each row, and no row without one."""

from __future__ import annotations

from typing import Any

import pytest

from kvindexer.api.near import MOST, near
from kvindexer.api.reasons import ALSO, LATE_MS, STOPS, Situation, why

HALF: dict[str, Any] = {"blocks": 10, "block_size": 4, "held": 5, "usable": 5, "cached": 5, "rank": 0}
NOTHING: dict[str, Any] = {"blocks": 10, "block_size": 4}
WHOLE: dict[str, Any] = {**HALF, "held": 10, "usable": 10, "cached": 10}

STOP_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({**NOTHING, "blocks": 0}, "shorter_than_a_block", "no full block of 4 tokens"),
    (WHOLE, "whole_prompt", "nothing to do"),
    ({**HALF, "usable": 3}, "group_rule", "5 blocks are held, but a cache group"),
    ({**NOTHING, "state": "gone"}, "gone", "gone_after_s"),
    ({**NOTHING, "heard": False}, "no_events", "enable_kv_cache_events"),
    ({**NOTHING, "other_size": (8, 16)}, "other_block_size", "holds 16 tokens of the prompt in blocks of 8"),
    ({**HALF, "partly": True}, "group_missing", "not for all that need it"),
    (
        {**HALF, "ranks": (1, 2)},
        "other_rank",
        "Rank 1, 2 of it holds the block, and what is before it lies with rank 0",
    ),
    ({**HALF, "other_lora": 40}, "other_lora", "holds 40 tokens of the prompt for another LoRA"),
    ({**HALF, "remembered": True}, "removed", "stored before here and has gone since"),
    ({**HALF, "remembered": True, "shared": True}, "removed", "or by one that shares a store with it"),
    ({**HALF, "remembered": True, "others": ("b",)}, "removed", "still held by b"),
    ({**HALF, "others": ("b", "c")}, "held_by_others", "it is held by b, c: route"),
    (NOTHING, "never_stored", "Nobody holds the block"),
]

ALSO_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({**WHOLE, "meets": False}, "filtered_by_require", "/v1/match leaves it out"),
    ({**WHOLE, "cached": 9}, "last_block_computed", "report 4 tokens less"),
    ({**WHOLE, "registered": (4,), "seen": (8,)}, "wrong_block_size", "blocks of 4 tokens and its events say 8"),
    ({**WHOLE, "state": "stale"}, "not_live", "state is stale"),
    ({**WHOLE, "sound": False, "why": "a gap"}, "not_sound", "may be gone (a gap)"),
    ({**HALF, "complete": False}, "not_complete", "may hold more"),
    ({**WHOLE, "lag_ms": LATE_MS}, "lag", "wait 250 ms"),
    ({**HALF, "orphans": 7}, "orphans", "7 blocks that it holds can't be placed"),
    ({**HALF, "chunk": 4}, "chunked_offload", "last block of 4"),
    ({**WHOLE, "unknown_group": True}, "unknown_group", "upper bound"),
    ({**NOTHING, "extras": "none"}, "no_extras_given", "give lora, cache_salt"),
    ({**NOTHING, "extras": "some"}, "extras_given", "just these"),
    ({**NOTHING, "extras": "in keys"}, "keys_given", "ask with tokens"),
]


@pytest.mark.parametrize(("situation", "reason", "words"), STOP_ROWS, ids=lambda part: str(part)[:40])
def test_a_match_ends_where_it_does_for_one_reason(situation: dict[str, Any], reason: str, words: str) -> None:
    stop, _ = why(Situation(**situation))
    assert stop.reason == reason
    assert words in stop.advice


@pytest.mark.parametrize(("situation", "reason", "words"), ALSO_ROWS, ids=lambda part: str(part)[:40])
def test_what_else_may_have_to_do_with_it_is_told_too(situation: dict[str, Any], reason: str, words: str) -> None:
    _, also = why(Situation(**situation))
    (said,) = [one for one in also if one.reason == reason]
    assert words in said.advice


def test_every_row_has_its_situation() -> None:
    assert list(dict.fromkeys(reason for _, reason, _ in STOP_ROWS)) == [row.reason for row in STOPS]
    assert [reason for _, reason, _ in ALSO_ROWS] == [row.reason for row in ALSO]


def test_a_whole_match_of_a_good_source_has_nothing_else_to_say() -> None:
    assert why(Situation(**WHOLE))[1] == []
    assert why(Situation(**HALF))[1] == []


def test_missing_blocks_matter_only_where_some_are_missing() -> None:
    troubled = {**WHOLE, "complete": False, "orphans": 3, "chunk": 4, "extras": "some"}
    assert why(Situation(**troubled))[1] == []


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("Llama", ["llama", "qwen"], ["llama"]),
        ("pod-a", ["pod_a", "pod-a1", "engine"], ["pod-a1", "pod_a"]),
        ("10.0.0.1:8001", ["10.0.0.1:8000", "x"], ["10.0.0.1:8000"]),
        ("nothing like it", ["pod-a"], []),
        ("pod-a", [], []),
        ("", ["pod-a"], []),
    ],
)
def test_near_spellings(name: str, known: list[str], expected: list[str]) -> None:
    assert near(name, known) == expected


def test_near_spellings_are_few_and_quick_whatever_the_names_are() -> None:
    known = [f"{'x' * 1000}{number}" for number in range(4096)]
    assert len(near("x" * 1024, known)) == MOST
    assert near("pod-77", [f"pod-{number}" for number in range(4096)])[0] == "pod-77"
