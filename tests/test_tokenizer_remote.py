"""Engines' own tokenizers, over real HTTP: right answers used, wrong ones not believed, sick engines left alone."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from time import monotonic, sleep
from typing import Any, TypeVar

import pytest

from kvindexer.errors import PromptRefusedError, TokenizerFailedError
from kvindexer.tokenization import engines as module
from kvindexer.tokenization.blocks import pack_tokens
from kvindexer.tokenization.engines import Engines
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.tokenization.remote import FAIR_SHARE, RENDER, TOKENIZE, RemoteTokenizer
from kvindexer.tokenization.tokenizer import Chat, Completion, Text, Tokenized
from tokenizing import FakeEngine, Says, fake_engine, ids, reply, tokens_of

T = TypeVar("T")
SECRET = "Zanzibar"
FOX = Completion("the quick fox")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT = Chat([{"role": "user", "content": "the dog"}])
PICTURE = Chat([{"role": "user", "content": [{"type": "text", "text": SECRET}, IMAGE]}])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_MIN_S", 0.05)
    monkeypatch.setattr(module, "HEALTH_S", 0.3)


@pytest.fixture
def fleet() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(fake_engine()) for _ in range(3)]


@pytest.fixture
def engine(fleet: list[FakeEngine]) -> FakeEngine:
    return fleet[0]


def using(
    urls: list[str],
    act: Callable[[RemoteTokenizer], Awaitable[T]],
    *,
    timeout_s: float = 5.0,
    answer_max_bytes: int = 1 << 20,
    api_key: str | None = None,
) -> T:
    async def run() -> T:
        pool = Engines(
            urls,
            connections=4,
            answer_max_bytes=answer_max_bytes,
            fair_s=timeout_s * FAIR_SHARE,
            api_key=api_key,
        )
        tokenizer = RemoteTokenizer(pool, "served", timeout_s=timeout_s, connections=4)
        try:
            return await act(tokenizer)
        finally:
            await tokenizer.close()

    return asyncio.run(run())


def tokens(engines: list[FakeEngine], text: Text, **options: Any) -> Tokenized:
    return using([engine.url for engine in engines], lambda tokenizer: tokenizer.tokenize(text), **options)


def packed(text: str) -> Tokenized:
    return Tokenized(pack_tokens(ids(text)))


def rendered(token_ids: Any, features: Any = None) -> Says:
    """What vLLM's render says, with the parts that are of no use to us."""
    answer = {"request_id": "chatcmpl-1", "token_ids": token_ids, "features": features, "sampling_params": {"n": 1}}
    return lambda _: reply(answer | {"model": "served", "stream": False, "cache_salt": None, "priority": 0})


def failing(engines: list[FakeEngine], text: Text, **options: Any) -> TokenizerFailedError:
    with pytest.raises(TokenizerFailedError) as caught:
        tokens(engines, text, **options)
    assert SECRET not in f"{caught.value.message} {caught.value.hint} {caught.value!r}"
    return caught.value


# What is asked, and what is made of the answer


def test_a_prompt_is_asked_of_tokenize(engine: FakeEngine) -> None:
    assert tokens([engine], FOX) == packed("the quick fox")
    assert engine.asked == [(TOKENIZE, {"model": "served", "prompt": "the quick fox", "add_special_tokens": True})]
    assert engine.headers[0]["content-type"] == "application/json"
    assert "authorization" not in engine.headers[0]


def test_a_chat_is_asked_of_render(engine: FakeEngine) -> None:
    engine.says[RENDER] = rendered([1, 2, 3])
    tool = {"type": "function", "function": {"name": "f"}}
    chat = Chat(CHAT.messages, tools=[tool], template_kwargs={"enable_thinking": False}, add_generation_prompt=False)
    assert tokens([engine], chat) == Tokenized(pack_tokens([1, 2, 3]))
    (path, asked) = engine.asked[0]
    assert path == RENDER
    assert asked == {
        "model": "served",
        "messages": CHAT.messages,
        "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": False,
        "continue_final_message": False,
        "add_special_tokens": False,
    }


def test_features_become_items_in_the_order_of_the_prompt(engine: FakeEngine) -> None:
    features = {
        "mm_hashes": {"image": ["aa", "bb"], "audio": ["cc"]},
        "mm_placeholders": {
            "image": [{"offset": 1, "length": 4}, {"offset": 8, "length": 2}],
            "audio": [{"offset": 5, "length": 1}],
        },
        "kwargs_data": {"image": ["x" * 1000, None], "audio": [None]},
    }
    engine.says[RENDER] = rendered(list(range(10)), features)
    items = (MultimodalItem("aa", 1, 4), MultimodalItem("cc", 5, 1), MultimodalItem("bb", 8, 2))
    assert tokens([engine], PICTURE) == Tokenized(pack_tokens(range(10)), items)


def test_a_key_is_sent_if_there_is_one(engine: FakeEngine) -> None:
    tokens([engine], FOX, api_key="sesame")
    assert engine.headers[0]["authorization"] == "Bearer sesame"


def test_where_nothing_renders_text_goes_to_tokenize_and_images_nowhere(engine: FakeEngine) -> None:
    async def act(tokenizer: RemoteTokenizer) -> None:
        for _ in range(2):
            assert await tokenizer.tokenize(CHAT) == packed("the dog")
        with pytest.raises(TokenizerFailedError, match="render"):
            await tokenizer.tokenize(PICTURE)

    using([engine.url], act)
    assert engine.paths() == [RENDER, TOKENIZE, TOKENIZE, RENDER]


# Answers that are not believed


FEATURES = {"mm_hashes": {"image": ["aa"]}, "mm_placeholders": {"image": [{"offset": 1, "length": 4}]}}


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b""),
        (200, b"<html>" + SECRET.encode()),
        (200, b"\xff" * 10),
        (200, b"[" * 5000),
        (200, b"[1, 2]"),
        (200, json.dumps({"tokens": "1 2 3", "count": 3}).encode()),
        (200, json.dumps({"tokens": [1, -2], "count": 2}).encode()),
        (200, json.dumps({"tokens": [1, 2**32], "count": 2}).encode()),
        (200, json.dumps({"tokens": [1, 2], "count": 3}).encode()),
        (200, json.dumps({"tokens": list(range(300_000))}).encode()),
        (204, b""),
        (302, b""),
        (401, b"{}"),
        (404, b"{}"),
        (500, b"Internal Server Error: " + SECRET.encode()),
        (503, b""),
    ],
)
def test_an_answer_that_cannot_be_right_is_no_tokens_and_another_engine_is_asked(
    fleet: list[FakeEngine], status: int, content: bytes
) -> None:
    bad, good, _ = fleet
    bad.says[TOKENIZE] = lambda _: (status, content)
    failing([bad], Completion(SECRET))
    for _ in range(2):  # whichever of them is first
        assert tokens([bad, good], FOX) == packed("the quick fox")


@pytest.mark.parametrize(
    ("token_ids", "features"),
    [
        ([], None),
        (list(range(10)), None),
        (list(range(4)), FEATURES),
        (list(range(10)), FEATURES | {"mm_hashes": {"image": ["aa", "bb"]}}),
        (list(range(10)), FEATURES | {"mm_hashes": {"video": ["aa"]}}),
        (list(range(10)), FEATURES | {"mm_hashes": {"image": [""]}}),
        (list(range(10)), FEATURES | {"mm_placeholders": {"image": [{"offset": -1, "length": 4}]}}),
        (list(range(10)), FEATURES | {"mm_placeholders": {"image": [{"offset": 1, "length": 0}]}}),
        (list(range(10)), FEATURES | {"mm_placeholders": {"image": [[1, 4]]}}),
        (
            list(range(10)),
            {"mm_hashes": {"image": ["a"] * 9}, "mm_placeholders": {"image": [{"offset": 0, "length": 10}] * 9}},
        ),
    ],
)
def test_images_that_cannot_be_right_are_no_answer(engine: FakeEngine, token_ids: Any, features: Any) -> None:
    engine.says[RENDER] = rendered(token_ids, features)
    failing([engine], PICTURE)


def test_an_endless_answer_is_cut_off(engine: FakeEngine) -> None:
    engine.says[TOKENIZE] = lambda _: (200, b" " * 3_000_000)
    assert "tokenizer_answer_max_bytes" in failing([engine], FOX).message


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_an_engine_refuses_is_refused_once_and_for_all(fleet: list[FakeEngine], status: int) -> None:
    for engine in fleet:
        engine.says[TOKENIZE] = lambda _: (status, b'{"message": "too long: ' + SECRET.encode() + b'"}')
    with pytest.raises(PromptRefusedError) as caught:
        tokens(fleet, FOX)
    assert sum(len(engine.asked) for engine in fleet) == 1
    assert SECRET not in f"{caught.value.message} {caught.value.hint}"


# Sick engines


def test_engines_are_asked_in_turn(fleet: list[FakeEngine]) -> None:
    async def act(tokenizer: RemoteTokenizer) -> None:
        for _ in range(9):
            await tokenizer.tokenize(FOX)

    using([engine.url for engine in fleet], act)
    assert [len(engine.asked) for engine in fleet] == [3, 3, 3]


def test_nobody_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    since = monotonic()

    async def act(tokenizer: RemoteTokenizer) -> list[str]:
        said = []
        for _ in range(2):
            with pytest.raises(TokenizerFailedError) as caught:
                await tokenizer.tokenize(FOX)
            said.append(caught.value.message)
        return said

    first, second = using([url], act)
    assert "no connection" in first
    assert "all are down" in second
    assert monotonic() - since < 2


def test_an_engine_that_hangs_costs_half_the_time_and_then_none(fleet: list[FakeEngine]) -> None:
    hung, good, _ = fleet
    hung.says[TOKENIZE] = hung.hang
    hung.health = 500

    async def act(tokenizer: RemoteTokenizer) -> list[float]:
        took = []
        for _ in range(6):
            since = monotonic()
            assert await tokenizer.tokenize(FOX) == packed("the quick fox")
            took.append(monotonic() - since)
        return took

    took = using([hung.url, good.url], act, timeout_s=0.8)
    assert sum(seconds > 0.3 for seconds in took) == 1
    assert len(hung.asked) == 1


def test_an_engine_that_is_well_again_is_asked_again(
    fleet: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvindexer")
    sick, good, _ = fleet
    sick.says[TOKENIZE] = lambda _: (503, b"")
    sick.health = 500

    async def act(tokenizer: RemoteTokenizer) -> None:
        for _ in range(4):
            await tokenizer.tokenize(Completion(SECRET))
        assert len(sick.asked) == 1
        sick.says[TOKENIZE] = tokens_of
        sick.health = 200
        for _ in range(100):
            await tokenizer.tokenize(FOX)
            if len(sick.asked) > 1:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("it was never asked again")

    using([sick.url, good.url], act)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert SECRET not in caplog.text


def test_pauses_grow_while_an_engine_stays_sick(engine: FakeEngine) -> None:
    engine.says[TOKENIZE] = lambda _: (503, b"")

    async def act(tokenizer: RemoteTokenizer) -> int:
        ends_at = monotonic() + 1.2
        while monotonic() < ends_at:
            with pytest.raises(TokenizerFailedError):
                await tokenizer.tokenize(FOX)
            await asyncio.sleep(0.005)
        return len(engine.asked)

    assert 2 <= using([engine.url], act) <= 6


def test_no_more_requests_are_under_way_than_allowed(engine: FakeEngine) -> None:
    engine.says[TOKENIZE] = engine.hang

    async def act(tokenizer: RemoteTokenizer) -> list[object]:
        under_way = [asyncio.create_task(tokenizer.tokenize(Completion(str(number)))) for number in range(20)]
        await asyncio.sleep(0.3)
        assert len(engine.asked) == 4
        engine.released.set()
        return await asyncio.gather(*under_way, return_exceptions=True)

    assert all(isinstance(result, Tokenized) for result in using([engine.url], act))


def test_an_engine_is_not_ill_because_texts_waited_for_their_turn(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(asked: dict[str, Any]) -> Any:
        sleep(0.25)
        return tokens_of(asked)

    engine.says[TOKENIZE] = slow

    async def act(tokenizer: RemoteTokenizer) -> None:
        texts = [Completion(str(number)) for number in range(48)]
        results = await asyncio.gather(*(tokenizer.tokenize(text) for text in texts), return_exceptions=True)
        made = sum(isinstance(result, Tokenized) for result in results)
        assert 4 <= made < len(results)
        assert await tokenizer.tokenize(FOX)

    using([engine.url], act, timeout_s=2)
    assert not caplog.records


def test_an_engine_is_not_asked_through_a_proxy(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert tokens([engine], FOX) == packed("the quick fox")
