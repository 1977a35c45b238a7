"""How prompts given as text become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field, SecretStr, field_validator

from kvindexer.settings.tokenizer import TokenizerSpec, read_tokenizers
from kvindexer.settings.values import MIB, Bytes, Seconds, from_text, no_boolean


class Texts(BaseModel):
    """Tokenizers."""

    tokenizers: Mapping[str, TokenizerSpec] = Field(
        default={},
        description="What makes tokens of texts, by model: a map with `path` or `engines` (see below).",
    )
    tokenizer_api_key: SecretStr | None = Field(
        default=None,
        description="Key that is sent to the engines of `tokenizers` as a bearer token.",
    )
    tokenizer_timeout_s: Seconds = Field(
        default=5.0,
        description="Seconds that a text may wait for its tokens; then the answer is 503.",
    )
    tokenizer_threads: Annotated[int, BeforeValidator(no_boolean)] = Field(
        default=2,
        gt=0,
        le=256,
        description="Threads of each local tokenizer.",
    )
    tokenizer_connections: Annotated[int, BeforeValidator(no_boolean)] = Field(
        default=8,
        gt=0,
        le=1024,
        description="Most requests at once to the engines of a model for tokens.",
    )
    tokenizer_answer_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Longest answer of an engine to a text in bytes; it may hold processed images.",
    )
    tokenizer_cache_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of tokens kept for texts that come again.",
    )
    tokenizer_cache_ttl_s: Seconds = Field(
        default=300.0,
        description="Seconds that tokens of a text are kept: templates may hold the date, engines may be replaced.",
    )

    @field_validator("tokenizers", mode="before")
    @classmethod
    def _read_tokenizers(cls, value: object) -> object:
        return read_tokenizers(from_text(value))
