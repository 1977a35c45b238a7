"""The engines' own tokenizers, over HTTP: what they say is what they will look up in their caches.

    text       POST /tokenize                      {"tokens": [..], "count": n}
    messages   POST /v1/chat/completions/render    {"token_ids": [..], "features": null | {"mm_hashes": ..,
                                                    "mm_placeholders": ..}}

`render` belongs to vLLM from 0.18 on; later versions have it only with --enable-scale-out, or as a server of its own
(`vllm launch render`).  Where it is missing, messages that are nothing but text go to `/tokenize`, which applies the
same template; images would come back without their hashes, so they are refused.

Another engine is asked if one fails, a few times; a prompt that an engine refuses is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from kvindexer.errors import PromptRefusedError, TokenizerFailedError
from kvindexer.tokenization.blocks import pack_tokens
from kvindexer.tokenization.engines import Answer, Engine, EngineError, Engines
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.tokenization.tokenizer import Chat, Completion, Text, Tokenized

TOKENIZE: Final = "/tokenize"
RENDER: Final = "/v1/chat/completions/render"
TRIES: Final = 3
RENDERLESS_S: Final = 60.0
"""How long we believe that an engine does not render, before it is asked again."""
FAIR_SHARE: Final = 1 / 5
"""Part of a text's time in which an engine that is well answers; each of `TRIES` gets about a quarter or more."""
LEAST_SHARE: Final = 1 / 8
"""With less than this left, nobody is asked any more."""
MAX_OVERLAP: Final = 8
"""How many items may share a token, on average (audio and video of one clip do)."""

_OK: Final = 200
_REFUSALS: Final = frozenset({400, 413, 422})
_MISSING: Final = frozenset({404, 405, 501})
_encode = msgspec.json.Encoder().encode


class _Tokens(msgspec.Struct):
    tokens: list[int]
    count: int | None = None


class _Range(msgspec.Struct):
    offset: int
    length: int


class _Features(msgspec.Struct):
    mm_hashes: dict[str, list[str]]
    mm_placeholders: dict[str, list[_Range]]


class _Rendered(msgspec.Struct):
    token_ids: list[int]
    features: _Features | None = None


_read_tokens = msgspec.json.Decoder(_Tokens).decode
_read_rendered = msgspec.json.Decoder(_Rendered).decode


class RemoteTokenizer:
    """The engines of one model; `model` is the name under which they serve it."""

    def __init__(self, engines: Engines, model: str, *, timeout_s: float, connections: int) -> None:
        self._engines = engines
        self._model = model
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(connections)

    async def tokenize(self, text: Text) -> Tokenized:
        """See `Tokenizer.tokenize`."""
        clock = asyncio.get_running_loop().time
        ends_at = clock() + self._timeout_s
        async with self._turns:
            kinds = []
            engines = self._engines.in_turn(TRIES)
            for others, engine in zip(reversed(range(len(engines))), engines, strict=True):
                left_s = ends_at - clock()
                if left_s < self._timeout_s * LEAST_SHARE:
                    kinds.append("no time left")
                    break
                try:
                    tokenized = await self._ask(engine, text, left_s / 2 if others else left_s)
                except EngineError as error:
                    kinds.append(error.kind)
                    continue
                self._engines.delivered(engine)
                return tokenized
        why = ", ".join(dict.fromkeys(kinds)) or "all are down"
        raise TokenizerFailedError(
            "engines", f"no engine of the model made tokens: {why}", "try again, or send tokens; the log has more"
        )

    async def close(self) -> None:
        """See `Tokenizer.close`."""
        await self._engines.close()

    async def _ask(self, engine: Engine, text: Text, within_s: float) -> Tokenized:
        """Raises EngineError if another engine should be asked."""
        match text:
            case Completion():
                body = {"model": self._model, "prompt": text.text, "add_special_tokens": text.add_special_tokens}
                return _of_tokens(await self._engines.post(engine, TOKENIZE, _encode(body), within_s))
            case Chat():
                return await self._ask_chat(engine, text, within_s)

    async def _ask_chat(self, engine: Engine, chat: Chat, within_s: float) -> Tokenized:
        clock = asyncio.get_running_loop().time
        ends_at = clock() + within_s
        body = _encode(_chat_body(self._model, chat))
        if clock() >= engine.renderless_until or not chat.is_text:
            answer = await self._engines.post(engine, RENDER, body, within_s)
            if answer.status not in _MISSING:
                return _of_rendered(answer, chat)
            engine.renderless_until = clock() + RENDERLESS_S
        if not chat.is_text:
            raise EngineError("it does not render images (vLLM: --enable-scale-out)")
        return _of_tokens(await self._engines.post(engine, TOKENIZE, body, max(0.0, ends_at - clock())))


def _chat_body(model: str, chat: Chat) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": chat.messages,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "add_special_tokens": chat.add_special_tokens,
    }
    if chat.tools:
        body["tools"] = chat.tools
    if chat.template_kwargs:
        body["chat_template_kwargs"] = chat.template_kwargs
    return body


def _check(answer: Answer) -> None:
    if answer.status in _REFUSALS:
        raise PromptRefusedError("the engine refuses this prompt", "send what it would take as a request")
    if answer.status != _OK:
        raise EngineError(f"status {answer.status}")


def _of_tokens(answer: Answer) -> Tokenized:
    _check(answer)
    try:
        read = _read_tokens(answer.body)
    except (ValueError, RecursionError):
        raise EngineError("an answer without tokens") from None
    if read.count is not None and read.count != len(read.tokens):
        raise EngineError("an answer whose count is not that of its tokens")
    return Tokenized(_packed(read.tokens))


def _of_rendered(answer: Answer, chat: Chat) -> Tokenized:
    _check(answer)
    try:
        read = _read_rendered(answer.body)
    except (ValueError, RecursionError):
        raise EngineError("an answer without tokens") from None
    if not read.token_ids:
        raise EngineError("an answer without tokens")
    packed = _packed(read.token_ids)
    if read.features is None:
        if not chat.is_text:
            raise EngineError("an answer that does not tell of the images")
        return Tokenized(packed)
    return Tokenized(packed, tuple(_items(read.features, len(read.token_ids))))


def _packed(tokens: Iterable[int]) -> bytes:
    try:
        return pack_tokens(tokens)
    except OverflowError:
        raise EngineError("an answer with impossible tokens") from None


def _items(features: _Features, tokens: int) -> list[MultimodalItem]:
    """Hashes and places, which come in parallel lists by modality, in the prompt's order."""
    items = []
    for modality in features.mm_hashes.keys() | features.mm_placeholders.keys():
        hashes, ranges = features.mm_hashes.get(modality, []), features.mm_placeholders.get(modality, [])
        if len(hashes) != len(ranges):
            raise EngineError("an answer with images of which hash or place is missing")
        items += [
            MultimodalItem(name, place.offset, place.length) for name, place in zip(hashes, ranges, strict=True)
        ]
    inside = all(item.hash and item.offset >= 0 < item.length <= tokens - item.offset for item in items)
    if not inside or sum(item.length for item in items) > MAX_OVERLAP * tokens:
        raise EngineError("an answer with images outside the prompt")
    return sorted(items, key=lambda item: (item.offset, item.hash))
