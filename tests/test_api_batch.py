"""POST /v1/match/batch through a real server: the same answers, errors by prompt, limits, turns for others."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from starlette.types import Message

from api_server import Api, serving
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        running.store(running.add("pod-a"), PROMPT)
        running.store(running.add("pod-b", aliases=("b",)), PROMPT[:12])
        running.add("cold")
        yield running


def batch(api: Api, *prompts: Any, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = api.post("/v1/match/batch", {"model": "m", "prompts": prompts, **fields})
    return answer


PROMPTS: tuple[dict[str, Any], ...] = (
    {"tokens": PROMPT},
    {"tokens": PROMPT[:8]},
    {"tokens": [1, 2, 3, 4]},
    {"tokens": []},
    {"tokens_b64": base64.b64encode(struct.pack("<20I", *PROMPT[:20])).decode()},
    {"keys": prompt_keys(pack_tokens(PROMPT), 4), "prompt_tokens": 41},
    {"tokens": PROMPT, "cache_salt": "salt"},
    {"tokens": PROMPT, "lora": "tuned"},
    {"tokens": PROMPT, "multimodal": [{"hash": "img", "offset": 6, "length": 5}]},
)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"candidates": ["pod-a", "b", "cold", "x"], "top_k": 2, "order": "score"},
        {"require": ["live"], "weights": {"gpu": 0.5}, "by_rank": True},
    ],
    ids=["plain", "candidates", "requirements"],
)
def test_each_result_is_the_answer_to_its_prompt_alone(api: Api, fields: dict[str, Any]) -> None:
    answer = batch(api, *PROMPTS, **fields)
    for prompt, result in zip(PROMPTS, answer["results"], strict=True):
        alone = api.post("/v1/match", {"model": "m", **prompt, **fields})
        assert {
            name: value for name, value in alone.items() if name in ("blocks", "tokens", "matches", "reason")
        } == (result)
        assert alone["unknown_candidates"] == answer["unknown_candidates"]


def test_msgpack_prompts_get_the_same_results(api: Api) -> None:
    body = msgpack.packb(
        {"model": "m", "prompts": [{"tokens": PROMPT}, {"tokens_b64": struct.pack("<4I", 1, 2, 3, 4)}]}
    )
    headers = {"content-type": "application/msgpack", "accept": "application/msgpack"}
    answer = api.client.post("/v1/match/batch", content=body, headers=headers)
    assert msgpack.unpackb(answer.content) == batch(api, {"tokens": PROMPT}, {"tokens": [1, 2, 3, 4]})


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({}, "invalid_request"),
        ({"tokens": [-1]}, "invalid_request"),
        ({"tokens": ["x"]}, "invalid_request"),
        ({"tokens": [1], "keys": [1]}, "invalid_request"),
        ({"tokens": [1], "model": "m"}, "unknown_field"),
        ({"tokens_b64": "?"}, "invalid_request"),
        ({"keys": [1], "lora": "x"}, "extras_with_keys"),
        ({"tokens": [1] * 51}, "too_large"),
        (7, "invalid_request"),
        (None, "invalid_request"),
        ([[[]]], "invalid_request"),
    ],
)
def test_a_bad_prompt_has_its_own_error_and_spoils_no_other(wrong: Any, code: str) -> None:
    with serving(max_prompt_tokens=50) as api:
        api.store(api.add("pod-a"), PROMPT)
        good, bad, again = batch(api, {"tokens": PROMPT}, wrong, {"tokens": PROMPT})["results"]
        assert good == again
        assert good["matches"][0]["matched_tokens"] == 40
        assert list(bad) == ["error"]
        assert list(bad["error"]) == ["code", "message", "hint"]
        assert bad["error"]["code"] == code
        assert bad["error"]["hint"]


def test_errors_of_prompts_never_echo_them(api: Api) -> None:
    unwanted = "a-word-of-the-body"
    answer = batch(api, {"tokens": [unwanted]}, {"other": unwanted}, {"tokens": [1], "lora": [unwanted]}, unwanted)
    assert all("error" in result for result in answer["results"])
    assert unwanted not in str(answer)


def test_what_is_wrong_with_the_whole_is_an_error_of_the_whole(api: Api) -> None:
    good = {"tokens": PROMPT}
    assert api.refused("/v1/match/batch", {"model": "x", "prompts": [good]})[:2] == (404, "unknown_model")
    for body in (
        {"model": "m"},
        {"model": "m", "prompts": {}},
        {"model": "m", "prompts": [good], "tokens": [1]},
        {"model": "m", "prompts": [good], "require": ["alive"]},
        {"model": "m", "prompts": [good], "top_k": 0},
    ):
        status, _, hint = api.refused("/v1/match/batch", body)
        assert status == 422
        assert hint
    assert api.refused("/v1/match/batch", b'{"model":"m","prompts":[{"tokens":[1]},}')[:2] == (400, "malformed_json")
    assert batch(api)["results"] == []


def test_trap_26_batches_are_bounded_in_prompts_and_tokens() -> None:
    with serving(max_batch=3, max_batch_tokens=100) as api:
        api.add("pod-a")
        assert len(batch(api, *[{"tokens": [1]}] * 3)["results"]) == 3
        status, code, hint = api.refused("/v1/match/batch", {"model": "m", "prompts": [{"tokens": [1]}] * 4})
        assert (status, code) == (413, "too_large")
        assert "max_batch" in hint
        assert len(batch(api, *[{"tokens": [1] * 33}] * 3)["results"]) == 3
        status, code, hint = api.refused("/v1/match/batch", {"model": "m", "prompts": [{"tokens": [1] * 34}] * 3})
        assert (status, code) == (413, "too_large")
        assert "max_batch_tokens" in hint
        keys = [{"keys": [1] * 13}] * 2
        assert api.refused("/v1/match/batch", {"model": "m", "prompts": keys})[:2] == (413, "too_large")


def test_trap_26_a_batch_of_millions_of_values_is_refused(api: Api) -> None:
    many = 5_000_000
    assert api.refused("/v1/match/batch", b'{"model":"m","prompts":[' + b"1," * many + b"1]}")[:2] == (
        413,
        "too_large",
    )
    headers = {"content-type": "application/msgpack"}
    body = b"\x82\xa5model\xa1m\xa7prompts\xdd" + struct.pack(">I", many) + b"\x01" * many
    assert api.client.post("/v1/match/batch", content=body, headers=headers).status_code == 413
    prompt = b"\x81\xa6tokens\xdd" + struct.pack(">I", many) + b"\x01" * many
    body = b"\x82\xa5model\xa1m\xa7prompts\x91" + prompt
    (result,) = api.client.post("/v1/match/batch", content=body, headers=headers).json()["results"]
    assert result["error"]["code"] == "too_large"


def test_trap_26_prompts_nested_a_million_deep_are_no_fault(api: Api) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    status = api.client.post("/v1/match/batch", content=b'{"model":"m","prompts":[' + deep + b"]}").status_code
    assert status in (200, 400, 422)


def test_each_prompt_of_a_batch_counts_as_a_query(api: Api) -> None:
    batch(api, *PROMPTS, {"tokens": [-1]})
    assert api.metrics.queries == len(PROMPTS)


@pytest.mark.parametrize("slice_ms", [0.1, 1000])
def test_p5_others_have_their_turn_while_a_large_batch_is_answered(slice_ms: float) -> None:
    """After each slice the loop looks at what else there is to do."""
    packed = base64.b64encode(struct.pack("<8000I", *range(8000))).decode()
    body = json.dumps({"model": "m", "prompts": [{"tokens_b64": packed}] * 64}).encode()
    with serving(slice_ms=slice_ms) as api:
        api.store(api.add("pod-a"), range(8000))
        turns, status = asyncio.run(turns_meanwhile(api, body))
    assert status == 200
    assert turns > 50 if slice_ms < 1 else turns < 10


async def turns_meanwhile(api: Api, body: bytes) -> tuple[int, int]:
    """How many turns another task has while the application answers, and the status of the answer."""
    turns = status = 0

    async def another() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    task = asyncio.create_task(another())
    await api.app({"type": "http", "method": "POST", "path": "/v1/match/batch", "headers": []}, receive, send)
    task.cancel()
    return turns, status
