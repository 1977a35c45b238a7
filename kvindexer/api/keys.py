"""POST /v1/keys: the block keys of a prompt, once, for callers that ask about it often.

body ─► KeysRequest ─► the model's block size ─► tokens, extras ─► keys
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.lookup import one_size
from kvindexer.api.matching import Matcher
from kvindexer.api.prompt import TokenPrompt
from kvindexer.api.reading import packed_keys, tokens_of
from kvindexer.api.schemas import KeysAnswer, KeysRequest
from kvindexer.api.text import TextPrompts, has_text
from kvindexer.settings import Settings

_read: Final = {form: reader(KeysRequest, form) for form in FORMS}


class KeysRoute:
    """The route, as a function of the call."""

    def __init__(self, settings: Settings, matcher: Matcher, texts: TextPrompts) -> None:
        self._matcher = matcher
        self._texts = texts
        self._max_prompt_tokens = settings.max_prompt_tokens

    def __call__(self, call: Call) -> bytes | Awaitable[bytes]:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        request = _read[call.form](call.body)
        size = self._size(request)
        if has_text(request):
            return self._of_text(call, request)
        return self._answer(call, request.model, size, tokens_of(request, self._max_prompt_tokens))

    def _size(self, request: KeysRequest) -> int:
        spaces = self._matcher.keyspaces(request.tenant, request.model, request.additional_salt, request.block_size)
        return one_size(spaces, "keys")

    async def _of_text(self, call: Call, request: KeysRequest) -> bytes:
        prompt = await self._texts.prompt(request)
        return self._answer(call, request.model, self._size(request), prompt)

    def _answer(self, call: Call, model: str, size: int, prompt: TokenPrompt) -> bytes:
        keys = prompt.keys(size)
        answer = KeysAnswer(model, size, prompt.tokens(size), keys, packed_keys(keys))
        return call.answer.encode(answer)
