"""POST /v1/routed: a prompt is on its way to an instance, which will hold its blocks before its events say so.

body ─► RoutedRequest ─► prompt ─► keys ─► Speculation, until the time is up or the events are here
"""

from __future__ import annotations

from collections.abc import Awaitable
from math import isnan
from time import monotonic
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.identities import Identities
from kvindexer.api.lookup import tenant_named
from kvindexer.api.matching import Matcher
from kvindexer.api.openapi import HotRoute
from kvindexer.api.prompt import Prompt
from kvindexer.api.reading import prompt_of
from kvindexer.api.schemas import Keys, Name, PackedKeys, Prompted, PromptTokens
from kvindexer.api.text import TextPrompts, has_text
from kvindexer.errors import RequestError
from kvindexer.settings import Settings
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace

MAX_TTL_S: Final = 60.0


class RoutedRequest(Prompted, kw_only=True):
    """A prompt, given as in /v1/match, and the instance that it was sent to."""

    instance: Annotated[Name, Meta(description="By id, alias, host, host:port or URL.")]
    ttl_s: (
        Annotated[
            float,
            Meta(gt=0, le=MAX_TTL_S, description="How long to wait for its events; default: `speculative_ttl_s`."),
        ]
        | None
    ) = None
    keys: Keys | None = None
    keys_b64: PackedKeys | None = None
    prompt_tokens: PromptTokens | None = None


class RoutedAnswer(msgspec.Struct):
    """What was noted."""

    model: str
    instance: Annotated[str, Meta(description="Its id.")]
    tokens: Annotated[int, Meta(description="Of the prompt, as far as known.")]
    speculative_tokens: Annotated[int, Meta(description="Leading tokens of it that count as held soon.")]
    ttl_s: float


ROUTE: Final = HotRoute(
    "/v1/routed",
    "A prompt was routed to an instance",
    "Until the instance's events arrive, or `ttl_s` has passed, rows of /v1/match show in `speculative_tokens` how "
    "much of a prompt it will hold soon, so that prompts alike which come at once don't scatter.",
    "Queries",
    RoutedRequest,
    (RoutedAnswer,),
    msgpack=True,
)

_read: Final = {form: reader(RoutedRequest, form) for form in FORMS}


class RoutedRoute:
    """The route, as a function of the call."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        matcher: Matcher,
        texts: TextPrompts,
        speculation: Speculation,
    ) -> None:
        self._matcher = matcher
        self._texts = texts
        self._speculation = speculation
        self._identities = Identities(fleet, settings.bind_endpoints)
        self._max_prompt_tokens = settings.max_prompt_tokens
        self._ttl_s = settings.speculative_ttl_s

    def __call__(self, call: Call) -> bytes | Awaitable[bytes]:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._max_prompt_tokens, form=call.form, settings="max_prompt_tokens")
        request = _read[call.form](call.body)
        if request.ttl_s is not None and isnan(request.ttl_s):  # msgpack has NaN, JSON has not
            raise RequestError(
                "invalid_request", "ttl_s is no number", f"more than 0, up to {MAX_TTL_S:g}", status=422
            )
        instance, spaces = self._of_instance(request)
        if has_text(request):
            return self._of_text(call, request)
        return self._note(call, request, instance, spaces, prompt_of(request, spaces, self._max_prompt_tokens))

    async def _of_text(self, call: Call, request: RoutedRequest) -> bytes:
        """Wait for the tokens, then look at everything anew: sources may have come and gone meanwhile."""
        prompt = await self._texts.prompt(request)
        instance, spaces = self._of_instance(request)
        return self._note(call, request, instance, spaces, prompt)

    def _of_instance(self, request: RoutedRequest) -> tuple[str, list[Keyspace]]:
        """The instance that is meant, and the keyspaces that it serves.  Raises RequestError."""
        tenant = tenant_named(request.tenant)
        spaces = self._matcher.keyspaces(tenant, request.model, request.additional_salt, request.block_size)
        serving = {space: self._matcher.instances(space) for space in spaces}
        instances = {instance for those in serving.values() for instance in those}
        family = (tenant, request.model, request.additional_salt)
        meant = self._identities.resolve([request.instance], family, instances)
        if meant.ambiguous:
            could_be = ", ".join(next(iter(meant.ambiguous.values()))[:8])
            raise RequestError(
                "ambiguous_instance", "the name could be several instances", f"use an id: {could_be}", status=409
            )
        for instance in meant.spelled:
            return instance, [space for space, those in serving.items() if instance in those]
        raise RequestError(
            "unknown_instance",
            "the model has no such instance",
            "register it first, or see /v1/sources for those that are registered",
            status=404,
        )

    def _note(
        self, call: Call, request: RoutedRequest, instance: str, spaces: list[Keyspace], prompt: Prompt
    ) -> bytes:
        now = monotonic()
        self._speculation.expire(now)
        ttl_s = self._ttl_s if request.ttl_s is None else request.ttl_s
        noted = 0
        for space in spaces:
            blocks = self._speculation.add(space, instance, prompt.keys(space.block_size), now + ttl_s)
            noted = max(noted, blocks * space.block_size)
        tokens = prompt.tokens(spaces[0].block_size)
        return call.answer.encode(RoutedAnswer(request.model, instance, tokens, noted, ttl_s))
