"""POST /v1/match through a real server: score and order, top_k, figures by rank, keys, msgpack."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from api_server import LIVE, Api, batch, error, serving, stored
from kvindexer.api.schemas import BatchAnswer, KeysAnswer, MatchAnswer
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""

MSGPACK = "application/msgpack"


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def match(api: Api, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = api.post("/v1/match", {"model": "m", "tokens": PROMPT, **fields})
    return answer


def names(answer: dict[str, Any]) -> list[str]:
    return [row["instance"] for row in answer["matches"]]


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {row["instance"]: row["score"] for row in answer["matches"]}


def hold(api: Api, instance: str, *, gpu: int = 0, cpu: int = 0, disk: int = 0, **spec: Any) -> None:
    """An instance that holds the first so many blocks on its tiers."""
    source = api.add(instance, **spec)
    for medium, blocks in (("GPU", gpu), ("CPU", cpu), ("DISK", disk)):
        if blocks:
            api.store(source, PROMPT[: 4 * blocks], medium=medium)


def packed(tokens: list[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


# Score and order


def test_score_is_what_each_tier_adds_times_its_weight(api: Api) -> None:
    """The documented example: 4 blocks on the GPU, to 8 with the CPU: 4 * 1.0 + 4 * 0.8 blocks."""
    hold(api, "both", gpu=4, cpu=8)
    hold(api, "gpu", gpu=8)
    hold(api, "cpu", cpu=8)
    hold(api, "disk", disk=8)
    assert scores(match(api)) == pytest.approx(
        {"both": 4 * (4 * 1.0 + 4 * 0.8), "gpu": 4 * 8 * 1.0, "cpu": 4 * 8 * 0.8, "disk": 4 * 8 * 0.4}
    )


def test_weights_of_the_request_lie_over_those_of_the_settings() -> None:
    with serving(tier_weights={"cpu": 0.5}) as api:
        hold(api, "pod-a", gpu=4, cpu=8)
        assert scores(match(api)) == pytest.approx({"pod-a": 4 * (4 + 4 * 0.5)})
        assert scores(match(api, weights={})) == scores(match(api))
        assert scores(match(api, weights={"gpu": 2})) == pytest.approx({"pod-a": 4 * (4 * 2 + 4 * 0.5)})
        assert scores(match(api, weights={"gpu": 0, "cpu": 0})) == {"pod-a": 0}
        assert scores(match(api)) == pytest.approx({"pod-a": 4 * (4 + 4 * 0.5)})


def test_tokens_that_the_engine_can_not_reuse_score_nothing(api: Api) -> None:
    """A sliding window of which the last blocks are missing cuts the prefix back."""
    source = api.add("hybrid")
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 4}
    api.store(source, PROMPT)
    api.store(source, PROMPT[:20], **window)
    (row,) = match(api)["matches"]
    assert (row["matched_tokens"], row["score"]) == (20, 20.0)


def test_order_is_cached_tokens_unless_the_caller_wants_the_score(api: Api) -> None:
    hold(api, "fast", gpu=7)
    hold(api, "long", cpu=8, offload_connector=True)
    hold(api, "uncached", cpu=10, offload_connector=False)
    assert names(match(api)) == ["long", "fast", "uncached"]
    assert names(match(api, weights={"cpu": 0.1})) == ["long", "fast", "uncached"]
    assert names(match(api, order="score")) == ["uncached", "fast", "long"]
    assert names(match(api, order="score", weights={"cpu": 0.1})) == ["fast", "uncached", "long"]


def test_the_faster_copy_wins_a_tie_of_cached_and_matched_tokens(api: Api) -> None:
    hold(api, "a", cpu=8, offload_connector=True)
    hold(api, "b", gpu=8, offload_connector=True)
    hold(api, "c", gpu=8, offload_connector=True)
    assert names(match(api)) == ["b", "c", "a"]


def test_top_k_cuts_behind_the_order(api: Api) -> None:
    hold(api, "fast", gpu=7)
    hold(api, "long", cpu=8, offload_connector=True)
    api.add("cold")
    assert names(match(api, top_k=1)) == ["long"]
    assert names(match(api, top_k=1, order="score")) == ["fast"]
    assert names(match(api, top_k=9)) == ["long", "fast"]
    candidates = ["cold", "fast", "long"]
    assert names(match(api, top_k=2, candidates=candidates)) == ["long", "fast"]
    assert names(match(api, top_k=3, candidates=candidates)) == ["long", "fast", "cold"]
    api.fleet.statuses["long"] = LIVE._replace(state="stale")
    assert names(match(api, top_k=1, require=["live"])) == ["fast"]


def test_the_rank_that_is_shown_is_the_best_one_in_the_order_of_the_answer(api: Api) -> None:
    source = api.add("pod-a", offload_connector=True)
    api.index.apply(source, batch(stored(PROMPT[:28]), rank=0))
    api.index.apply(source, batch(stored(PROMPT[:32], first=2, medium="CPU"), rank=1))
    (row,) = match(api)["matches"]
    assert (row["matched_tokens"], row["score"]) == (32, pytest.approx(32 * 0.8))
    (by_score,) = match(api, order="score")["matches"]
    assert (by_score["matched_tokens"], by_score["score"]) == (28, 28.0)
    assert row["ranks"] == by_score["ranks"] == {"0": 28, "1": 32}


def test_figures_of_each_rank_on_request(api: Api) -> None:
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT[:28]), rank=0))
    api.index.apply(source, batch(stored(PROMPT[:12], first=2, medium="CPU"), rank=3))
    (plain,) = match(api)["matches"]
    assert "by_rank" not in plain
    (row,) = match(api, by_rank=True)["matches"]
    assert row.pop("by_rank") == {
        "0": {
            "block_size": 4,
            "matched_tokens": 28,
            "cached_tokens": 28,
            "score": 28.0,
            "tiers": plain["tiers"],
        },
        "3": {
            "block_size": 4,
            "matched_tokens": 12,
            "cached_tokens": 12,
            "score": pytest.approx(12 * 0.8),
            "tiers": {
                "gpu": {"tokens": 0, "cumulative_tokens": 0},
                "cpu": {"tokens": 12, "cumulative_tokens": 12},
                "disk": {"tokens": 0, "cumulative_tokens": 12},
                "remote": {"tokens": 0, "cumulative_tokens": 12},
            },
        },
    }
    assert row == plain
    cold = match(api, tokens=[1] * 8, candidates=["pod-a"], by_rank=True)["matches"]
    assert [entry["by_rank"] for entry in cold] == [{}]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": 2**31},
        {"weights": {"tape": 1}},
        {"weights": {"gpu": -0.1}},
        {"weights": {"gpu": 1e7}},
        {"weights": {"gpu": "1"}},
        {"weights": []},
        {"order": "name"},
        {"by_rank": 1},
        {"keys_b64": "AAAAAAAAAAA="},
    ],
)
def test_values_that_make_no_sense_are_refused_with_a_hint(api: Api, fields: dict[str, Any]) -> None:
    api.add("pod-a")
    status, _, hint = api.refused("/v1/match", {"model": "m", "tokens": PROMPT, **fields})
    assert status == 422
    assert hint


# Keys


def test_keys_of_a_prompt_are_those_that_match_takes(api: Api) -> None:
    hold(api, "pod-a", gpu=7)
    answer = api.post("/v1/keys", {"model": "m", "tokens": [*PROMPT, 1]})
    keys = prompt_keys(pack_tokens(PROMPT), 4)
    assert answer == {
        "model": "m",
        "block_size": 4,
        "tokens": 41,
        "keys": keys,
        "keys_b64": base64.b64encode(struct.pack("<10Q", *keys)).decode(),
    }
    by_tokens = match(api, tokens=[*PROMPT, 1])
    for name in ("keys", "keys_b64"):
        assert api.post("/v1/match", {"model": "m", name: answer[name], "prompt_tokens": 41}) == by_tokens
    assert api.post("/v1/keys", {"model": "m", "tokens": []})["keys_b64"] == ""
    assert api.post("/v1/match", {"model": "m", "keys_b64": ""})["reason"] == "shorter_than_a_block"


def test_keys_depend_on_lora_salt_and_images_as_blocks_do(api: Api) -> None:
    extra = [[["img", 2], "salt"], *[None] * 9]
    api.store(api.add("pod-a"), PROMPT, lora_name="tuned", extra_keys=extra)
    prompt = {
        "model": "m",
        "tokens_b64": base64.b64encode(packed(PROMPT)).decode(),
        "lora": "tuned",
        "cache_salt": "salt",
        "multimodal": [{"hash": "img", "offset": 2, "length": 2}],
    }
    with_all = api.post("/v1/keys", prompt)["keys"]
    assert [row["matched_tokens"] for row in api.post("/v1/match", {"model": "m", "keys": with_all})["matches"]] == [
        40
    ]
    for name in ("lora", "cache_salt", "multimodal"):
        without = {field: value for field, value in prompt.items() if field != name}
        assert api.post("/v1/keys", without)["keys"][0] != with_all[0]


def test_keys_need_a_block_size_that_is_clear_and_known(api: Api) -> None:
    api.add("small")
    api.add("large", block_size=8)
    assert api.refused("/v1/keys", {"model": "m", "tokens": PROMPT})[:2] == (400, "block_size_needed")
    assert len(api.post("/v1/keys", {"model": "m", "tokens": PROMPT, "block_size": 8})["keys"]) == 5
    assert api.refused("/v1/keys", {"model": "m", "tokens": PROMPT, "block_size": 16})[0] == 404
    assert api.refused("/v1/keys", {"model": "x", "tokens": PROMPT})[:2] == (404, "unknown_model")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "m"}, 422),
        ({"model": "m", "tokens": [1], "tokens_b64": "AAAAAA=="}, 422),
        ({"model": "m", "tokens": [-1]}, 422),
        ({"model": "m", "tokens_b64": "AAAA"}, 422),
        ({"model": "m", "keys": [1]}, 422),
        ({"model": "m", "tokens": [1], "candidates": []}, 422),
        ({"model": "m", "tokens": [1] * 41}, 413),
    ],
)
def test_trap_26_keys_of_no_prompt_or_too_long_a_one_are_refused(body: dict[str, Any], status: int) -> None:
    with serving(max_prompt_tokens=40) as api:
        api.add("pod-a")
        refused, _, hint = api.refused("/v1/keys", body)
        assert refused == status
        assert hint


@pytest.mark.parametrize("given", ["AAAA", "AAAAAAAAAAAA"])
def test_packed_keys_are_whole_ones(api: Api, given: str) -> None:
    api.add("pod-a")
    status, code, hint = api.refused("/v1/match", {"model": "m", "keys_b64": given})
    assert (status, code) == (422, "invalid_request")
    assert "8 bytes" in hint


# msgpack


def send(api: Api, path: str, body: Any, *, accept: str = "*/*", content_type: str = MSGPACK) -> httpx.Response:
    content = body if isinstance(body, bytes) else msgpack.packb(body)
    return api.client.post(path, content=content, headers={"content-type": content_type, "accept": accept})


@pytest.mark.parametrize(
    "prompt",
    [
        {"tokens": PROMPT},
        {"tokens_b64": packed(PROMPT)},
        {"keys": prompt_keys(pack_tokens(PROMPT), 4), "prompt_tokens": 40},
        {"keys_b64": struct.pack("<10Q", *prompt_keys(pack_tokens(PROMPT), 4)), "prompt_tokens": 40},
    ],
)
def test_a_msgpack_body_asks_the_same_as_a_json_one(api: Api, prompt: dict[str, Any]) -> None:
    hold(api, "pod-a", gpu=4, cpu=8)
    hold(api, "pod-b", gpu=2)
    api.add("cold")
    for extra in ({}, {"candidates": ["pod-a", "cold", "x"], "by_rank": True, "weights": {"cpu": 1}}, {"top_k": 1}):
        expected = match(api, **extra)
        body = {"model": "m", **prompt, **extra}
        response = send(api, "/v1/match", body)
        assert response.headers["content-type"] == "application/json"
        assert response.json() == expected
        response = send(api, "/v1/match", body, accept=MSGPACK)
        assert response.headers["content-type"] == MSGPACK
        assert msgpack.unpackb(response.content) == expected


def test_answers_are_of_the_documented_types_in_both_forms(api: Api) -> None:
    """Rows are joined from pieces; what comes out has to be what the structs say."""
    hold(api, "pod-a", gpu=4, cpu=8)
    body = {"model": "m", "tokens": PROMPT, "candidates": ["pod-a", "x"], "by_rank": True}
    shared = {"model": "m", "prompts": [{"tokens": PROMPT}, {}], "candidates": ["pod-a"]}
    keys = {"model": "m", "tokens": PROMPT}
    asked: tuple[tuple[str, Any, Any], ...] = (
        ("/v1/match", body, MatchAnswer),
        ("/v1/match/batch", shared, BatchAnswer),
        ("/v1/keys", keys, KeysAnswer),
    )
    for path, question, kind in asked:
        in_json = api.client.post(path, json=question).content
        in_msgpack = send(api, path, question, accept=MSGPACK).content
        typed = msgspec.json.decode(in_json, type=kind)
        assert typed == msgspec.msgpack.decode(in_msgpack, type=kind)
        assert msgspec.json.decode(msgspec.json.encode(typed)) == msgspec.json.decode(in_json)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("application/msgpack", MSGPACK),
        ("Application/MsgPack;q=0.9, */*", MSGPACK),
        ("application/x-msgpack", MSGPACK),
        ("application/msgpack, application/json", MSGPACK),
        ("application/json, application/msgpack", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
    ],
)
def test_the_answer_has_the_form_that_is_accepted_first(api: Api, accept: str, form: str) -> None:
    api.add("pod-a")
    response = api.client.post("/v1/match", json={"model": "m", "tokens": PROMPT}, headers={"accept": accept})
    assert response.headers["content-type"] == form


@pytest.mark.parametrize("content_type", ["application/msgpack; charset=binary", "application/vnd.msgpack"])
def test_content_types_of_msgpack(api: Api, content_type: str) -> None:
    api.add("pod-a")
    assert send(api, "/v1/match", {"model": "m", "tokens": []}, content_type=content_type).status_code == 200


@pytest.mark.parametrize("path", ["/v1/match", "/v1/match/batch", "/v1/keys"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\x80",
        b"\x90",
        b"\xc0",
        b"\x91" * 1_000_000,
        b"\x82\xa5model\xa1m\xa1x" + b"\x91" * 100_000,
        b"\x82\xa5model\xa1m\xa6tokens\xdd\xff\xff\xff\xff",
        b"\x82\xa5model\xa1m\xa7prompts\xdd\xff\xff\xff\xff",
        b"\x82\xa5model\xa1m\xa6tokens\x91\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"\x81\xa5model\xa1\xff",
        b"\x81\x01\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa5model\xa1m\x00",
    ],
    ids=repr,
)
def test_trap_26_what_is_no_usable_msgpack_is_an_error_in_json(api: Api, path: str, body: bytes) -> None:
    api.add("pod-a")
    status, code, hint = error(send(api, path, body, accept=MSGPACK))
    assert (status, code) in ((400, "malformed_msgpack"), (422, "invalid_request"), (422, "unknown_field"))
    assert hint


@pytest.mark.parametrize(
    "body",
    [
        b"\x82\xa5model\xa1m\xa6tokens\xdd" + struct.pack(">I", 4_000_000) + b"\x01" * 4_000_000,
        b"\x82\xa5model\xa1m\xaacandidates\xdd" + struct.pack(">I", 4_000_000) + b"\xa0" * 4_000_000,
        b"\xde\x00\x02\xa5model\xa1m\xa6tokens\xdd" + struct.pack(">I", 4_000_000) + b"\x01" * 4_000_000,
    ],
    ids=["tokens", "candidates", "long head"],
)
def test_trap_26_lists_of_millions_are_refused_before_they_are_decoded(api: Api, body: bytes) -> None:
    api.add("pod-a")
    assert error(send(api, "/v1/match", body))[:2] == (413, "too_large")


@pytest.mark.parametrize("second", [b"\xa6tokens\x90", b"\x05\x01"], ids=["a name twice", "a name that is none"])
def test_trap_26_a_second_name_hides_no_list_of_millions(api: Api, second: bytes) -> None:
    api.add("pod-a")
    many = b"\xa6tokens\xdd" + struct.pack(">I", 4_000_000) + b"\x01" * 4_000_000
    assert error(send(api, "/v1/match", b"\x83\xa5model\xa1m" + many + second))[:2] == (400, "malformed_msgpack")


def test_not_a_number_is_no_weight(api: Api) -> None:
    """JSON has no NaN, msgpack has."""
    api.add("pod-a")
    for weight in (float("nan"), float("inf")):
        body = {"model": "m", "tokens": PROMPT, "weights": {"gpu": weight}}
        assert error(send(api, "/v1/match", body))[:2] == (422, "invalid_request")


def test_routes_of_the_rfc_know_json_only(api: Api) -> None:
    api.add("pod-a")
    assert error(send(api, "/query", {"model": "m", "token_ids": [1]}))[:2] == (400, "malformed_json")
    response = api.client.post("/query", json={"model": "m", "token_ids": [1]}, headers={"accept": MSGPACK})
    assert response.headers["content-type"] == "application/json"


# An unknown field is named


@pytest.mark.parametrize("form", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("fields", "shown", "hint"),
    [
        ({"candidate": []}, "$.candidate", "did you mean candidates? known fields: model, "),
        ({"weights": {"gpus": 1}}, "$.weights.gpus", "did you mean gpu? known fields: gpu, cpu, disk, remote"),
        (
            {"multimodal": [{"ofset": 0}]},
            "$.multimodal[0].ofset",
            "did you mean offset? known fields: hash, offset, ",
        ),
        ({"a\n`\u202e": 1}, "$.a\\n`\\u202e", "known fields: model, "),
        ({"z" * 1_000_000: 1}, f"$.{'z' * 64}...", "known fields: model, "),
        ({"` - at `$.weights.gpu[": 1}, "$.weights.gpu[.", "known fields: gpu, "),  # who imitates a place is believed
    ],
)
def test_an_unknown_field_is_named_where_it_stands(
    api: Api, form: str, fields: dict[str, Any], shown: str, hint: str
) -> None:
    """Cut and escaped, with the fields that there are in its place; its value is in no answer."""
    secret = {name: "marked" if value == 1 else value for name, value in fields.items()}
    body = {"model": "m", "tokens": [1], **secret}
    kind = MSGPACK if form == "msgpack" else "application/json"
    content = msgpack.packb(body) if form == "msgpack" else json.dumps(body).encode()
    response = api.client.post("/v1/match", content=content, headers={"content-type": kind})
    assert response.status_code == 422
    said = response.json()["error"]
    assert said["code"] == "unknown_field"
    assert said["message"] == f"the body has a field that this route does not know: {shown}"
    assert said["hint"].startswith(hint)
    assert "marked" not in response.text


def test_an_unknown_field_of_a_prompt_of_a_batch_is_named(api: Api) -> None:
    api.add("pod-a")
    results = api.post("/v1/match/batch", {"model": "m", "prompts": [{"tokens": [1]}, {"token": [1]}]})["results"]
    assert results[1]["error"]["message"].endswith(": $.token")
    assert results[1]["error"]["hint"].startswith("did you mean tokens? ")
