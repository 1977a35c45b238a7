"""POST /v1/match through a real server: figures, order, filters, and reasons for empty answers."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import pytest

import recordings
from api_server import LIVE, Api, batch, serving, stored
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import SourceSpec

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""


UNSEEN = {
    "concurrent twin 1": 0,  # its twin stored the blocks in the same step: no event yet
    "after reset": 128,  # the reset is published only with the next step
}
"""Requests of the recording whose hits the wire could not foretell, and what we say instead."""


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def match(api: Api, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = api.post("/v1/match", {"model": "m", "tokens": PROMPT, **fields})
    return answer


def figures(answer: dict[str, Any]) -> dict[str, int]:
    return {row["instance"]: row["matched_tokens"] for row in answer["matches"]}


def keys(prompt: list[int], block_size: int = 4) -> list[int]:
    return list(prompt_keys(pack_tokens(prompt), block_size))


def test_a_row_says_everything_about_an_instance(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:16])
    assert match(api) == {
        "model": "m",
        "blocks": 10,
        "tokens": 40,
        "matches": [
            {
                "instance": "pod-a",
                "block_size": 4,
                "matched_tokens": 16,
                "cached_tokens": 16,
                "score": 16.0,
                "tiers": {
                    "gpu": {"tokens": 16, "cumulative_tokens": 16},
                    "cpu": {"tokens": 0, "cumulative_tokens": 16},
                    "disk": {"tokens": 0, "cumulative_tokens": 16},
                    "remote": {"tokens": 0, "cumulative_tokens": 16},
                },
                "ranks": {"0": 16},
                "state": "live",
                "sound": True,
                "complete": True,
                "lag_ms": 0.0,
                "verified_ms": 12.5,
            }
        ],
        "unknown_candidates": [],
    }


def test_tiers_alone_and_cumulative_as_in_the_designs_worked_example(api: Api) -> None:
    """Gpu holds blocks 0-3, cpu 2-7, of 10: union 8, gpu alone 4, cpu alone 0, cumulative gpu 4, cpu 8, disk 8."""
    source = api.add("pod-a", offload_connector=True)
    whole = stored(PROMPT)
    removed = {"type": "BlockRemoved", "block_hashes": whole["block_hashes"][4:], "medium": "GPU", "group_idx": 0}
    offloaded = {
        **whole,
        "block_hashes": whole["block_hashes"][2:8],
        "parent_block_hash": whole["block_hashes"][1],
        "token_ids": PROMPT[8:32],
        "extra_keys": [None] * 6,
        "medium": "CPU",
    }
    api.index.apply(source, batch(whole, removed, offloaded))
    (row,) = match(api)["matches"]
    tiers = {tier: (depths["tokens"], depths["cumulative_tokens"]) for tier, depths in row["tiers"].items()}
    assert tiers == {"gpu": (16, 16), "cpu": (0, 32), "disk": (0, 32), "remote": (0, 32)}
    assert (row["matched_tokens"], row["cached_tokens"]) == (32, 32)


def test_best_first_by_cached_then_matched_then_name(api: Api) -> None:
    api.store(api.add("c"), PROMPT[:8])
    api.store(api.add("b"), PROMPT[:8])
    api.store(api.add("whole"), PROMPT)
    api.store(api.add("a"), PROMPT[:36])
    rows = [(row["instance"], row["cached_tokens"], row["matched_tokens"]) for row in match(api)["matches"]]
    assert rows == [("whole", 36, 40), ("a", 36, 36), ("b", 8, 8), ("c", 8, 8)]


def test_an_instances_figures_are_those_of_its_best_rank_never_a_union(api: Api) -> None:
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT[:8]), rank=0))
    tail = {
        **stored(PROMPT[8:20], first=2),
        "parent_block_hash": 2000,
        "block_hashes": [2001, 2002, 2003],
    }
    api.index.apply(source, batch(stored(PROMPT[:4], first=2), tail, rank=3))
    (row,) = match(api)["matches"]
    assert row["matched_tokens"] == 8
    assert row["ranks"]["0"] == 8
    assert row["ranks"]["3"] == 4


def test_tokens_packed_tokens_and_keys_are_the_same_prompt(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:16])
    by_tokens = match(api)
    packed = base64.b64encode(struct.pack("<40I", *PROMPT)).decode()
    assert api.post("/v1/match", {"model": "m", "tokens_b64": packed}) == by_tokens
    assert api.post("/v1/match", {"model": "m", "keys": keys(PROMPT), "prompt_tokens": 40}) == by_tokens


def test_keys_without_a_length_stand_for_a_prompt_that_goes_on(api: Api) -> None:
    """An engine recomputes a prompt's last block; behind the last key there is taken to be more."""
    api.store(api.add("pod-a"), PROMPT)
    assert match(api)["matches"][0]["cached_tokens"] == 36
    answer = api.post("/v1/match", {"model": "m", "keys": keys(PROMPT)})
    assert (answer["tokens"], answer["blocks"]) == (40, 10)
    assert answer["matches"][0]["cached_tokens"] == 40


def test_keys_may_be_signed(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    signed = [key - 2**64 if key >= 2**63 else key for key in keys(PROMPT)]
    assert any(key < 0 for key in signed)
    assert figures(api.post("/v1/match", {"model": "m", "keys": signed})) == {"pod-a": 40}


@pytest.mark.parametrize("name", ["lora", "cache_salt", "additional_salt", "tenant"])
def test_trap_9_other_lora_salt_tenant_or_deployment_never_matches(api: Api, name: str) -> None:
    spec: dict[str, Any] = {} if name in ("lora", "cache_salt") else {name: "x"}
    extras: dict[str, Any] = {"lora": {"lora_name": "x"}, "cache_salt": {"extra_keys": [["x"], *[None] * 9]}}
    api.store(api.add("with", **spec), PROMPT, **extras.get(name, {}))
    api.store(api.add("without"), PROMPT)
    with_it = figures(match(api, **{name: "x"}))
    assert with_it == {"with": 40}
    without = figures(match(api, **({name: ""} if name == "additional_salt" else {})))
    assert without == {"without": 40}


def test_multimodal_items_are_part_of_the_blocks_that_they_overlap(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT, extra_keys=[None, [["img", 2]], [["img", -2]], *[None] * 7])
    item = {"hash": "img", "offset": 6, "length": 5}
    assert figures(match(api, multimodal=[item])) == {"pod-a": 40}
    assert figures(match(api, multimodal=[{**item, "hash": "other"}])) == {"pod-a": 4}
    assert figures(match(api)) == {"pod-a": 4}


def test_a_model_with_several_block_sizes_is_matched_in_each(api: Api) -> None:
    api.store(api.add("small"), PROMPT[:12])
    api.store(api.add("large", block_size=8), PROMPT[:16], block_size=8)
    answer = match(api)
    assert [(row["instance"], row["block_size"], row["matched_tokens"]) for row in answer["matches"]] == [
        ("large", 8, 16),
        ("small", 4, 12),
    ]
    assert answer["blocks"] == 10
    assert figures(match(api, block_size=4)) == {"small": 12}
    assert api.refused("/v1/match", {"model": "m", "tokens": PROMPT, "block_size": 16}) == (
        404,
        "unknown_block_size",
        "known block sizes: 4, 8",
    )
    status, code, hint = api.refused("/v1/match", {"model": "m", "keys": keys(PROMPT)})
    assert (status, code) == (400, "block_size_needed")
    assert "4, 8" in hint
    assert figures(api.post("/v1/match", {"model": "m", "keys": keys(PROMPT, 8), "block_size": 8})) == {"large": 16}


def test_require_leaves_out_what_is_not_live_sound_or_complete(api: Api) -> None:
    for name in ("good", "stale", "unsound", "incomplete"):
        api.store(api.add(name), PROMPT)
    api.fleet.statuses = {
        "stale": LIVE._replace(state="stale"),
        "unsound": LIVE._replace(sound=False),
        "incomplete": LIVE._replace(complete=False, verified_ms=None),
    }
    assert set(figures(match(api))) == {"good", "stale", "unsound", "incomplete"}
    assert set(figures(match(api, require=["live"]))) == {"good", "unsound", "incomplete"}
    assert set(figures(match(api, require=["sound", "complete"]))) == {"good", "stale"}
    api.fleet.statuses["good"] = LIVE._replace(state="gone")
    answer = match(api, require=["live", "sound", "complete"])
    assert (answer["matches"], answer["reason"]) == ([], "filtered_by_require")


def test_trap_11_a_prompt_beyond_the_limit_is_an_error_and_no_miss() -> None:
    with serving(max_prompt_tokens=40) as api:
        api.store(api.add("pod-a"), PROMPT)
        assert figures(match(api)) == {"pod-a": 40}
        longer = [*PROMPT, 1]
        packed = base64.b64encode(struct.pack("<41I", *longer)).decode()
        for body in ({"tokens": longer}, {"tokens_b64": packed}, {"keys": [*keys(PROMPT), 1]}):
            status, code, hint = api.refused("/v1/match", {"model": "m", **body})
            assert (status, code) == (413, "too_large")
            assert "max_prompt_tokens" in hint


def test_trap_12_a_prompt_shorter_than_a_block_says_so(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    for tokens in ([], PROMPT[:3]):
        answer = match(api, tokens=tokens)
        assert (answer["blocks"], answer["tokens"], answer["matches"]) == (0, len(tokens), [])
        assert answer["reason"] == "shorter_than_a_block"
    assert "reason" not in match(api)


def test_trap_13_candidates_under_another_name_are_told(api: Api) -> None:
    """Silent zero hits are every user's first problem."""
    api.store(api.add("10.0.0.1:8000"), PROMPT)
    answer = match(api, candidates=["10.0.0.1:8000", "10.0.0.2", "http://10.0.0.1:8001", "10.0.0.2"])
    assert figures(answer) == {"10.0.0.1:8000": 40}
    assert answer["unknown_candidates"] == ["10.0.0.2", "http://10.0.0.1:8001"]
    answer = match(api, candidates=["10.0.0.2"])
    assert (answer["matches"], answer["reason"]) == ([], "no_known_candidate")


def test_trap_13_a_known_candidate_without_a_match_is_listed_with_zeros(api: Api) -> None:
    api.add("cold")
    api.store(api.add("warm"), PROMPT)
    assert set(figures(match(api))) == {"warm"}
    answer = match(api, candidates=["cold", "warm"])
    assert [(row["instance"], row["matched_tokens"]) for row in answer["matches"]] == [("warm", 40), ("cold", 0)]
    assert answer["matches"][1]["ranks"] == {}
    assert answer["matches"][1]["tiers"]["gpu"] == {"tokens": 0, "cumulative_tokens": 0}
    answer = match(api, candidates=["cold"])
    assert (figures(answer), answer["reason"]) == ({"cold": 0}, "nothing_held")


def test_trap_13_every_empty_answer_has_its_reason(api: Api) -> None:
    assert api.refused("/v1/match", {"model": "m", "tokens": PROMPT})[:2] == (404, "unknown_model")
    store = SourceSpec(
        instance="s3", model="m", block_size=4, endpoint="tcp://s3:1", type="store", tier="remote", readers=("x",)
    )
    api.fleet.register(store)
    assert match(api)["reason"] == "no_instance"
    api.add("pod-a")
    assert match(api)["reason"] == "nothing_held"


def test_trap_13_an_unknown_model_names_the_known_ones(api: Api) -> None:
    api.add("pod-a", model="llama")
    assert api.refused("/v1/match", {"model": "Llama", "tokens": [1]}) == (404, "unknown_model", "known: llama")


def test_trap_27_errors_know_only_the_callers_tenant(api: Api) -> None:
    api.add("pod-a", model="secret-model", tenant="other", additional_salt="pepper")
    api.add("pod-b", model="open-model")
    assert api.refused("/v1/match", {"model": "x", "tokens": [1]})[2] == "known: open-model"
    assert api.refused("/v1/match", {"model": "secret-model", "tokens": [1]})[0] == 404
    answer = api.post("/v1/match", {"model": "open-model", "tokens": PROMPT, "candidates": ["pod-a"]})
    assert answer["unknown_candidates"] == ["pod-a"]
    refused = api.client.post(
        "/v1/match", json={"model": "secret-model", "tenant": "other", "additional_salt": "salt", "tokens": [1]}
    )
    assert refused.json()["error"]["code"] == "unknown_salt"
    assert "pepper" not in refused.text


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (422, "invalid_request")),
        ({"model": "m"}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "keys": [1]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "prompt_tokens": 1}, (422, "invalid_request")),
        ({"model": "m", "keys": [1, 2], "prompt_tokens": 7}, (422, "invalid_request")),
        ({"model": "m", "keys": [2**64]}, (422, "invalid_request")),
        ({"model": "m", "keys": [-(2**63) - 1]}, (422, "invalid_request")),
        ({"model": "m", "keys": [1], "lora": "x"}, (400, "extras_with_keys")),
        ({"model": "m", "keys": [1], "cache_salt": "x"}, (400, "extras_with_keys")),
        ({"model": "m", "tokens_b64": "AAAA"}, (422, "invalid_request")),
        ({"model": "m", "tokens_b64": "?"}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "require": ["alive"]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "block_size": 0}, (422, "invalid_request")),
        ({"model": "", "tokens": [1]}, (422, "invalid_request")),
        ({"model": "m" * 2000, "tokens": [1]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "candidate": []}, (422, "unknown_field")),
        ({"model": "m", "tokens": [1], "multimodal": [{"hash": "x", "offset": 0}]}, (422, "invalid_request")),
        (
            {"model": "m", "tokens": [1], "multimodal": [{"hash": "x", "offset": 0, "length": 1}] * 9},
            (422, "invalid_request"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(
    api: Api, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    api.add("pod-a")
    status, code, hint = api.refused("/v1/match", body)
    assert (status, code) == expected
    assert hint


def test_recorded_prompts_get_the_tokens_that_the_real_engine_reported() -> None:
    """Each request of the recording, asked right before it ran: `cached_tokens` is what vLLM 0.32 answered."""
    name = "http-0.32-llama"
    frames = recordings.frames(name)
    with serving() as api:
        source = api.add("pod-a", model="tiny", block_size=32)
        applied = asked = 0
        for request in recordings.lines(name, "requests.jsonl"):
            if "prompt_token_ids" not in request or request.get("cached_tokens") is None:
                continue
            newest = -1 if request["last_seq_before"] is None else request["last_seq_before"]
            while applied <= newest:
                api.index.apply(source, frames[applied].payload)
                applied += 1
            body = {"model": "tiny", "tokens": request["prompt_token_ids"], "candidates": ["pod-a"]}
            body |= {"lora": request["lora"] and request["lora"][0], "cache_salt": request["cache_salt"]}
            (row,) = api.post("/v1/match", body)["matches"]
            expected = UNSEEN.get(request["label"], request["cached_tokens"])
            assert row["cached_tokens"] == expected, request["label"]
            asked += 1
        assert asked > 20
