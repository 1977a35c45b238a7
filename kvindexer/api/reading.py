"""From the fields of a request to a prompt: tokens or keys, as lists or packed; or an error that says why not."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Final, Protocol

from kvindexer.access.identity import no_keys, salt_of
from kvindexer.api.decoding import unsigned
from kvindexer.api.lookup import one_size
from kvindexer.api.prompt import KeyPrompt, Prompt, TokenPrompt, decoded_tokens, packed_tokens
from kvindexer.api.schemas import Multimodal
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.tokenization.blocks import TOKEN_BYTES
from kvindexer.tokenization.extras import MultimodalItem
from kvindexer.types import Keyspace

MAX_OVERLAP: Final = 8
"""How many multimodal items may share a token, on average (audio and video of one clip do)."""

KEY_BYTES: Final = 8


class Tokenized(Protocol):
    """A prompt whose tokens are given, and what else its keys depend on."""

    tokens: list[int] | None
    tokens_b64: bytes | None
    lora: str | None
    cache_salt: str | None
    multimodal: list[Multimodal] | None


class Given(Tokenized, Protocol):
    """A prompt in any of the ways in which it can be given."""

    keys: list[int] | None
    keys_b64: bytes | None
    prompt_tokens: int | None


def prompt_of(request: Given, spaces: list[Keyspace], max_tokens: int) -> Prompt:
    """The prompt of a request.  Raises RequestError, TooLargeError."""
    given = (request.tokens, request.tokens_b64, request.keys, request.keys_b64)
    if given.count(None) != len(given) - 1:
        raise RequestError(
            "invalid_request",
            "the prompt is missing or given twice",
            "give exactly one of tokens, tokens_b64, keys and keys_b64",
            status=422,
        )
    if request.keys is not None:
        return _of_keys(request, unsigned(request.keys, "keys"), one_size(spaces, "keys"), max_tokens)
    if request.keys_b64 is not None:
        return _of_keys(request, unpacked_keys(request.keys_b64), one_size(spaces, "keys"), max_tokens)
    if request.prompt_tokens is not None:
        raise RequestError("invalid_request", "prompt_tokens belongs to keys", "leave it away", status=422)
    return tokens_of(request, max_tokens)


def tokens_of(request: Tokenized, max_tokens: int) -> TokenPrompt:
    """The prompt of a request that gives its tokens.  Raises RequestError, TooLargeError."""
    if (request.tokens is None) == (request.tokens_b64 is None):
        raise RequestError(
            "invalid_request",
            "the prompt is missing or given twice",
            "give exactly one of tokens and tokens_b64",
            status=422,
        )
    packed = (
        packed_tokens(request.tokens, max_tokens)
        if request.tokens is not None
        else decoded_tokens(request.tokens_b64 or b"", max_tokens)
    )
    items = [MultimodalItem(item.hash, item.offset, item.length) for item in request.multimodal or ()]
    tokens = len(packed) // TOKEN_BYTES
    if items and sum(min(item.length, tokens) for item in items) > MAX_OVERLAP * tokens:
        raise RequestError(
            "invalid_request",
            "multimodal: the items are much longer than the prompt",
            "offset and length are in tokens of the prompt",
            status=422,
        )
    return TokenPrompt(packed, lora=request.lora, cache_salt=salt_of(request.cache_salt), multimodal=items)


def _of_keys(request: Given, keys: list[int], block_size: int, max_tokens: int) -> KeyPrompt:
    no_keys()
    if request.lora or request.cache_salt or request.multimodal:
        raise RequestError(
            "extras_with_keys",
            "keys already depend on LoRA, cache salt and multimodal items",
            "make the keys with them and leave them away here, or send tokens",
        )
    length = len(keys) * block_size
    if length > max_tokens:
        raise TooLargeError("prompt in tokens", length, max_tokens, "max_prompt_tokens")
    if request.prompt_tokens is not None and request.prompt_tokens < length:
        raise RequestError(
            "invalid_request",
            f"prompt_tokens is less than {len(keys)} blocks of {block_size}",
            "a key stands for a full block",
            status=422,
        )
    return KeyPrompt(keys, request.prompt_tokens)


def packed_keys(keys: Sequence[int]) -> bytes:
    """Block keys as little-endian u64."""
    packed = array("Q", keys)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpacked_keys(packed: bytes) -> list[int]:
    """Block keys that came packed.  Raises RequestError."""
    if len(packed) % KEY_BYTES:
        raise RequestError(
            "invalid_request",
            f"keys_b64: {len(packed)} bytes are no whole number of keys",
            "encode each key as 8 bytes, little-endian, then all of them as base64",
            status=422,
        )
    keys = array("Q", packed)
    if sys.byteorder == "big":
        keys.byteswap()
    return keys.tolist()
