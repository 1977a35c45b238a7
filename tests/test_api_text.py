"""Prompts as text over HTTP: they match what engines hold, wait without disturbing others, and are never told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import msgspec
import pytest

from api_server import Api, serving, until
from kvindexer.errors import SettingsError
from kvindexer.service import open_texts
from kvindexer.settings import load_settings
from kvindexer.settings.tokenizer import TokenizerSpec
from tokenizing import FakeEngine, fake_engine, ids, make_tokenizer, reply

SECRET = "Zanzibar"
TIMEOUT_S = 20
WORDS = "the quick brown fox jumps over the dog"
TOKENS = ids(f"<s> {WORDS}")
MESSAGES = [{"role": "user", "content": WORDS}]
CHAT_TOKENS = ids(f"<s> user {WORDS} </s> assistant")
RENDER = "/v1/chat/completions/render"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """Pod a holds the prompt, pod b the chat; blocks have 4 tokens."""
    with serving(tokenizers={"m": {"path": str(make_tokenizer(tmp_path / "tokenizer"))}}) as running:
        running.store(running.add("pod-a"), TOKENS)
        running.store(running.add("pod-b"), CHAT_TOKENS)
        yield running


@contextmanager
def with_engines(number: int = 1, **settings: Any) -> Iterator[tuple[Api, list[FakeEngine]]]:
    with ExitStack() as stack:
        engines = [stack.enter_context(fake_engine()) for _ in range(number)]
        urls = [engine.url for engine in engines]
        api = stack.enter_context(serving(tokenizers={"m": {"engines": urls}}, **settings))
        yield api, engines


def matched(answer: dict[str, Any]) -> dict[str, int]:
    return {row["instance"]: row["matched_tokens"] for row in answer["matches"]}


# POST /v1/match, /v1/keys


def test_a_text_matches_what_its_tokens_match(api: Api) -> None:
    by_tokens = api.post("/v1/match", {"model": "m", "tokens": TOKENS})
    by_text = api.post("/v1/match", {"model": "m", "prompt": WORDS})
    assert by_text == by_tokens
    assert matched(by_text) == {"pod-a": 8}
    assert by_text["tokens"] == len(TOKENS)


def test_a_conversation_matches_what_its_tokens_match(api: Api) -> None:
    assert matched(api.post("/v1/match", {"model": "m", "messages": MESSAGES})) == {"pod-b": 12}
    without = {"model": "m", "messages": MESSAGES, "add_generation_prompt": False}
    assert api.post("/v1/match", without)["tokens"] == len(CHAT_TOKENS) - 1
    more = {"model": "m", "messages": MESSAGES, "add_special_tokens": True}
    assert api.post("/v1/match", more)["tokens"] == len(CHAT_TOKENS) + 1


def test_special_tokens_can_be_left_away(api: Api) -> None:
    answer = api.post("/v1/match", {"model": "m", "prompt": WORDS, "add_special_tokens": False})
    assert (answer["tokens"], answer["matches"]) == (len(TOKENS) - 1, [])


def test_lora_and_salt_belong_to_texts_too(api: Api) -> None:
    for field in ("lora", "cache_salt"):
        assert api.post("/v1/match", {"model": "m", "prompt": WORDS, field: "x"})["matches"] == []


def test_keys_of_a_text_are_those_of_its_tokens(api: Api) -> None:
    by_tokens = api.post("/v1/keys", {"model": "m", "tokens": TOKENS})
    assert api.post("/v1/keys", {"model": "m", "prompt": WORDS}) == by_tokens
    keys = api.post("/v1/keys", {"model": "m", "messages": MESSAGES})["keys"]
    assert matched(api.post("/v1/match", {"model": "m", "keys": keys})) == {"pod-b": 12}


def test_texts_may_come_as_msgpack(api: Api) -> None:
    body = msgspec.msgpack.encode({"model": "m", "messages": MESSAGES})
    response = api.client.post("/v1/match", content=body, headers={"content-type": "application/msgpack"})
    assert matched(response.json()) == {"pod-b": 12}


def test_msgpack_with_more_values_than_json_could_carry_is_413() -> None:
    with serving(max_prompt_tokens=10, max_candidates=10) as api:
        api.add("pod-a")
        body = msgspec.msgpack.encode({"model": "m", "messages": [{"a": [{}] * 150_000}]})
        response = api.client.post("/v1/match", content=body, headers={"content-type": "application/msgpack"})
        assert response.status_code == 413


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": WORDS, "messages": MESSAGES},
        {"prompt": WORDS, "tokens": [1]},
        {"messages": MESSAGES, "keys": [1]},
        {"prompt": WORDS, "tokens_b64": ""},
        {"prompt": WORDS, "prompt_tokens": 1},
        {"prompt": WORDS, "multimodal": []},
        {"prompt": WORDS, "tools": []},
        {"prompt": WORDS, "chat_template_kwargs": {}},
        {"prompt": WORDS, "continue_final_message": True},
        {"tokens": [1], "add_special_tokens": True},
        {"add_generation_prompt": True},
        {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": []},
        {"messages": "x"},
        {"messages": [1]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
)
def test_what_is_no_clear_text_is_422(api: Api, fields: dict[str, Any]) -> None:
    status, code, hint = api.refused("/v1/match", {"model": "m", **fields})
    assert (status, bool(hint)) == (422, True)
    assert code in ("invalid_request", "prompt_refused")


def test_a_model_without_tokenizer_says_what_to_set_and_guesses_nothing() -> None:
    with serving() as api:
        api.add("pod-a")
        status, code, hint = api.refused("/v1/match", {"model": "m", "prompt": WORDS})
        assert (status, code) == (422, "no_tokenizer")
        assert "tokenizers" in hint
        assert api.refused("/v1/match", {"model": "n", "prompt": WORDS})[:2] == (404, "unknown_model")


def test_a_long_text_is_413(tmp_path: Path) -> None:
    path = str(make_tokenizer(tmp_path))
    with serving(tokenizers={"m": {"path": path}}, max_text_bytes=1000, max_prompt_tokens=10) as api:
        api.add("pod-a")
        assert api.refused("/v1/match", {"model": "m", "prompt": "x" * 1001})[:2] == (413, "too_large")
        assert api.refused("/v1/match", {"model": "m", "prompt": "fox " * 10})[:2] == (413, "too_large")


# Engines that tokenize


def test_images_come_with_the_engines_answer() -> None:
    tokens = [7] * 4 + [99] * 6 + [8] * 6
    features = {"mm_hashes": {"image": ["aa"]}, "mm_placeholders": {"image": [{"offset": 4, "length": 6}]}}
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "?"}]
    with with_engines() as (api, (engine,)):
        engine.says[RENDER] = lambda _: reply({"token_ids": tokens, "features": features})
        same = api.add("same")
        extra_keys = [None, [["aa", 0]], [["aa", -4]], None]
        api.store(same, tokens, extra_keys=extra_keys)
        other = api.add("other")
        api.store(other, tokens, extra_keys=[None, [["bb", 0]], [["bb", -4]], None])
        answer = api.post("/v1/match", {"model": "m", "messages": [{"role": "user", "content": parts}]})
        assert matched(answer) == {"same": 16, "other": 4}


def test_engines_that_have_no_answer_are_503_and_no_guess() -> None:
    with with_engines() as (api, (engine,)):
        api.add("pod-a")
        engine.says["/tokenize"] = lambda _: (500, SECRET.encode())
        status, code, _ = api.refused("/v1/match", {"model": "m", "prompt": SECRET})
        assert (status, code) == (503, "tokenizer_failed")


def test_queries_by_tokens_are_answered_while_texts_hang() -> None:
    """Texts that wait take neither the loop nor the places of others, however many they are."""
    settings = {"tokenizer_timeout_s": 5, "max_concurrent_texts": 8, "tokenizer_connections": 4}
    with with_engines(**settings) as (api, (engine,)), ThreadPoolExecutor(32) as pool:
        api.store(api.add("pod-a"), TOKENS)
        engine.says["/tokenize"] = engine.hang
        bodies = [{"model": "m", "prompt": f"{WORDS} {number}"} for number in range(32)]
        waiting = [pool.submit(api.client.post, "/v1/match", json=body) for body in bodies]
        until(lambda: len(engine.asked) == 4 and sum(call.done() for call in waiting) == 24)  # told at once: too many
        times = []
        for _ in range(50):
            since = monotonic()
            assert matched(api.post("/v1/match", {"model": "m", "tokens": TOKENS})) == {"pod-a": 8}
            times.append(monotonic() - since)
        assert sorted(times)[25] < 0.1
        assert (len(engine.asked), sum(call.done() for call in waiting)) == (4, 24)
        engine.released.set()
        answers = [call.result(TIMEOUT_S) for call in waiting]
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 8 + [503] * 24


def test_a_text_that_hangs_ends_in_time() -> None:
    with with_engines(tokenizer_timeout_s=0.2) as (api, (engine,)):
        api.add("pod-a")
        engine.says["/tokenize"] = engine.hang
        since = monotonic()
        assert api.refused("/v1/match", {"model": "m", "prompt": WORDS})[:2] == (503, "tokenizer_failed")
        assert monotonic() - since < 2


def test_a_source_that_goes_while_a_text_waits_is_not_in_the_answer() -> None:
    with with_engines() as (api, (engine,)), ThreadPoolExecutor(1) as pool:
        api.store(api.add("pod-a"), ids(WORDS))
        api.add("pod-b")
        engine.says["/tokenize"] = engine.hang
        waiting = pool.submit(api.client.post, "/v1/match", json={"model": "m", "prompt": WORDS})
        until(lambda: bool(engine.asked))
        api.post("/unregister", {"instance_id": "pod-a"})
        engine.released.set()
        assert waiting.result(TIMEOUT_S).json()["matches"] == []


def test_no_text_and_no_token_is_told(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """P9: neither logs nor errors nor metrics hold a piece of a text."""
    caplog.set_level(logging.DEBUG, "kvindexer")
    said = ""
    with with_engines() as (other, (engine,)):
        other.add("pod-a")
        answers = iter([(400, SECRET.encode()), (500, SECRET.encode()), (200, SECRET.encode()), (429, b"")])
        engine.says["/tokenize"] = lambda _: next(answers)
        for _ in range(4):
            said += other.client.post("/v1/match", json={"model": "m", "prompt": SECRET}).text
        said += other.client.get("/metrics").text
    image = [{"role": SECRET, "content": [{"type": SECRET, "x": SECRET}]}]
    for fields in ({"messages": image}, {"prompt": SECRET, "tools": [{SECRET: SECRET}]}, {"messages": SECRET}):
        said += api.client.post("/v1/match", json={"model": "m", **fields}).text
    said += api.client.post("/v1/match", content=b'{"model": "m", "prompt": "\\ud800' + SECRET.encode() + b'"}').text
    said += api.client.get("/metrics").text
    assert SECRET not in said + caplog.text
    assert 'kvindexer_texts_total{outcome="engines"}' in said


# POST /score_completions, /score_chat_completions


def test_scores_are_weighted_blocks_by_pod(api: Api) -> None:
    """The nearest tier's weight for each leading block, as llm-d scores."""
    source = api.add("pod-c")
    api.store(source, TOKENS[:4], first=3)
    api.store(source, TOKENS, first=3, medium="CPU", extra_keys=[None] * 2)
    assert api.post("/score_completions", {"model": "m", "prompt": WORDS}) == {"pod-a": 2.0, "pod-c": 1.8}
    chat = {"model": "m", "messages": MESSAGES, "stream": True, "temperature": 0.7}
    assert api.post("/score_chat_completions", chat) == {"pod-b": 3.0}
    assert api.post("/score_completions", {"model": "m", "prompt": "dog dog dog"}) == {}


def test_scores_are_questions_too_and_feed_the_heat(api: Api) -> None:
    for _ in range(3):
        api.post("/score_completions", {"model": "m", "prompt": WORDS})
        api.post("/score_chat_completions", {"model": "m", "messages": MESSAGES})
    hot = api.client.get("/v1/heat/prefixes", params={"model": "m"}).json()["prefixes"]
    assert {row["tokens"] for row in hot} == {8, 12}


def test_scores_of_what_is_not_known_are_errors(api: Api) -> None:
    assert api.refused("/score_completions", {"model": "n", "prompt": WORDS})[:2] == (404, "unknown_model")
    assert api.refused("/score_completions", {"model": "m"})[0] == 422
    assert api.refused("/score_chat_completions", {"model": "m", "messages": []})[0] == 422
    api.add("pod-n", port=5558, model="n")
    assert api.refused("/score_completions", {"model": "n", "prompt": WORDS})[:2] == (422, "no_tokenizer")
    assert api.client.get("/score_completions").status_code == 405


# Settings


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ([], "tokenizers", "a map of models"),
        ({7: {"path": "x"}}, "tokenizers", "names of models"),
        ({"m": "x"}, "tokenizers.m", "path or engines"),
        ({"m": {}}, "tokenizers.m", "either path or engines"),
        ({"m": {"path": "x", "engines": ["http://h"]}}, "tokenizers.m", "either path or engines"),
        ({"m": {"path": "x", "colour": "red"}}, "tokenizers.m.colour", "a known field"),
        ({"m": {"path": 7}}, "tokenizers.m.path", "text"),
        ({"m": {"path": "x", "model": "y"}}, "tokenizers.m.model", "nothing"),
        ({"m": {"engines": ["http://h"], "chat_template": "x"}}, "tokenizers.m.chat_template", "nothing"),
        ({"m": {"engines": "http://h"}}, "tokenizers.m.engines", "a list"),
        ({"m": {"engines": ["tcp://h:1"]}}, "tokenizers.m.engines", "http://host:port"),
        ({"m": {"engines": ["http://u:p@h:1"]}}, "tokenizers.m.engines", "http://host:port"),
        ({"m": {"engines": ["http://h:99999"]}}, "tokenizers.m.engines", "http://host:port"),
        ({"m": {"engines": ["http://"]}}, "tokenizers.m.engines", "http://host:port"),
    ],
)
def test_tokenizers_that_make_no_sense_are_named(value: Any, key: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"tokenizers": value}, {})
    assert caught.value.key == key
    assert expected in caught.value.expected


def test_engines_are_asked_only_where_endpoints_allow_it() -> None:
    with pytest.raises(SettingsError, match="allowed_endpoints"):
        load_settings(None, {"tokenizers": {"m": {"engines": ["http://h:1"]}}, "allowed_endpoints": ["tcp://*"]}, {})


def test_a_directory_without_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tokenizers\.m: .* expected a directory with tokenizer.json"):
        open_texts(load_settings(None, {"tokenizers": {"m": {"path": str(tmp_path)}}}, {}))


def test_texts_leave_half_of_the_places_to_others() -> None:
    settings = load_settings(None, {"max_concurrent_requests": 16}, {})
    assert open_texts(settings)._limits.max_concurrent_texts == 8


def test_the_key_for_engines_is_hidden() -> None:
    assert "sesame" not in repr(load_settings(None, {"tokenizer_api_key": "sesame"}, {}))


def test_tokenizers_can_be_given_as_a_variable() -> None:
    settings = load_settings(None, {}, {"KVINDEXER_TOKENIZERS": "{m: {engines: ['http://h:1'], model: n}}"})
    assert settings.tokenizers == {"m": TokenizerSpec(engines=("http://h:1",), model="n")}


def test_httpx_is_there_for_the_service() -> None:
    """It is a dependency of the service, not of its tests alone."""
    text = (Path(__file__).parent.parent / "requirements.lock").read_text()
    assert f"httpx=={httpx.__version__}" in text
