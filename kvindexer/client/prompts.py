"""A prompt, in any of the forms in which the service takes one.

    Tokens   as the engine sees it; `hashed(block_size)` makes Keys of it here, and tokens don't travel
    Keys     8 bytes a block: from `Tokens.hashed`, or from the service (`client.keys(...).prompt()`)
    Text     one string, for services that have a tokenizer for the model
    Chat     messages, likewise

Their `repr` shows no content, so that none gets into logs.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvindexer.tokenization.blocks import TOKEN_BYTES, pack_tokens, prompt_keys
from kvindexer.tokenization.extras import MultimodalItem, prompt_extras

MAX_KEY: Final = 2**64 - 1
KEY_BYTES: Final = 8


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Tokens:
    """Token ids, and what else decides over reuse; packed once, as little-endian u32."""

    packed: bytes
    lora: str | None
    cache_salt: str | None
    multimodal: tuple[MultimodalItem, ...]

    def __init__(
        self,
        ids: Iterable[int] | bytes,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        multimodal: Iterable[MultimodalItem] = (),
    ) -> None:
        """`ids` may be bytes that are packed already.  Raises ValueError for what can't be token ids."""
        _set(self, packed=_packed(ids), lora=lora, cache_salt=cache_salt, multimodal=tuple(multimodal))

    def __len__(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    def __repr__(self) -> str:
        return f"<Tokens: {len(self)}>"

    def hashed(self, block_size: int) -> Keys:
        """The keys of its full blocks, of the size that the model's engines have."""
        extras = prompt_extras(
            len(self) // block_size,
            block_size,
            lora=self.lora or None,
            cache_salt=self.cache_salt or None,
            multimodal=self.multimodal,
        )
        return Keys(prompt_keys(self.packed, block_size, extras), tokens=len(self), block_size=block_size)

    def fields(self) -> dict[str, Any]:
        """What it adds to a request."""
        items = [item._asdict() for item in self.multimodal]
        return {
            "tokens_b64": self.packed,
            "lora": self.lora,
            "cache_salt": self.cache_salt,
            "multimodal": items or None,
        }


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Keys:
    """Block keys: LoRA, salt and images are in them already."""

    packed: bytes
    tokens: int | None
    block_size: int | None

    def __init__(
        self, keys: Iterable[int] | bytes, *, tokens: int | None = None, block_size: int | None = None
    ) -> None:
        """`tokens` is the length of the prompt; without it the prompt goes on behind the keys."""
        _set(self, packed=pack_keys(keys), tokens=tokens, block_size=block_size)

    def __len__(self) -> int:
        return len(self.packed) // KEY_BYTES

    def __repr__(self) -> str:
        return f"<Keys: {len(self)}>"

    def fields(self) -> dict[str, Any]:
        """What it adds to a request."""
        return {"keys_b64": self.packed, "prompt_tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as the engine's /v1/completions takes it."""

    prompt: str = field(repr=False)
    lora: str | None = field(default=None, kw_only=True)
    cache_salt: str | None = field(default=None, kw_only=True, repr=False)
    add_special_tokens: bool | None = field(default=None, kw_only=True)

    def fields(self) -> dict[str, Any]:
        """What it adds to a request."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as the engine's /v1/chat/completions takes it."""

    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    tools: Sequence[Mapping[str, Any]] | None = field(default=None, kw_only=True, repr=False)
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)
    add_generation_prompt: bool | None = field(default=None, kw_only=True)
    continue_final_message: bool | None = field(default=None, kw_only=True)
    add_special_tokens: bool | None = field(default=None, kw_only=True)
    lora: str | None = field(default=None, kw_only=True)
    cache_salt: str | None = field(default=None, kw_only=True, repr=False)

    def fields(self) -> dict[str, Any]:
        """What it adds to a request."""
        return {name: getattr(self, name) for name in self.__slots__}


Prompt = Tokens | Keys | Text | Chat


def pack_keys(keys: Iterable[int] | bytes) -> bytes:
    """Block keys as little-endian u64; signed ones are read as their unsigned twins."""
    if isinstance(keys, bytes):
        if len(keys) % KEY_BYTES:
            raise ValueError(f"{len(keys)} bytes are no whole number of block keys")
        return keys
    packed = array("Q", (key & MAX_KEY for key in keys))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _packed(ids: Iterable[int] | bytes) -> bytes:
    if isinstance(ids, bytes):
        if len(ids) % TOKEN_BYTES:
            raise ValueError(f"{len(ids)} bytes are no whole number of token ids")
        return ids
    try:
        return pack_tokens(ids)
    except (OverflowError, TypeError):
        raise ValueError(f"token ids are integers from 0 to {2**32 - 1}") from None


def _set(prompt: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(prompt, name, value)
