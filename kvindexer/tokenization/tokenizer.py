"""A prompt as text, in either of its forms, and what makes tokens of it.

A `Completion` is one string, a `Chat` a list of messages that a template turns into one.  Both say all that the
tokens depend on, so that equal texts have equal tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from kvindexer.tokenization.extras import MultimodalItem

Message = dict[str, Any]
TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
"""Types of content parts that are text; everything else is an image, a sound or unknown."""


class Completion(msgspec.Struct, frozen=True, tag=True):
    """A prompt that is one string.  Special tokens are added unless told otherwise, as engines do."""

    text: str
    add_special_tokens: bool = True


class Chat(msgspec.Struct, frozen=True, tag=True):
    """A conversation, and how it is put into words.  Special tokens stand in the template, none are added."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    @property
    def is_text(self) -> bool:
        """Whether there is nothing but text in the messages."""
        return all(part_type(part) in TEXT_PARTS for message in self.messages for part in _parts(message))


Text = Completion | Chat


class Tokenized(NamedTuple):
    """What the engine will see: packed tokens (`pack_tokens`), and where in them images and the like lie."""

    tokens: bytes
    multimodal: tuple[MultimodalItem, ...] = ()


class Tokenizer(Protocol):
    """Makes tokens of one model's texts."""

    async def tokenize(self, text: Text) -> Tokenized:
        """The tokens of a text.  Raises PromptRefusedError, TokenizerFailedError."""

    async def close(self) -> None:
        """Let go of threads and connections."""


def part_type(part: object) -> object:
    """The type of a piece of a message's content; a bare string is text."""
    match part:
        case str():
            return "text"
        case {"type": kind}:
            return kind
        case {"text": str()}:
            return "text"
    return None


def _parts(message: Message) -> Iterable[object]:
    content = message.get("content")
    return content if isinstance(content, list) else ()
