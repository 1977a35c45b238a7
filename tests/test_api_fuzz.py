"""Whatever is sent: an answer, or an error of the one shape, never a fault; and the service goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_server import Api, error, serving
from tokenizing import make_tokenizer

PROMPT = list(range(40))
CHAT = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
FIELDS = {
    "/v1/match": (
        *("prompt", "add_special_tokens", *CHAT),
        *("model", "tokens", "tokens_b64", "keys", "prompt_tokens", "block_size", "tenant", "lora", "cache_salt"),
        *(
            "additional_salt",
            "multimodal",
            "candidates",
            "require",
            "keys_b64",
            "top_k",
            "weights",
            "order",
            "by_rank",
        ),
    ),
    "/v1/explain": (
        *("prompt", "messages", "model", "tokens", "tokens_b64", "keys", "prompt_tokens", "block_size", "tenant"),
        *(
            "lora",
            "cache_salt",
            "additional_salt",
            "multimodal",
            "candidates",
            "require",
            "keys_b64",
            "top_k",
            "order",
            "weights",
        ),
    ),
    "/v1/match/batch": (
        *("model", "prompts", "block_size", "tenant", "additional_salt", "candidates", "require", "top_k", "weights"),
        *("order", "by_rank"),
    ),
    "/v1/keys": (
        *("model", "tokens", "tokens_b64", "block_size", "tenant", "lora", "cache_salt", "additional_salt"),
        "multimodal",
    ),
    "/v1/routed": (
        *("model", "instance", "ttl_s", "tokens", "tokens_b64", "keys", "keys_b64", "prompt_tokens", "block_size"),
        *("tenant", "lora", "cache_salt", "additional_salt", "multimodal", "prompt", "messages"),
    ),
    "/v1/feedback": ("instance", "predicted_tokens", "cached_tokens", "model", "tenant", "rank", "request_id"),
    "/score_completions": ("model", "prompt", "temperature"),
    "/score_chat_completions": ("model", *CHAT),
    "/v1/blocks/locate": (
        *("model", "tenant", "additional_salt", "keys", "hashes", "source", "instance", "block_size", "near"),
    ),
    "/v1/offload/plan": (*("instance", "tier", "hashes", "model", "tenant", "additional_salt", "rank", "hot_from"),),
    "/query": (
        *("model", "modelname", "model_name", "token_ids", "tenant_id", "routing_group", "block_size", "lora_name"),
        *("lora_id", "cache_salt", "additionalsalt", "additional_salt", "instance_id"),
    ),
    "/query_by_hash": (
        "model",
        "model_name",
        "seq_hashes",
        "block_hash",
        "block_hashes",
        "block_size",
        "instance_id",
    ),
    "/register": (
        *("instance_id", "endpoint", "block_size", "model", "modelname", "model_name", "type", "replay_endpoint"),
        *("tenant_id", "lora_name", "dp_rank", "additionalsalt", "topic", "tier", "readers", "report_mode"),
        *("offload_blocks_per_chunk", "offload_connector", "speculative_blocks", "durable_tiers", "aliases"),
    ),
    "/unregister": ("instance_id", "model", "model_name", "tenant_id", "routing_group", "dp_rank"),
}
LIKELY: st.SearchStrategy[Any] = st.sampled_from(
    [
        *("m", "pod-a", "", "default", "vLLM", "tcp://127.0.0.1:1", "AAAAAA==", "live", "\x00", "\ud800", "\udc00x"),
        *(0, 1, 4, -1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), 1.0, True, None),
        *(PROMPT, [], [-1], [2**64], ["live", "sound"], ["pod-a", "x"], ["pod-a", "\udc00"], [{}]),
        *(
            {"gpu": 0.5},
            {"gpu": -1},
            {"tape": 1},
            "score",
            "expected",
            ["10.0.0.1:80", "http://[", "pod-a:1", "[::1]:80"],
        ),
        *([{"tokens": PROMPT}, {}, 7], [{"keys": [1]}, {"keys_b64": "AAAA"}, {"tokens": [-1]}], [[], None, "x"]),
        [{"hash": "x", "offset": 3, "length": 2}],
        [{"role": "user", "content": "the fox"}],
        [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "["}}]}],
        [{"type": "function", "function": {"name": "f"}}],
        [{"hash": "\udc00", "offset": 2**32, "length": 2**32}],
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    path = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with serving(tokenizers={"m": {"path": str(path)}}) as running:
        running.store(running.add("pod-a"), PROMPT)
        yield running


def check(api: Api, path: str, content: bytes, **headers: str) -> None:
    """An answer or a proper error, and then still a right answer."""
    response = api.client.post(path, content=content, headers=headers)
    if response.status_code not in (200, 201):
        assert error(response)[0] in (400, 404, 409, 413, 422), response.text


@pytest.mark.parametrize("path", FIELDS)
@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_values_in_any_fields(api: Api, path: str, data: st.DataObject) -> None:
    body: dict[str, Any] = {"model": "m"}
    body |= data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), LIKELY | ANYTHING))
    check(api, path, json.dumps(body).encode())


@pytest.mark.parametrize("path", FIELDS)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=50).map(json.dumps).map(str.encode))
def test_any_bytes(api: Api, path: str, content: bytes) -> None:
    check(api, path, content)


MSGPACK_ROUTES = [path for path in FIELDS if path.startswith(("/v1/", "/score_"))]
AS_MSGPACK = {"content-type": "application/msgpack", "accept": "application/msgpack"}


@pytest.mark.parametrize("path", MSGPACK_ROUTES)
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_values_in_any_fields_of_msgpack(api: Api, path: str, data: st.DataObject) -> None:
    body: dict[str, Any] = {"model": "m"}
    body |= data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), LIKELY | st.binary(max_size=20) | st.floats()))
    try:
        content = msgspec.msgpack.encode(body)
    except (UnicodeEncodeError, OverflowError):  # what msgpack can't say
        return
    check(api, path, content, **AS_MSGPACK)


@pytest.mark.parametrize("path", MSGPACK_ROUTES)
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200))
def test_any_bytes_as_msgpack(api: Api, path: str, content: bytes) -> None:
    check(api, path, content, **AS_MSGPACK)
    check(api, path, b"\x82\xa5model\xa1m\xa7prompts" + content, **AS_MSGPACK)


def test_after_all_that_the_answer_is_still_right(api: Api) -> None:
    api.store(api.add("pod-b"), PROMPT)
    (row,) = api.post("/v1/match", {"model": "m", "tokens": PROMPT, "candidates": ["pod-b"]})["matches"]
    assert row["matched_tokens"] == 40
