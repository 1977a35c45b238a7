"""A prompt as a caller gives it: tokens, which become keys of any block size, or keys, which have one already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvindexer.errors import RequestError, TooLargeError
from kvindexer.tokenization.blocks import TOKEN_BYTES, pack_tokens, prompt_keys
from kvindexer.tokenization.extras import MultimodalItem, prompt_extras


class Prompt(Protocol):
    """What can be looked up in a keyspace."""

    def keys(self, block_size: int) -> list[int]:
        """Block keys of the full blocks."""

    def tokens(self, block_size: int) -> int:
        """Tokens that the caller told us of."""

    def whole(self, block_size: int) -> int:
        """Length of the whole prompt in tokens, as far as known."""


class TokenPrompt:
    """A prompt of which the tokens are known; `packed` as little-endian u32."""

    def __init__(
        self,
        packed: bytes,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[MultimodalItem] = (),
    ) -> None:
        self._packed = packed
        self._tokens = len(packed) // TOKEN_BYTES
        self._lora = lora or None
        self._cache_salt = cache_salt or None
        self._multimodal = multimodal
        self._keys: dict[int, list[int]] = {}

    @property
    def plain(self) -> bool:
        """Whether its keys depend on its tokens alone."""
        return not (self._lora or self._cache_salt or self._multimodal)

    def with_lora(self, lora: str | None) -> TokenPrompt:
        """The same prompt for another LoRA, or for none."""
        return TokenPrompt(self._packed, lora=lora, cache_salt=self._cache_salt, multimodal=self._multimodal)

    def keys(self, block_size: int) -> list[int]:
        """See `Prompt.keys`."""
        keys = self._keys.get(block_size)
        if keys is None:
            keys = self._keys[block_size] = self._hashed(block_size)
        return keys

    def _hashed(self, block_size: int) -> list[int]:
        extras = None
        if not self.plain:
            extras = prompt_extras(
                self._tokens // block_size,
                block_size,
                lora=self._lora,
                cache_salt=self._cache_salt,
                multimodal=self._multimodal,
            )
        return prompt_keys(self._packed, block_size, extras)

    def tokens(self, block_size: int) -> int:  # noqa: ARG002 - the same for all sizes
        """See `Prompt.tokens`."""
        return self._tokens

    def whole(self, block_size: int) -> int:  # noqa: ARG002 - the same for all sizes
        """See `Prompt.whole`."""
        return self._tokens


class KeyPrompt:
    """A prompt of which only the keys are known: its length is given, or it goes on behind the last key."""

    def __init__(self, keys: list[int], tokens: int | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    def keys(self, block_size: int) -> list[int]:  # noqa: ARG002 - the caller made them for one size
        """See `Prompt.keys`."""
        return self._keys

    def tokens(self, block_size: int) -> int:
        """See `Prompt.tokens`."""
        return len(self._keys) * block_size if self._tokens is None else self._tokens

    def whole(self, block_size: int) -> int:
        """See `Prompt.whole`."""
        return len(self._keys) * block_size + 1 if self._tokens is None else self._tokens


def packed_tokens(tokens: Sequence[int], limit: int) -> bytes:
    """A list of token ids, packed.  Raises RequestError, TooLargeError."""
    if len(tokens) > limit:
        raise TooLargeError("prompt in tokens", len(tokens), limit, "max_prompt_tokens")
    try:
        return pack_tokens(tokens)
    except OverflowError:
        raise RequestError(
            "invalid_request", "a token id is out of range", f"token ids are 0 to {2**32 - 1}", status=422
        ) from None


def decoded_tokens(packed: bytes, limit: int) -> bytes:
    """Tokens that came packed.  Raises RequestError, TooLargeError."""
    tokens, rest = divmod(len(packed), TOKEN_BYTES)
    if rest:
        raise RequestError(
            "invalid_request",
            f"tokens_b64: {len(packed)} bytes are no whole number of tokens",
            "encode each token id as 4 bytes, little-endian, then all of them as base64",
            status=422,
        )
    if tokens > limit:
        raise TooLargeError("prompt in tokens", tokens, limit, "max_prompt_tokens")
    return packed
