"""A prompt as a caller gives it: tokens, which become keys of any block size, or keys, which have one already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvindexer.errors import RequestError, TooLargeError
from kvindexer.tokenization.blocks import TOKEN_BYTES, chain_keys, local_hashes, pack_tokens, prompt_keys
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
        self.packed = packed
        self._tokens = len(packed) // TOKEN_BYTES
        self._lora = lora or None
        self._cache_salt = cache_salt or None
        self._multimodal = multimodal
        self._keys: dict[int, list[int]] = {}
        self._earlier: TokenPrompt | None = None

    @property
    def plain(self) -> bool:
        """Whether its keys depend on its tokens alone."""
        return not (self._lora or self._cache_salt or self._multimodal)

    def with_lora(self, lora: str | None) -> TokenPrompt:
        """The same prompt for another LoRA, or for none."""
        return TokenPrompt(self.packed, lora=lora, cache_salt=self._cache_salt, multimodal=self._multimodal)

    def follow(self, earlier: TokenPrompt) -> None:
        """Take the keys of an earlier prompt for as long as the tokens are the same; both must be plain."""
        self._earlier = earlier

    def keys(self, block_size: int) -> list[int]:
        """See `Prompt.keys`."""
        keys = self._keys.get(block_size)
        if keys is None:
            earlier = self._earlier
            keys = self._hashed(block_size) if earlier is None else self._going_on(earlier, block_size)
            self._keys[block_size] = keys
        return keys

    def _going_on(self, earlier: TokenPrompt, block_size: int) -> list[int]:
        width = block_size * TOKEN_BYTES
        shared = _shared(self.packed, earlier.packed, width)
        if not shared:
            return self._hashed(block_size)
        keys = earlier.keys(block_size)[:shared]
        return keys + chain_keys(keys[-1], local_hashes(self.packed[shared * width :], block_size))

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
        return prompt_keys(self.packed, block_size, extras)

    def tokens(self, block_size: int) -> int:  # noqa: ARG002 - the same for all sizes
        """See `Prompt.tokens`."""
        return self._tokens

    def whole(self, block_size: int) -> int:  # noqa: ARG002 - the same for all sizes
        """See `Prompt.whole`."""
        return self._tokens


def _shared(one: bytes, other: bytes, width: int) -> int:
    """How many leading parts of this width are equal."""
    low, high = 0, min(len(one), len(other)) // width
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * width : middle * width] == other[low * width : middle * width]:
            low = middle
        else:
            high = middle - 1
    return low


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
