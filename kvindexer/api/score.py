"""POST /score_completions and /score_chat_completions: {pod: score}, as the example service of llm-d answers.

A score is the weighted number of leading blocks that an instance holds and its engine can reuse: of each block the
weight of the nearest tier that it lies on (the setting `tier_weights`).  Instances that hold nothing are left out.
"""

from __future__ import annotations

from typing import Final

import msgspec

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.lookup import KnownModels, find, keyspaces, tenant_named
from kvindexer.api.metrics import Metrics
from kvindexer.api.schemas import MatchRequest, Name
from kvindexer.api.text import Messages, PromptText, TextPrompts, Tools
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.tiering.heat import HeatCounts
from kvindexer.tiering.weights import Weights, score
from kvindexer.types import Keyspace


class ScoreRequest(msgspec.Struct, kw_only=True):
    """A prompt as text; fields that are not known are passed over, as they are there."""

    model: Name
    prompt: PromptText


class ScoreChatRequest(msgspec.Struct, kw_only=True):
    """A conversation; fields that are not known are passed over."""

    model: Name
    messages: Messages
    tools: Tools | None = None


Scores = dict[str, float]
"""Instance -> score."""

_read: Final = {form: reader(ScoreRequest, form) for form in FORMS}
_read_chat: Final = {form: reader(ScoreChatRequest, form) for form in FORMS}


class ScoreRoutes:
    """Both routes."""

    def __init__(
        self,
        settings: Settings,
        index: Index,
        models: KnownModels,
        metrics: Metrics,
        texts: TextPrompts,
        *,
        heat: HeatCounts,
    ) -> None:
        self._index = index
        self._heat = heat
        self._models = models
        self._metrics = metrics
        self._texts = texts
        self._max_prompt_tokens = settings.max_prompt_tokens
        named = settings.tier_weights
        self._weights: Weights = (named["gpu"], named["cpu"], named["disk"], named["remote"])

    async def completions(self, call: Call) -> bytes:
        """POST /score_completions.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        request = _read[call.form](call.body)
        return await self._scores(call, MatchRequest(model=request.model, prompt=request.prompt))

    async def chats(self, call: Call) -> bytes:
        """POST /score_chat_completions.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        request = _read_chat[call.form](call.body)
        chat = MatchRequest(model=request.model, messages=request.messages, tools=request.tools)
        return await self._scores(call, chat)

    async def _scores(self, call: Call, request: MatchRequest) -> bytes:
        self._spaces(request.model)  # an unknown model is told before a tokenizer works for it
        prompt = await self._texts.prompt(request)
        spaces = self._spaces(request.model)
        for space in spaces:
            self._heat.asked(space, prompt.keys(space.block_size))
        best: dict[str, float] = {}
        longest = 0
        for space, matches in find(self._index, spaces, prompt, None):
            for match in matches:
                worth = score(match.cumulative, match.usable, self._weights)
                if match.usable and worth >= best.get(match.instance, 0.0):
                    best[match.instance] = worth
                longest = max(longest, match.usable * space.block_size)
        self._metrics.asked(longest, prompt.tokens(spaces[0].block_size))
        return call.answer.encode(best)

    def _spaces(self, model: str) -> list[Keyspace]:
        return keyspaces(self._index, self._models, tenant_named(None), model, additional_salt=None, block_size=None)
