"""POST /v1/explain: why does each instance match as far as it does, and what can be done about it.

body, as for /v1/match ─► Matcher.asked, prompt ─► matches ─► situations (`api.situations`) ─► reasons (`api.reasons`)
      what /v1/match refuses as not known ─► the reason, with near spellings

A question for people, not for each request: explanations wait for each other, and let others have their turn.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kvindexer.api.decoding import check_size, reader
from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Call
from kvindexer.api.lookup import find, tenant_named
from kvindexer.api.matching import Asked, Matcher
from kvindexer.api.near import near
from kvindexer.api.openapi import HotRoute
from kvindexer.api.prompt import Prompt
from kvindexer.api.reading import prompt_of
from kvindexer.api.reasons import ALSO, ASKED, STOPS, UNKNOWN, Reason, Situation, why
from kvindexer.api.schemas import AmbiguousCandidates, MatchRequest
from kvindexer.api.situations import Best, Family, Situations, best, family
from kvindexer.api.text import TextPrompts, has_text
from kvindexer.errors import RequestError
from kvindexer.events.listing import is_listing
from kvindexer.index.seam import Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.types import Keyspace

MOST_EXPLAINED: Final = 256
"""Instances in one answer."""

MOST_COMPARED: Final = 16
"""Unknown candidates for which near spellings are looked for."""

_NOT_KNOWN: Final = ("unknown_model", "unknown_salt", "unknown_block_size")

Advice = Annotated[str, Meta(description="One sentence: what it means, and what to do.")]
Names = list[str]


class MissingBlock(msgspec.Struct, gc=False):
    """The first block of the prompt that the instance does not hold."""

    block: Annotated[int, Meta(description="Its number, from 0.")]
    key: Annotated[int, Meta(description="Its key, an unsigned 64-bit integer.")]
    held_by: Annotated[Names, Meta(description="Instances and stores that hold it, the first few.")]


class Explained(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One instance: how much of the prompt its best rank has, and why not more."""

    instance: str
    candidate: Annotated[str, Meta(description="The instance as `candidates` spells it.")] | UnsetType = UNSET
    block_size: int
    rank: Annotated[int, Meta(description="The best rank, if any holds something.")] | UnsetType = UNSET
    blocks: Annotated[int, Meta(description="Full blocks of the prompt.")]
    held_blocks: Annotated[int, Meta(description="Leading blocks that are held.")]
    matched_blocks: Annotated[int, Meta(description="Those of them that the engine can reuse.")]
    matched_tokens: int
    cached_tokens: Annotated[int, Meta(description="What the engine will report as cached.")]
    missing: MissingBlock | UnsetType = UNSET
    reason: Annotated[
        str,
        Meta(
            description="Why the match ends where it does.",
            extra_json_schema={"enum": [row.reason for row in STOPS]},
        ),
    ]
    advice: Advice
    also: Annotated[
        list[Reason],
        Meta(
            description="What else may have to do with it; reasons: " + ", ".join(row.reason for row in ALSO) + ".",
        ),
    ]
    state: str
    sound: bool
    complete: bool
    lag_ms: float


class UnknownCandidate(msgspec.Struct, omit_defaults=True):
    """A candidate that is no instance of the model."""

    candidate: str
    reason: Annotated[str, Meta(extra_json_schema={"enum": list(UNKNOWN)})]
    advice: Advice
    near: Annotated[Names, Meta(description="Names of instances that are spelled nearly like it.")] = []
    other_models: Annotated[Names, Meta(description="Models that an instance of this name serves.")] = []


class ExplainAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why there is no match at all, if so, and each instance, best first."""

    model: str
    blocks: int | UnsetType = UNSET
    tokens: int | UnsetType = UNSET
    reason: (
        Annotated[str, Meta(description="Why there is no match at all.", extra_json_schema={"enum": list(ASKED)})]
        | UnsetType
    ) = UNSET
    advice: Advice | UnsetType = UNSET
    near_models: Annotated[Names, Meta(description="Models of the tenant that are spelled nearly like it.")] = []
    block_sizes: Annotated[
        list[int], Meta(description="Block sizes of the model, if the one asked for is none.")
    ] = []
    instances: list[Explained]
    left_out: Annotated[int, Meta(description="Instances that are not shown, the worst ones.")] = 0
    unknown_candidates: list[UnknownCandidate] = []
    ambiguous_candidates: AmbiguousCandidates = {}


ROUTE: Final = HotRoute(
    "/v1/explain",
    "Why does each instance match as far as it does?",
    "Takes what /v1/match takes, and says of every instance, or of every candidate, how much it holds, the first "
    f"block that is missing, the reason, and what to do; {MOST_EXPLAINED} instances at most, the best ones.  What "
    "/v1/match refuses with 404 is explained here.  Other tenants and other salts are never looked at.",
    "Queries",
    MatchRequest,
    (ExplainAnswer,),
    msgpack=True,
)
_read: Final = {form: reader(MatchRequest, form) for form in FORMS}


class ExplainRoute:
    """The route, as a function of the call."""

    def __init__(
        self,
        settings: Settings,
        index: Index,
        fleet: Fleet,
        *,
        matcher: Matcher,
        texts: TextPrompts,
    ) -> None:
        self._settings = settings
        self._index = index
        self._fleet = fleet
        self._matcher = matcher
        self._texts = texts
        self._turn = asyncio.Lock()

    async def __call__(self, call: Call) -> bytes:
        """Answer one request.  Raises RequestError."""
        check_size(call.body, self._settings.max_prompt_tokens, self._settings.max_candidates, form=call.form)
        request = _read[call.form](call.body)
        tokens = None
        if has_text(request):
            first = self._asked(request, call)
            if isinstance(first, RequestError):
                return call.answer.encode(self._not_known(request, first))
            tokens = await self._texts.prompt(request)
        async with self._turn:
            asked = self._asked(request, call)
            if isinstance(asked, RequestError):
                return call.answer.encode(self._not_known(request, asked))
            prompt = tokens or prompt_of(request, asked.spaces, self._settings.max_prompt_tokens)
            return call.answer.encode(await self._explained(request, asked, prompt))

    def _asked(self, request: MatchRequest, call: Call) -> Asked | RequestError:
        """What is asked for, or what is not known of it.  Raises RequestError for everything else."""
        try:
            return self._matcher.asked(request, call.answer)
        except RequestError as error:
            if error.code not in _NOT_KNOWN:
                raise
            return error

    # No such model, salt or block size

    def _not_known(self, request: MatchRequest, error: RequestError) -> ExplainAnswer:
        tenant = tenant_named(request.tenant)
        reason, models, sizes = error.code, [], []
        if reason == "unknown_model":
            known = family(self._fleet, tenant, request.model, request.additional_salt)
            if any(is_listing(report.source) for report in known.reports):
                reason = "not_listed"
            else:
                models = near(request.model, {spec.model for spec in self._fleet.specs() if spec.tenant == tenant})
        if reason == "unknown_block_size":
            spaces = self._matcher.keyspaces(tenant, request.model, request.additional_salt, None)
            sizes = sorted({space.block_size for space in spaces})
        return ExplainAnswer(
            model=request.model,
            reason=reason,
            advice=ASKED[reason],
            near_models=models,
            block_sizes=sizes,
            instances=[],
        )

    # Instances

    async def _explained(self, request: MatchRequest, asked: Asked, prompt: Prompt) -> ExplainAnswer:
        tenant = tenant_named(request.tenant)
        known = family(self._fleet, tenant, request.model, request.additional_salt)
        every = self._matcher.keyspaces(tenant, request.model, request.additional_salt, None)
        situations = Situations(self._index, known, prompt)
        wanted = None if asked.candidates is None else asked.candidates.spelled
        situations.look_at_sizes([space for space in every if space not in asked.spaces], wanted)
        for lora in known.loras(request.lora):
            await asyncio.sleep(0)
            situations.look_at_lora(lora, asked.spaces, wanted)
        unknown = await self._unknown(request, asked, known, every)
        # from here to the next pause all is of one moment: what is missing and who holds it must fit
        sizes = _sizes(self._matcher, asked, known)
        found = find(self._index, asked.spaces, prompt, wanted)
        holding = best(found)
        all_of_them = [holding.get(name) or Best(name, space, None) for name, space in sizes.items()]
        all_of_them.sort(key=lambda one: (*(-tokens for tokens in one.tokens), one.instance))
        shown = all_of_them[: min(request.top_k or MOST_EXPLAINED, MOST_EXPLAINED)]
        required, size = asked.ranking.required, min(space.block_size for space in asked.spaces)
        now = []
        for one in shown:
            status = self._fleet.status(one.instance)
            now.append(situations.of(one, status, meets=required is None or required.met_by(status)))
        tokens = prompt.tokens(size)
        answer = ExplainAnswer(
            model=request.model,
            blocks=tokens // size,
            tokens=tokens,
            instances=[],
            left_out=len(all_of_them) - len(shown),
            unknown_candidates=unknown,
            ambiguous_candidates={} if asked.candidates is None else asked.candidates.ambiguous,
        )
        if not any(it.usable for it in now if it.meets):
            answer.reason = self._matcher.reason(asked, found, blocks=tokens // size)
            answer.advice = ASKED[answer.reason]
        for one, situation in zip(shown, now, strict=True):
            await asyncio.sleep(0)
            answer.instances.append(_explained(one, situations.remembered(one, situation), prompt, asked))
        return answer

    # Candidates

    async def _unknown(
        self, request: MatchRequest, asked: Asked, known: Family, every: list[Keyspace]
    ) -> list[UnknownCandidate]:
        """Unknown candidates, each with what may be wrong with it."""
        unknown = [] if asked.candidates is None else asked.candidates.unknown
        if not unknown:
            return []
        other_sizes, _ = self._matcher.candidates(request, unknown, every)
        of_other_size = set(unknown).difference(other_sizes.unknown)
        stores = {spec.instance for spec in known.stores.values()}
        models = self._other_models(request)
        names = dict.fromkeys(
            name
            for reports in known.of_instance.values()
            for report in reports
            for name in (report.spec.instance, *report.spec.aliases)
        )
        told = []
        for number, name in enumerate(unknown):
            if name in of_other_size:
                reason = "other_block_size"
            elif name in stores:
                reason = "store"
            else:
                reason = "other_model" if name in models else "not_registered"
            alike: Names = []
            if number < MOST_COMPARED and reason == "not_registered":
                await asyncio.sleep(0)
                alike = near(name, names)
            told.append(UnknownCandidate(name, reason, UNKNOWN[reason], alike, sorted(models.get(name, ()))))
        return told

    def _other_models(self, request: MatchRequest) -> dict[str, set[str]]:
        """Names of instances of the tenant's other models."""
        models: dict[str, set[str]] = {}
        for spec in self._fleet.specs():
            if (
                spec.tenant == tenant_named(request.tenant)
                and spec.model != request.model
                and request.additional_salt in (None, spec.additional_salt)
                and not is_store(spec)
            ):
                for name in (spec.instance, *spec.aliases):
                    models.setdefault(name, set()).add(spec.model)
        return models


def _sizes(matcher: Matcher, asked: Asked, known: Family) -> dict[str, Keyspace]:
    """The instances that are asked about, each with the keyspace that its blocks are in, as far as known.

    That of its events, if they have named another size than the registered one.
    """
    chosen: dict[str, Keyspace] = {}
    for space in asked.spaces:
        for name in matcher.instances(space):
            if asked.candidates is not None and name not in asked.known:
                continue
            registered = any(report.spec.block_size == space.block_size for report in known.of_instance.get(name, ()))
            if name not in chosen or not registered:
                chosen[name] = space
    return chosen


def _explained(one: Best, situation: Situation, prompt: Prompt, asked: Asked) -> Explained:
    size = one.space.block_size
    stop, also = why(situation)
    missing: MissingBlock | UnsetType = UNSET
    if situation.held < situation.blocks:
        missing = MissingBlock(situation.held, prompt.keys(size)[situation.held], list(situation.others))
    return Explained(
        instance=one.instance,
        candidate=UNSET if asked.candidates is None else asked.candidates.spelled[one.instance],
        block_size=size,
        rank=UNSET if situation.rank is None else situation.rank,
        blocks=situation.blocks,
        held_blocks=situation.held,
        matched_blocks=situation.usable,
        matched_tokens=situation.usable * size,
        cached_tokens=situation.cached * size,
        missing=missing,
        reason=stop.reason,
        advice=stop.advice,
        also=also,
        state=situation.state,
        sound=situation.sound,
        complete=situation.complete,
        lag_ms=situation.lag_ms,
    )
