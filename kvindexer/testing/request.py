"""One request on its way through a fake engine, and the text that the fake model answers.

Invariant: `computed` tokens have KV, of which the first `announced` blocks are reusable by others; the last sampled
token never has KV. Answers depend on seed, prompt and LoRA only, so twins answer alike and cached prefixes are
shared by their follow-ups.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvindexer.testing.events import Digest
    from kvindexer.testing.hashing import CacheScope
    from kvindexer.testing.physical import BlockId

VOCABULARY = 32_000


class Result(NamedTuple):
    """What an engine reports about a finished request."""

    cached_tokens: int
    output_tokens: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Request:
    """A request's tokens (prompt, then output) and what the engine has done for it so far."""

    tokens: list[int]
    prompt_length: int
    output: Sequence[int]
    scope: CacheScope
    session_id: str | None = None
    digests: list[Digest] = field(default_factory=list)
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    announced: int = 0
    loading: int = 0
    cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all output tokens are sampled."""
        return len(self.tokens) == self.prompt_length + len(self.output)

    @property
    def result(self) -> Result:
        """What the engine reports; for finished requests only."""
        if not self.finished or self.cached_tokens is None:
            raise RuntimeError("the request has not finished: call step() until it has")
        return Result(self.cached_tokens, tuple(self.tokens[self.prompt_length :]))

    def sample(self) -> None:
        """Append the model's next token."""
        self.tokens.append(self.output[len(self.tokens) - self.prompt_length])

    def forget_progress(self) -> None:
        """Start over after a preemption; tokens sampled so far count as prompt from now on."""
        self.blocks = []
        self.computed = self.announced = self.loading = 0


def answer(seed: int | str, prompt: Sequence[int], lora: str | None, max_tokens: int) -> list[int]:
    """Make up the model's answer to a prompt."""
    text = f"{seed}/{lora}/".encode() + array("Q", prompt).tobytes()
    choice = random.Random(hashlib.sha256(text).digest())
    return [choice.randrange(VOCABULARY) for _ in range(max_tokens)]
