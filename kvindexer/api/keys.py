"""POST /v1/keys: the block keys of a prompt, once, for callers that ask about it often.

body ─► KeysRequest ─► the model's block size ─► tokens, extras ─► keys
"""

from __future__ import annotations

from typing import Final

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.lookup import one_size
from kvindexer.api.matching import Matcher
from kvindexer.api.reading import packed_keys, tokens_of
from kvindexer.api.schemas import KeysAnswer, KeysRequest
from kvindexer.settings import Settings

_read: Final = {form: reader(KeysRequest, form) for form in FORMS}


class KeysRoute:
    """The route, as a function of the call."""

    def __init__(self, settings: Settings, matcher: Matcher) -> None:
        self._matcher = matcher
        self._max_prompt_tokens = settings.max_prompt_tokens

    def __call__(self, call: Call) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        request = _read[call.form](call.body)
        spaces = self._matcher.keyspaces(request.tenant, request.model, request.additional_salt, request.block_size)
        size = one_size(spaces, "keys")
        prompt = tokens_of(request, self._max_prompt_tokens)
        keys = prompt.keys(size)
        answer = KeysAnswer(request.model, size, prompt.tokens(size), keys, packed_keys(keys))
        return call.answer.encode(answer)
