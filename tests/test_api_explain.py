"""POST /v1/explain through a real server: for each reason a situation that has it, and nothing of other tenants."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from api_server import LIVE, Api, batch, serving, stored
from kvindexer.api.explain import MOST_EXPLAINED
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import SourceSpec

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""

HASHES = [1000 + block for block in range(10)]
"""Of its blocks, in events that `stored` makes."""


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def explain(api: Api, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "tokens": PROMPT, **fields}
    answer: dict[str, Any] = api.post(
        "/v1/explain", {name: value for name, value in body.items() if value is not None}
    )
    return answer


def row(answer: dict[str, Any], instance: str = "pod-a") -> dict[str, Any]:
    (found,) = [each for each in answer["instances"] if each["instance"] == instance]
    return dict(found)


def reason(api: Api, instance: str = "pod-a", **fields: Any) -> str:
    return str(row(explain(api, **fields), instance)["reason"])


def also(api: Api, instance: str = "pod-a", **fields: Any) -> list[str]:
    return [one["reason"] for one in row(explain(api, **fields), instance)["also"]]


def removed(hashes: list[int], **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0, **fields}


def keys(prompt: list[int], block_size: int = 4) -> list[int]:
    return list(prompt_keys(pack_tokens(prompt), block_size))


# Rows


def test_a_row_says_how_far_and_why_not_further(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:16])
    api.store(api.add("pod-b"), PROMPT)
    answer = explain(api, candidates=["tcp://pod-a:5557"])
    assert (answer["blocks"], answer["tokens"]) == (10, 40)
    assert "reason" not in answer
    (only,) = answer["instances"]
    advice = only.pop("advice")
    assert "route such prompts there" in advice
    assert only == {
        "instance": "pod-a",
        "candidate": "tcp://pod-a:5557",
        "block_size": 4,
        "rank": 0,
        "blocks": 10,
        "held_blocks": 4,
        "matched_blocks": 4,
        "matched_tokens": 16,
        "cached_tokens": 16,
        "missing": {"block": 4, "key": keys(PROMPT)[4], "held_by": ["pod-b"]},
        "reason": "held_by_others",
        "also": [],
        "state": "live",
        "sound": True,
        "complete": True,
        "lag_ms": 0.0,
    }


def test_instances_are_listed_best_first_also_without_a_match(api: Api) -> None:
    api.store(api.add("c"), PROMPT[:4])
    api.store(api.add("b"), PROMPT)
    api.store(api.add("a"), [9] * 4)
    answer = explain(api)
    assert [each["instance"] for each in answer["instances"]] == ["b", "c", "a"]
    answer = explain(api, top_k=1)
    assert [each["instance"] for each in answer["instances"]] == ["b"]
    assert answer["left_out"] == 2


def test_figures_are_those_of_a_match(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b"), PROMPT[:8])
    body = {"model": "m", "tokens": PROMPT}
    matches = {each["instance"]: each for each in api.post("/v1/match", body)["matches"]}
    for each in explain(api)["instances"]:
        assert each["matched_tokens"] == matches[each["instance"]]["matched_tokens"]
        assert each["cached_tokens"] == matches[each["instance"]]["cached_tokens"]


# One test a reason


def test_whole_prompt_and_the_block_that_is_always_computed(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    only = row(explain(api))
    assert (only["reason"], only["matched_tokens"], only["cached_tokens"]) == ("whole_prompt", 40, 36)
    assert [one["reason"] for one in only["also"]] == ["last_block_computed"]
    assert "missing" not in only
    assert also(api, tokens=[*PROMPT, 1]) == []


def test_trap_12_shorter_than_a_block(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    answer = explain(api, tokens=PROMPT[:3])
    assert answer["reason"] == "shorter_than_a_block"
    assert row(answer)["reason"] == "shorter_than_a_block"
    assert (answer["blocks"], answer["tokens"]) == (0, 3)


def test_group_rule_cuts_back_what_is_held(api: Api) -> None:
    source = api.add("pod-a")
    window: dict[str, Any] = {
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 9,
    }
    api.index.apply(source, batch(stored(PROMPT), stored(PROMPT, **window), removed(HASHES[7:], group_idx=1)))
    only = row(explain(api))
    assert (only["held_blocks"], only["matched_blocks"], only["reason"]) == (10, 7, "group_rule")


def test_group_missing_where_one_of_two_full_groups_lacks_the_block(api: Api) -> None:
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT), stored(PROMPT, group_idx=1), removed(HASHES[6:], group_idx=1)))
    only = row(explain(api))
    assert (only["held_blocks"], only["reason"], only["missing"]["held_by"]) == (6, "group_missing", [])


def test_gone(api: Api) -> None:
    api.add("pod-a")
    api.fleet.statuses["pod-a"] = LIVE._replace(state="gone", sound=False, complete=False)
    assert reason(api) == "gone"


def test_trap_13_no_events(api: Api) -> None:
    source = api.add("pod-a")
    answer = explain(api)
    assert (answer["reason"], row(answer)["reason"]) == ("nothing_held", "no_events")
    assert "enable_kv_cache_events" in row(answer)["advice"]
    api.fleet.counters[source] = {"batches": 1}
    assert reason(api) == "never_stored"


def test_trap_13_other_block_size(api: Api) -> None:
    source = api.add("pod-a", block_size=8)
    api.store(source, PROMPT, block_size=4)
    answer = explain(api, block_size=8)
    only = row(answer)
    assert only["reason"] == "other_block_size"
    assert "holds 40 tokens of the prompt in blocks of 4" in only["advice"]
    assert "wrong_block_size" in [one["reason"] for one in only["also"]]
    only = row(explain(api))
    assert (only["block_size"], only["reason"]) == (4, "whole_prompt")
    assert "wrong_block_size" in [one["reason"] for one in only["also"]]
    only = row(explain(api, tokens=[1] * 40))
    assert (only["block_size"], only["reason"]) == (4, "never_stored")  # the size of its events, not the registered
    assert "wrong_block_size" in also(api, tokens=None, keys=keys(PROMPT, 8), block_size=8)


def test_other_rank(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    second = api.add("pod-a", port=5558, rank=1)
    api.index.apply(second, batch(stored(PROMPT), removed(HASHES[:1]), rank=1))
    only = row(explain(api))
    assert (only["rank"], only["held_blocks"], only["reason"]) == (0, 2, "other_rank")
    assert "Rank 1" in only["advice"]


def test_other_lora_as_a_registration_names_it_or_none(api: Api) -> None:
    api.store(api.add("pod-a", lora="sql"), PROMPT)
    api.store(api.add("pod-b"), PROMPT)
    assert reason(api) == "other_lora"
    assert reason(api, lora="sql") == "whole_prompt"
    assert reason(api, "pod-b", lora="sql") == "other_lora"
    assert reason(api, "pod-b", lora="typo") == "other_lora"


def test_removed(api: Api) -> None:
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT), removed(HASHES[3:])))
    only = row(explain(api))
    assert (only["held_blocks"], only["reason"]) == (3, "removed")
    api.store(api.add("pod-b"), PROMPT)
    only = row(explain(api))
    assert (only["reason"], only["missing"]["held_by"]) == ("removed", ["pod-b"])
    assert "still held by pod-b" in only["advice"]
    api.index.withdraw(source)
    assert reason(api) == "removed"  # a restart looks the same


def test_held_by_others_names_instances_and_stores_that_it_does_not_read(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    api.store(api.add("pod-b"), PROMPT)
    values: dict[str, Any] = {"model": "m", "block_size": 4, "type": "store", "tier": "remote"}
    api.fleet.register(SourceSpec(instance="s3", endpoint="tcp://s3:1", readers=("pod-b",), **values))
    api.store("tcp://s3:1", PROMPT, medium="STORAGE")
    only = row(explain(api))
    assert (only["reason"], only["missing"]["held_by"]) == ("held_by_others", ["pod-b", "s3"])


def test_never_stored(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    only = row(explain(api))
    assert (only["reason"], only["missing"]["block"], only["missing"]["held_by"]) == ("never_stored", 2, [])


def test_filtered_by_require(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.fleet.statuses["pod-a"] = LIVE._replace(state="stale", sound=False)
    answer = explain(api, require=["live"])
    assert answer["reason"] == "filtered_by_require"
    assert [one["reason"] for one in row(answer)["also"]] == [
        "filtered_by_require",
        "last_block_computed",
        "not_live",
        "not_sound",
    ]
    assert row(answer)["reason"] == "whole_prompt"
    assert "set by the test" in json.dumps(answer)


def test_flags_lag_chunks_and_orphans_are_told(api: Api) -> None:
    source = api.add("pod-a", offload_blocks_per_chunk=2)
    orphan = stored(PROMPT[8:], first=2, parent_block_hash=77)
    api.index.apply(source, batch(stored(PROMPT[:8]), orphan))
    api.fleet.statuses["pod-a"] = LIVE._replace(complete=False, lag_ms=900.0)
    assert also(api) == ["not_complete", "lag", "orphans", "chunked_offload"]
    (said,) = [one for one in row(explain(api))["also"] if one["reason"] == "orphans"]
    assert said["advice"].startswith("8 blocks")


def test_unknown_group(api: Api) -> None:
    source = api.add("pod-a")
    kinds: list[dict[str, Any]] = [{"group_idx": group, "kv_cache_spec_kind": "new_kind"} for group in (0, 1)]
    api.index.apply(source, batch(*(stored(PROMPT, **kind) for kind in kinds)))
    assert "unknown_group" in also(api)


def test_what_the_caller_gave_is_told_where_nothing_matched(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    other = [7] * 8
    assert also(api, tokens=other) == ["no_extras_given"]
    for given in ({"lora": "x"}, {"cache_salt": "x"}, {"multimodal": [{"hash": "x", "offset": 0, "length": 1}]}):
        assert also(api, tokens=other, **given) == ["extras_given"]
    assert also(api, tokens=None, keys=[1, 2]) == ["keys_given"]
    packed = base64.b64encode(struct.pack("<2Q", 1, 2)).decode()
    assert also(api, tokens=None, keys_b64=packed) == ["keys_given"]
    assert also(api, tokens=[*PROMPT[:8], *other]) == []
    api.add("silent")
    assert also(api, "silent", tokens=other) == []  # it is clear why


# No match at all


def test_trap_13_an_unknown_model_has_near_spellings(api: Api) -> None:
    assert explain(api)["reason"] == "unknown_model"
    api.add("pod-a", model="Llama-3.1-8B")
    api.add("pod-b", model="qwen")
    answer = explain(api, model="llama-3.1-8b")
    assert (answer["reason"], answer["near_models"], answer["instances"]) == ("unknown_model", ["Llama-3.1-8B"], [])
    assert explain(api, model="llama-3.1-8b", tokens=None, prompt="no tokenizer")["reason"] == "unknown_model"


def test_an_unknown_block_size_names_the_known_ones(api: Api) -> None:
    api.store(api.add("pod-a", block_size=16), PROMPT, block_size=8)
    answer = explain(api, block_size=32)
    assert (answer["reason"], answer["block_sizes"], answer["instances"]) == ("unknown_block_size", [8, 16], [])


def test_no_instance(api: Api) -> None:
    values: dict[str, Any] = {"model": "m", "block_size": 4, "type": "store", "tier": "remote", "readers": ("x",)}
    api.fleet.register(SourceSpec(instance="s3", endpoint="tcp://s3:1", **values))
    assert explain(api)["reason"] == "no_instance"


def test_trap_13_unknown_candidates_have_a_reason_and_near_spellings(api: Api) -> None:
    api.store(api.add("10.0.0.1:8000", aliases=("vllm-decode-0",)), PROMPT)
    api.add("large", block_size=8)
    api.add("elsewhere", model="other")
    values: dict[str, Any] = {"model": "m", "block_size": 4, "type": "store", "tier": "remote", "readers": ("x",)}
    api.fleet.register(SourceSpec(instance="s3", endpoint="tcp://s3:1", **values))
    asked = ["10.0.0.1:8001", "vllm-decode-1", "large", "tcp://large:5557", "elsewhere", "s3", "qqqqqqqqqqqq"]
    answer = explain(api, candidates=asked, block_size=4)
    assert (answer["reason"], answer["instances"]) == ("no_known_candidate", [])
    told = {one["candidate"]: one for one in answer["unknown_candidates"]}
    assert list(told) == asked
    assert [one["reason"] for one in told.values()] == [
        "not_registered",
        "not_registered",
        "other_block_size",
        "other_block_size",
        "other_model",
        "store",
        "not_registered",
    ]
    assert told["10.0.0.1:8001"]["near"][0] == "10.0.0.1:8000"
    assert told["vllm-decode-1"]["near"][0] == "vllm-decode-0"
    assert told["elsewhere"]["other_models"] == ["other"]
    assert "near" not in told["qqqqqqqqqqqq"]


def test_ambiguous_candidates_are_told(api: Api) -> None:
    api.add("a", aliases=("both",))
    api.add("b", aliases=("both",))
    assert explain(api, candidates=["both"])["ambiguous_candidates"] == {"both": ["a", "b"]}


# What is nobody's business


def test_trap_27_another_tenant_is_never_told_of(api: Api) -> None:
    secret = api.add("secret-pod", tenant="other", aliases=("secret-alias",))
    api.store(secret, PROMPT)
    api.add("secret-pod-2", tenant="other", model="secret-model")
    api.store(api.add("pod-a"), [1] * 4)
    for body in (
        {},
        {"candidates": ["secret-pod", "secret-po", "secret-alias"]},
        {"model": "secret-model"},
        {"model": "secret-mode"},
        {"block_size": 16},
    ):
        answer = explain(api, **body)
        for one in answer.get("unknown_candidates", ()):
            assert one["reason"] == "not_registered"
            one["candidate"] = ""
        answer["model"] = ""
        assert "secret" not in json.dumps(answer)
    assert reason(api) == "never_stored"


@pytest.mark.parametrize("mine", [None, "mine"])
def test_trap_27_a_block_under_another_salt_looks_as_if_it_were_nowhere(mine: str | None) -> None:
    """Held under another cache salt, held and gone, or held by nobody: word for word the same answer."""

    def asked(*, store: bool, then: list[int]) -> dict[str, Any]:
        with serving() as fresh:
            source = fresh.add("pod-a")
            other = fresh.add("pod-b")
            for each in (source, other):
                fresh.store(each, [1] * 4)
            if store:
                salted = stored(PROMPT, first=5, extra_keys=[["theirs"], *[None] * 9])
                fresh.index.apply(source, batch(salted, removed(then)))
                fresh.index.apply(other, batch(salted))
            return explain(fresh, cache_salt=mine)

    nowhere = asked(store=False, then=[])
    assert row(nowhere)["reason"] == "never_stored"
    assert asked(store=True, then=[]) == nowhere
    assert asked(store=True, then=[5000 + block for block in range(10)]) == nowhere


def test_trap_27_a_plain_block_is_not_told_to_who_asks_with_a_salt(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    only = row(explain(api, cache_salt="mine"))
    assert (only["reason"], only["missing"]["held_by"]) == ("never_stored", [])
    assert [one["reason"] for one in only["also"]] == ["extras_given"]


def test_trap_27_another_deployment_salt_is_never_looked_at(api: Api) -> None:
    api.store(api.add("pod-a", additional_salt="pepper"), PROMPT)
    api.store(api.add("pod-b", additional_salt="mint"), [1] * 4)
    answer = explain(api, additional_salt="mint", candidates=["pod-a", "pod-b"])
    assert row(answer, "pod-b")["reason"] == "never_stored"
    assert row(answer, "pod-b")["missing"]["held_by"] == []
    (unknown,) = answer["unknown_candidates"]
    assert (unknown["candidate"], unknown["reason"]) == ("pod-a", "not_registered")
    answer = explain(api, additional_salt="salt")
    assert (answer["reason"], answer["instances"]) == ("unknown_salt", [])
    assert "pepper" not in json.dumps(answer)
    assert reason(api, candidates=["pod-a"]) == "whole_prompt"  # without a salt all deployments, as in queries


def test_promise_9_no_tokens_come_back(api: Api) -> None:
    marked = [987654321 + number for number in range(12)]
    api.store(api.add("pod-a"), marked[:4])
    assert "9876543" not in json.dumps(explain(api, tokens=marked)).replace(str(keys(marked)[1]), "")


# Form and limits


def test_explanations_are_not_counted_as_queries(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    explain(api)
    assert api.metrics.queries == 0
    assert api.client.get("/v1/heat/prefixes", params={"model": "m"}).json()["prefixes"] == []


def test_msgpack_in_and_out(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    body = msgpack.packb({"model": "m", "tokens_b64": struct.pack("<40I", *PROMPT)})
    headers = {"content-type": "application/msgpack", "accept": "application/msgpack"}
    answer = msgpack.unpackb(api.client.post("/v1/explain", content=body, headers=headers).content)
    assert answer == explain(api)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": "m"}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "keys": [1]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [-1]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "require": ["alive"]}, (422, "invalid_request")),
        ({"model": "m", "tokens": [1], "nonsense": 1}, (422, "unknown_field")),
        ({"model": "m", "tokens": [1] * 41}, (413, "too_large")),
        ({"model": "m", "tokens": [1], "candidates": ["x"] * 9}, (413, "too_large")),
        ({"model": "m", "prompt": "text"}, (422, "no_tokenizer")),
    ],
)
def test_bounds_and_errors_are_those_of_a_match(body: dict[str, Any], expected: tuple[int, str]) -> None:
    with serving(max_prompt_tokens=40, max_candidates=8) as api:
        api.add("pod-a")
        assert api.refused("/v1/explain", body)[:2] == expected == api.refused("/v1/match", body)[:2]


def test_many_instances_are_cut_off(api: Api) -> None:
    for number in range(MOST_EXPLAINED + 3):
        api.add(f"pod-{number}")
    api.store("tcp://pod-77:5557", PROMPT)
    answer = explain(api)
    assert (len(answer["instances"]), answer["left_out"]) == (MOST_EXPLAINED, 3)
    assert answer["instances"][0]["instance"] == "pod-77"
