"""Prompts given as text: `prompt`, or `messages` with what belongs to them, on their way to a prompt of tokens.

A text has to wait for its tokens, so a route that takes one is asynchronous for texts and for nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Protocol

from msgspec import Meta

from kvindexer.access.identity import salt_of
from kvindexer.api.prompt import TokenPrompt
from kvindexer.errors import RequestError
from kvindexer.tokenization.texts import Texts
from kvindexer.tokenization.tokenizer import Chat, Completion
from kvindexer.tokenization.tokenizer import Text as Given

PromptText = Annotated[str, Meta(description="The prompt as text; needs a tokenizer for the model.")]
Messages = Annotated[
    list[dict[str, Any]],
    Meta(description="The prompt as a conversation, as in /v1/chat/completions; needs a tokenizer for the model."),
]
Tools = Annotated[list[dict[str, Any]], Meta(description="Tools of the conversation; only with `messages`.")]
TemplateKwargs = Annotated[
    dict[str, Any], Meta(description="Further values for the model's chat template; only with `messages`.")
]
GenerationPrompt = Annotated[
    bool, Meta(description="Let the model speak next: true unless the final message goes on; only with `messages`.")
]
GoesOn = Annotated[bool, Meta(description="Leave the final message open; only with `messages`.")]
SpecialTokens = Annotated[
    bool, Meta(description="Add special tokens: by default to `prompt`, not to `messages`, whose template has them.")
]


class TextRequest(Protocol):
    """The fields of a request that gives its prompt as text, and those that may not stand beside them."""

    model: str
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    lora: str | None
    cache_salt: str | None


def has_text(request: TextRequest) -> bool:
    """Whether any of the fields of texts is there."""
    return not (
        request.prompt is None
        and request.messages is None
        and request.tools is None
        and request.chat_template_kwargs is None
        and request.add_generation_prompt is None
        and request.continue_final_message is None
        and request.add_special_tokens is None
    )


class TextPrompts:
    """Makes prompts of texts."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    async def prompt(self, request: TextRequest) -> TokenPrompt:
        """The prompt of a request that gives text.  Raises RequestError."""
        salt = salt_of(request.cache_salt)
        tokens, items = await self._texts.tokenized(request.model, text_of(request))
        return TokenPrompt(tokens, lora=request.lora, cache_salt=salt, multimodal=items)


_OTHERS: Final = ("tokens", "tokens_b64", "keys", "keys_b64", "prompt_tokens", "multimodal")
_OF_CHATS: Final = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


def text_of(request: TextRequest) -> Given:
    """The text of a request.  Raises RequestError."""
    if (request.prompt is None) == (request.messages is None) or _given(request, _OTHERS):
        raise _unclear(
            "the prompt is missing or given twice",
            "give exactly one of prompt, messages, tokens and keys; a text brings its images with it",
        )
    if request.prompt is not None:
        if misplaced := _given(request, _OF_CHATS):
            raise _unclear(f"{misplaced[0]} belongs to messages", "leave it away")
        return Completion(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    goes_on = request.continue_final_message or False
    if goes_on and request.add_generation_prompt:
        raise _unclear("the final message goes on, and the model speaks next", "give one of the two")
    return Chat(
        request.messages or [],
        request.tools,
        request.chat_template_kwargs,
        not goes_on if request.add_generation_prompt is None else request.add_generation_prompt,
        goes_on,
        request.add_special_tokens or False,
    )


def _given(request: TextRequest, fields: tuple[str, ...]) -> list[str]:
    return [field for field in fields if getattr(request, field, None) is not None]


def _unclear(message: str, hint: str) -> RequestError:
    return RequestError("invalid_request", message, hint, status=422)
