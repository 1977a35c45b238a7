"""POST /v1/match and /v1/match/batch: how long a prefix of a prompt does each instance hold, and how sure is that.

body ─► MatchRequest ─► Matcher.asked, prompt ─► Matcher.answer ─► MatchAnswer
        text in it? ─► tokens (wait) ─┘
body ─► BatchRequest ─► Matcher.asked, prompts ─► Matcher.answer for each ─► BatchAnswer

A batch does once what is the same for all of its prompts: names, candidates, HTTP; and the keys of beginnings that
prompts share.  Between prompts it lets others have their turn, so that a large batch delays nobody; each prompt's
result is of one moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from time import perf_counter
from typing import Final

from kvindexer.api.beginnings import Beginnings
from kvindexer.api.decoding import check_size, reader
from kvindexer.api.errors import ErrorDetail
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.matching import Asked, Matcher, named
from kvindexer.api.prompt import Prompt
from kvindexer.api.reading import prompt_of
from kvindexer.api.schemas import (
    BatchAnswer,
    BatchPrompt,
    BatchRequest,
    BatchResult,
    MatchAnswer,
    MatchRequest,
)
from kvindexer.api.text import TextPrompts, has_text
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.settings import Settings

_read: Final = {form: reader(MatchRequest, form) for form in FORMS}
_read_batch: Final = {form: reader(BatchRequest, form) for form in FORMS}
_read_prompt: Final = {form: reader(BatchPrompt, form) for form in FORMS}


class MatchRoutes:
    """Both routes."""

    def __init__(self, settings: Settings, matcher: Matcher, texts: TextPrompts) -> None:
        self._matcher = matcher
        self._texts = texts
        self._max_prompt_tokens = settings.max_prompt_tokens
        self._max_candidates = settings.max_candidates
        self._max_batch = settings.max_batch
        self._max_batch_tokens = settings.max_batch_tokens
        self._slice_s = settings.slice_ms / 1000

    def one(self, call: Call) -> bytes | Awaitable[bytes]:
        """POST /v1/match.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, self._max_candidates, form=call.form)
        request = _read[call.form](call.body)
        asked = self._matcher.asked(request, call.answer)
        if has_text(request):
            return self._of_text(call, request)
        return self._answer(call, asked, prompt_of(request, asked.spaces, self._max_prompt_tokens))

    async def _of_text(self, call: Call, request: MatchRequest) -> bytes:
        """Wait for the tokens, then look at everything anew: sources may have come and gone meanwhile."""
        prompt = await self._texts.prompt(request)
        return self._answer(call, self._matcher.asked(request, call.answer), prompt)

    def _answer(self, call: Call, asked: Asked, prompt: Prompt) -> bytes:
        blocks, tokens, matches, reason = self._matcher.answer(asked, prompt)
        answer = MatchAnswer(asked.model, blocks, tokens, matches, *named(asked.candidates), reason)
        return call.answer.encode(answer)

    async def batch(self, call: Call) -> bytes:
        """POST /v1/match/batch.  Raises RequestError for what is wrong with all of it."""
        check_size(
            call.body,
            self._max_batch_tokens,
            self._max_candidates,
            form=call.form,
            settings="max_batch_tokens or max_candidates",
        )
        request = _read_batch[call.form](call.body)
        if len(request.prompts) > self._max_batch:
            raise TooLargeError("prompts", len(request.prompts), self._max_batch, "max_batch")
        asked = self._matcher.asked(request, call.answer)
        size = asked.spaces[0].block_size
        results = []
        beginnings = Beginnings()
        tokens = 0
        since = perf_counter()
        for raw in request.prompts:
            if perf_counter() - since >= self._slice_s:
                await asyncio.sleep(0)
                since = perf_counter()
            try:
                prompt = self._prompt(call, bytes(raw), asked)
            except RequestError as error:
                results.append(BatchResult(error=ErrorDetail(error.code, error.message, error.hint)))
                continue
            beginnings.meet(prompt)
            tokens += prompt.tokens(size)
            if tokens > self._max_batch_tokens:
                raise TooLargeError("prompts in tokens", tokens, self._max_batch_tokens, "max_batch_tokens")
            results.append(BatchResult(*self._matcher.answer(asked, prompt)))
        return call.answer.encode(BatchAnswer(request.model, results, *named(asked.candidates)))

    def _prompt(self, call: Call, body: bytes, asked: Asked) -> Prompt:
        """One prompt of a batch.  Raises RequestError."""
        check_size(body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        return prompt_of(_read_prompt[call.form](body), asked.spaces, self._max_prompt_tokens)
