"""Prompts as text become tokens: by the model's tokenizer, once for equal texts, in time or not at all.

    text ─► digest ─► in the cache? ──────────────► tokens
                      under way already? wait ────► tokens
                      the model's Tokenizer ──────► tokens, and into the cache

Invariant: tokens are the tokenizer's own, or there is an error, never a guess.  Of a text nothing outlives its
request but a digest; tokens live in the cache only, bounded in bytes and time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Final

import msgspec
from cachetools import TTLCache

from kvindexer.errors import NoTokenizerError, PromptRefusedError, RequestError, TokenizerFailedError, TooLargeError
from kvindexer.tokenization.blocks import TOKEN_BYTES
from kvindexer.tokenization.tokenizer import Text, Tokenized, Tokenizer

_log = logging.getLogger(__name__)

ENTRY_BYTES: Final = 512
"""What the cache needs for an entry beside its tokens, rounded up."""
ITEM_BYTES: Final = 256
_DIGEST_BYTES: Final = 32

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class TextLimits:
    """Bounds on texts; the settings of the same names say what they mean."""

    max_text_bytes: int = 8 * 1024 * 1024
    max_prompt_tokens: int = 1_048_576
    max_concurrent_texts: int = 64
    tokenizer_timeout_s: float = 5.0
    tokenizer_cache_bytes: int = 64 * 1024 * 1024
    tokenizer_cache_ttl_s: float = 300.0


class Texts:
    """The tokenizers of all models; `count` is told a fixed word for the outcome of each text."""

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        limits: TextLimits | None = None,
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._tokenizers = tokenizers
        self._limits = limits or TextLimits()
        self._count = count
        self._cache: TTLCache[bytes, Tokenized] = TTLCache(
            self._limits.tokenizer_cache_bytes, self._limits.tokenizer_cache_ttl_s, getsizeof=_size
        )
        self._under_way: dict[bytes, asyncio.Task[Tokenized]] = {}
        self._waiting = 0

    async def tokenized(self, model: str, text: Text) -> Tokenized:
        """The tokens of a text.  Raises RequestError."""
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            self._count("no_tokenizer")
            raise NoTokenizerError(model)
        key = self._digest(model, text)
        held = self._cache.get(key)
        if held is not None:
            self._count("cached")
            return held
        if max(self._waiting, len(self._under_way)) >= self._limits.max_concurrent_texts:
            self._count("busy")
            raise TokenizerFailedError(
                "busy",
                f"{self._limits.max_concurrent_texts} texts wait for their tokens already",
                "try again later, send tokens, or raise max_concurrent_texts",
            )
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._run(key, tokenizer, text), name="kvindexer-text")
            self._under_way[key] = task
            task.add_done_callback(partial(self._ended, key))
        self._waiting += 1
        try:
            tokenized = await asyncio.shield(task)
        except RequestError as error:
            self._count(error.reason if isinstance(error, TokenizerFailedError) else "refused")
            raise
        finally:
            self._waiting -= 1
        self._count("tokenized")
        return tokenized

    async def close(self) -> None:
        """End what is under way, then the tokenizers."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for tokenizer in self._tokenizers.values():
            await tokenizer.close()

    def _digest(self, model: str, text: Text) -> bytes:
        """A name for the text and all that its tokens depend on.  Raises TooLargeError, PromptRefusedError."""
        try:
            encoded = _encode((model, text))
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise PromptRefusedError("the text has values that JSON can't carry") from None
        if len(encoded) > self._limits.max_text_bytes:
            raise TooLargeError("text in bytes", len(encoded), self._limits.max_text_bytes, "max_text_bytes")
        return blake2b(encoded, digest_size=_DIGEST_BYTES).digest()

    async def _run(self, key: bytes, tokenizer: Tokenizer, text: Text) -> Tokenized:
        """Tokenize; whatever goes wrong comes out as an error that does not hold the text."""
        limits = self._limits
        try:
            async with asyncio.timeout(limits.tokenizer_timeout_s):
                tokenized = await tokenizer.tokenize(text)
        except (RequestError, asyncio.CancelledError):
            raise
        except TimeoutError:
            raise TokenizerFailedError(
                "timeout",
                f"the text had no tokens after {limits.tokenizer_timeout_s:g} s",
                "try again, send tokens, or raise tokenizer_timeout_s",
            ) from None
        except BaseException as error:  # noqa: BLE001 - a panic of a library is no Exception; either may quote the text
            _log.error("a tokenizer failed: %s", type(error).__name__)
            raise TokenizerFailedError("fault", "the tokenizer failed", "the service's log says how") from None
        tokens = len(tokenized.tokens) // TOKEN_BYTES
        if tokens > limits.max_prompt_tokens:
            raise TooLargeError("prompt in tokens", tokens, limits.max_prompt_tokens, "max_prompt_tokens")
        if _size(tokenized) <= limits.tokenizer_cache_bytes:
            self._cache[key] = tokenized
        return tokenized

    def _ended(self, key: bytes, task: asyncio.Task[Tokenized]) -> None:
        """Forget it, and look at its error, which asyncio would log if nobody waits any more."""
        del self._under_way[key]
        if not task.cancelled():
            task.exception()


def _size(tokenized: Tokenized) -> int:
    items = sum(ITEM_BYTES + len(item.hash) for item in tokenized.multimodal)
    return ENTRY_BYTES + len(tokenized.tokens) + items
