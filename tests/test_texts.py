"""Texts: one tokenizer a model, equal texts once, bounds on memory, time and number, and nothing told of a text."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from kvindexer.errors import NoTokenizerError, PromptRefusedError, RequestError, TokenizerFailedError, TooLargeError
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.tokenization.texts import ENTRY_BYTES, TextLimits, Texts
from kvindexer.tokenization.tokenizer import Chat, Completion, Text, Tokenized

T = TypeVar("T")
SECRET = "Zanzibar"


class FakeTokenizer:
    """A token a character; may wait, fail, or tell of images."""

    def __init__(self) -> None:
        self.asked: list[Text] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: BaseException | None = None
        self.items: tuple[MultimodalItem, ...] = ()
        self.closed = False

    async def tokenize(self, text: Text) -> Tokenized:
        self.asked.append(text)
        await self.open.wait()
        if self.error is not None:
            raise self.error
        shown = text.text if isinstance(text, Completion) else str(text.messages)
        return Tokenized(b"\x01\0\0\0" * len(shown), self.items)

    async def close(self) -> None:
        self.closed = True


class Rig:
    """Texts of a model `m`, and what they have counted."""

    def __init__(self, **limits: Any) -> None:
        self.tokenizer = FakeTokenizer()
        self.counted: Counter[str] = Counter()
        self.texts = Texts({"m": self.tokenizer}, TextLimits(**limits), lambda word: self.counted.update([word]))

    async def ask(self, text: str | Text = "abc", model: str = "m") -> Tokenized:
        return await self.texts.tokenized(model, Completion(text) if isinstance(text, str) else text)


def run(act: Callable[[Rig], Awaitable[T]], **limits: Any) -> T:
    async def main() -> T:
        rig = Rig(**limits)
        try:
            return await asyncio.wait_for(act(rig), 20)
        finally:
            rig.tokenizer.open.set()
            await rig.texts.close()
            assert rig.tokenizer.closed

    return asyncio.run(main())


def test_a_model_without_tokenizer_is_told_what_to_set() -> None:
    async def act(rig: Rig) -> None:
        with pytest.raises(NoTokenizerError) as caught:
            await rig.ask(SECRET, model="other")
        assert (caught.value.status, caught.value.code) == (422, "no_tokenizer")
        assert "tokenizers" in caught.value.hint
        assert rig.counted == {"no_tokenizer": 1}

    run(act)


def test_equal_texts_are_tokenized_once() -> None:
    async def act(rig: Rig) -> None:
        first = await rig.ask()
        assert await rig.ask() is first
        assert len(rig.tokenizer.asked) == 1
        assert rig.counted == {"tokenized": 1, "cached": 1}

    run(act)


def test_texts_that_differ_in_anything_are_different_texts() -> None:
    """Invariant: whatever tokens depend on is part of what a text is remembered by."""
    messages = [{"role": "user", "content": "abc"}]
    different: list[Text] = [
        Completion("abc"),
        Completion("abc "),
        Completion("abc", add_special_tokens=False),
        Chat(messages),
        Chat([{"content": "abc", "role": "user"}]),  # templates show fields in the order they come in
        Chat(messages, tools=[{"type": "function"}]),
        Chat(messages, template_kwargs={"a": 1}),
        Chat(messages, template_kwargs={"a": True}),
        Chat(messages, add_generation_prompt=False),
        Chat(messages, continue_final_message=True),
        Chat(messages, add_special_tokens=True),
    ]

    async def act(rig: Rig) -> None:
        for _ in range(2):
            for text in different:
                await rig.ask(text)
        assert rig.tokenizer.asked == different

    run(act)


def test_models_are_different_texts_too() -> None:
    async def main() -> None:
        one, other = FakeTokenizer(), FakeTokenizer()
        texts = Texts({"one": one, "other": other})
        for model in ("one", "other", "one"):
            await texts.tokenized(model, Completion("abc"))
        assert (len(one.asked), len(other.asked)) == (1, 1)
        await texts.close()

    asyncio.run(main())


def test_equal_texts_at_once_wait_for_one_answer() -> None:
    async def act(rig: Rig) -> None:
        rig.tokenizer.open.clear()
        waiting = [asyncio.create_task(rig.ask()) for _ in range(10)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()  # the one that began it
        rig.tokenizer.open.set()
        answers = await asyncio.gather(*waiting[1:])
        assert len(rig.tokenizer.asked) == 1
        assert all(answer is answers[0] for answer in answers)

    run(act)


def test_a_failure_is_told_to_all_who_wait_and_not_remembered() -> None:
    async def act(rig: Rig) -> None:
        rig.tokenizer.error = PromptRefusedError("no")
        results = await asyncio.gather(*(rig.ask() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, PromptRefusedError) for result in results)
        rig.tokenizer.error = None
        assert await rig.ask()
        assert len(rig.tokenizer.asked) == 2
        assert rig.counted == {"refused": 3, "tokenized": 1}

    run(act)


def test_the_cache_is_bounded_in_bytes() -> None:
    limit = 10 * (ENTRY_BYTES + 400)

    async def act(rig: Rig) -> None:
        for number in range(100):
            await rig.ask(f"{number:0100}")
            assert rig.texts._cache.currsize <= limit
        assert len(rig.texts._cache) == 10
        assert len(rig.tokenizer.asked) == 100
        await rig.ask(f"{99:0100}")
        assert len(rig.tokenizer.asked) == 100

    run(act, tokenizer_cache_bytes=limit)


def test_what_is_larger_than_the_cache_is_answered_and_not_kept() -> None:
    async def act(rig: Rig) -> None:
        rig.tokenizer.items = (MultimodalItem("x" * 1000, 0, 1),)
        assert len((await rig.ask()).multimodal) == 1
        assert not rig.texts._cache

    run(act, tokenizer_cache_bytes=1024)


def test_the_cache_forgets_in_time() -> None:
    async def act(rig: Rig) -> None:
        await rig.ask()
        await asyncio.sleep(0.05)
        await rig.ask()
        assert len(rig.tokenizer.asked) == 2

    run(act, tokenizer_cache_ttl_s=0.02)


def test_nothing_of_a_text_is_kept() -> None:
    """P9: after the answer the cache has digests and tokens, no text."""

    async def act(rig: Rig) -> None:
        await rig.ask(SECRET)
        rig.tokenizer.asked.clear()
        kept = pickle.dumps((list(rig.texts._cache.items()), list(rig.texts._under_way)))
        assert SECRET.encode() not in kept

    run(act)


def test_a_text_that_takes_too_long_is_an_error_and_others_go_on() -> None:
    async def act(rig: Rig) -> None:
        await rig.ask("quick")
        rig.tokenizer.open.clear()
        slow = asyncio.create_task(rig.ask("slow"))
        await asyncio.sleep(0)
        assert await rig.ask("quick")
        with pytest.raises(TokenizerFailedError) as caught:
            await slow
        assert (caught.value.status, caught.value.reason) == (503, "timeout")
        assert "tokenizer_timeout_s" in caught.value.hint
        rig.tokenizer.open.set()
        assert await rig.ask("slow")

    run(act, tokenizer_timeout_s=0.05)


def test_only_so_many_texts_wait_at_once() -> None:
    async def act(rig: Rig) -> None:
        await rig.ask("known")
        rig.tokenizer.open.clear()
        waiting = [asyncio.create_task(rig.ask(text)) for text in ("a", "a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(TokenizerFailedError, match="wait for their tokens") as caught:
            await rig.ask("c")
        assert "max_concurrent_texts" in caught.value.hint
        assert await rig.ask("known")
        rig.tokenizer.open.set()
        await asyncio.gather(*waiting)
        assert await rig.ask("c")
        assert rig.counted == {"tokenized": 5, "busy": 1, "cached": 1}

    run(act, max_concurrent_texts=3)


def test_texts_that_nobody_waits_for_any_more_count_until_they_end() -> None:
    async def act(rig: Rig) -> None:
        rig.tokenizer.open.clear()
        waiting = [asyncio.create_task(rig.ask(text)) for text in "ab"]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(TokenizerFailedError):
            await rig.ask("c")

    run(act, max_concurrent_texts=2)


@pytest.mark.parametrize("text", ["x" * 2000, "é" * 1000, '"' * 1000])
def test_a_text_beyond_the_limit_is_413(text: str) -> None:
    async def act(rig: Rig) -> None:
        with pytest.raises(TooLargeError, match="text in bytes"):
            await rig.ask(text)
        assert not rig.tokenizer.asked

    run(act, max_text_bytes=1500)


def test_more_tokens_than_a_prompt_may_have_are_413() -> None:
    async def act(rig: Rig) -> None:
        assert await rig.ask("x" * 100)
        with pytest.raises(TooLargeError, match="prompt in tokens"):
            await rig.ask("x" * 101)

    run(act, max_prompt_tokens=100)


@pytest.mark.parametrize(
    "text", [Completion("\ud800" + SECRET), Chat([{"role": "user", "content": {object(): SECRET}}])]
)
def test_what_is_no_text_is_refused(text: Text) -> None:
    async def act(rig: Rig) -> None:
        with pytest.raises(PromptRefusedError) as caught:
            await rig.ask(text)
        assert SECRET not in str(caught.value)

    run(act)


class PanicError(BaseException):
    """What a library in Rust raises when it panics."""


@pytest.mark.parametrize("error", [RuntimeError(SECRET), UnicodeError(SECRET), PanicError(SECRET)])
def test_whatever_a_tokenizer_raises_the_text_is_not_told(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """P9."""
    caplog.set_level(logging.DEBUG)

    async def act(rig: Rig) -> None:
        rig.tokenizer.error = error
        with pytest.raises(TokenizerFailedError) as caught:
            await rig.ask(SECRET)
        assert SECRET not in f"{caught.value!r} {caught.value.hint}"
        assert rig.counted == {"fault": 1}

    run(act)
    assert type(error).__name__ in caplog.text
    assert SECRET not in caplog.text


def test_errors_of_texts_that_nobody_waits_for_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def act(rig: Rig) -> None:
        rig.tokenizer.open.clear()
        rig.tokenizer.error = PromptRefusedError(SECRET)
        waiting = asyncio.create_task(rig.ask())
        await asyncio.sleep(0)
        waiting.cancel()
        rig.tokenizer.open.set()
        await asyncio.sleep(0.01)

    run(act)
    assert not caplog.records


def test_a_stop_ends_what_is_under_way() -> None:
    async def main() -> None:
        rig = Rig()
        rig.tokenizer.open.clear()
        waiting = asyncio.create_task(rig.ask())
        await asyncio.sleep(0)
        await rig.texts.close()
        with pytest.raises((asyncio.CancelledError, RequestError)):
            await waiting
        assert not rig.texts._under_way

    asyncio.run(main())
