"""The service's routes as functions: what a caller says becomes a Call, whoever then sends it.

    match("m", Tokens([...]))  ─►  Call(POST /v1/match, msgpack, MatchAnswer)  ─►  Client.send or AsyncClient.send

Routes that take msgpack are spoken to in msgpack: tokens then travel as the bytes that they are packed in, which
takes less than half the time of base64 in JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack
from urllib.parse import urlencode

import msgspec

from kvindexer.client.answers import (
    BatchAnswer,
    FeedbackAnswer,
    KeysAnswer,
    LocateAnswer,
    MatchAnswer,
    PlanAnswer,
    PrefixesAnswer,
    PrewarmAnswer,
    Registered,
    RoutedAnswer,
    SingleAnswer,
    Unregistered,
)
from kvindexer.client.changes import Change
from kvindexer.client.prompts import Chat, Keys, Prompt, Text, Tokens
from kvindexer.client.reports import ExplainAnswer, HealthAnswer, ReadyAnswer, SourcesAnswer, TiersAnswer
from kvindexer.types import SourceSpec

T = TypeVar("T")

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
EVENTS: Final = "text/event-stream"

EngineHash = int | str | bytes
"""As the engine spells it; bytes are sent as hexadecimal digits."""


class Call(NamedTuple, Generic[T]):
    """One request, and what its answer is."""

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    form: str = JSON
    """Of the body, and of the answer."""
    good: frozenset[int] = frozenset({200, 201})
    """Statuses whose body is the answer."""
    repeatable: bool = True
    """To ask it twice does what asking once does."""
    headers: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"<Call: {self.method} {self.path}>"  # the body may hold a prompt


class Question(TypedDict, total=False):
    """Whose caches to look at, and which instances to list; as the fields of /v1/match."""

    tenant: str | None
    additional_salt: str | None
    block_size: int | None
    candidates: Iterable[str] | None
    require: Iterable[Literal["live", "sound", "complete"]] | None
    top_k: int | None
    weights: Mapping[str, float] | None
    order: Literal["cached_tokens", "score", "expected"]
    by_rank: bool


# Queries


def match(model: str, prompt: Prompt, **question: Unpack[Question]) -> Call[MatchAnswer]:
    """How long a prefix of the prompt does each instance hold, and how sure is that."""
    asked = {**_about(prompt), **_question(question)}
    return _post("/v1/match", MatchAnswer, model=model, **prompt.fields(), **asked)


def match_batch(model: str, prompts: Sequence[Tokens | Keys], **question: Unpack[Question]) -> Call[BatchAnswer]:
    """The same for many prompts; a prompt that can't be answered has an `error` of its own."""
    sizes = {prompt.block_size for prompt in prompts if isinstance(prompt, Keys) and prompt.block_size is not None}
    if len(sizes) > 1:
        raise ValueError("prompts: expected keys of one block size")
    asked = {"block_size": next(iter(sizes), None), **_question(question)}
    return _post(
        "/v1/match/batch", BatchAnswer, model=model, prompts=[_said(prompt.fields()) for prompt in prompts], **asked
    )


def keys(
    model: str,
    prompt: Tokens | Text | Chat,
    *,
    block_size: int | None = None,
    tenant: str | None = None,
    additional_salt: str | None = None,
) -> Call[KeysAnswer]:
    """The block keys of a prompt, for callers that ask about it often or have no tokenizer."""
    where = {"block_size": block_size, "tenant": tenant, "additional_salt": additional_salt}
    return _post("/v1/keys", KeysAnswer, model=model, **prompt.fields(), **where)


def explain(model: str, prompt: Prompt, **question: Unpack[Question]) -> Call[ExplainAnswer]:
    """Why does each instance match as far as it does; for people who look for a mistake, not for each request."""
    asked = {**_about(prompt), **_question(question)}
    return _post("/v1/explain", ExplainAnswer, model=model, **prompt.fields(), **asked)


def routed(
    model: str,
    instance: str,
    prompt: Prompt,
    *,
    ttl_s: float | None = None,
    tenant: str | None = None,
    additional_salt: str | None = None,
) -> Call[RoutedAnswer]:
    """Tell that the prompt is on its way to an instance, by any of its names."""
    about = {"ttl_s": ttl_s, "tenant": tenant, "additional_salt": additional_salt, **_about(prompt)}
    return _post("/v1/routed", RoutedAnswer, model=model, instance=instance, **prompt.fields(), **about)


def feedback(
    instance: str,
    predicted_tokens: int,
    cached_tokens: int,
    *,
    model: str | None = None,
    tenant: str | None = None,
    rank: int | None = None,
    request_id: str | None = None,
) -> Call[FeedbackAnswer]:
    """Tell what an engine, by its id, reported as cached, and what had been predicted."""
    call = _post(
        "/v1/feedback",
        FeedbackAnswer,
        instance=instance,
        predicted_tokens=predicted_tokens,
        cached_tokens=cached_tokens,
        model=model,
        tenant=tenant,
        rank=rank,
        request_id=request_id,
    )
    return call._replace(repeatable=request_id is not None)  # of equal ids the first one counts


# Blocks


def locate(
    model: str,
    *,
    keys: Iterable[int] | None = None,
    hashes: Iterable[EngineHash] | None = None,
    source: str | None = None,
    instance: str | None = None,
    near: str | None = None,
    block_size: int | None = None,
    tenant: str | None = None,
    additional_salt: str | None = None,
) -> Call[LocateAnswer]:
    """Who holds each block, nearest first: by `keys`, or by engine `hashes` of a `source` or an `instance`."""
    return _post(
        "/v1/blocks/locate",
        LocateAnswer,
        model=model,
        keys=None if keys is None else list(keys),
        hashes=None if hashes is None else [_hash(given) for given in hashes],
        source=source,
        instance=instance,
        near=near,
        block_size=block_size,
        tenant=tenant,
        additional_salt=additional_salt,
    )


def offload_plan(
    instance: str,
    tier: Literal["gpu", "cpu", "disk", "remote"],
    hashes: Iterable[EngineHash],
    *,
    model: str | None = None,
    tenant: str | None = None,
    additional_salt: str | None = None,
    rank: int | None = None,
    hot_from: float | None = None,
) -> Call[PlanAnswer]:
    """What would be lost if the instance freed these blocks on this tier."""
    return _post(
        "/v1/offload/plan",
        PlanAnswer,
        instance=instance,
        tier=tier,
        hashes=[_hash(given) for given in hashes],
        model=model,
        tenant=tenant,
        additional_salt=additional_salt,
        rank=rank,
        hot_from=hot_from,
    )


def changes(
    model: str, *, tenant: str | None = None, additional_salt: str | None = None, since: str | None = None
) -> Call[Change]:
    """What is stored and removed, as it happens: all that is there first, or what has changed `since` a position."""
    about = {"model": model, "tenant": tenant, "additional_salt": additional_salt}
    call: Call[Any] = _get("/v1/changes", object, **about)
    return call._replace(form=EVENTS, headers={} if since is None else {"last-event-id": since})


def tiers(*, tenant: str | None = None, model: str | None = None) -> Call[TiersAnswer]:
    """Blocks and bytes by tier, of each model, instance and store."""
    return _get("/v1/tiers", TiersAnswer, tenant=tenant, model=model)


# Heat


def heat_prefixes(
    model: str, *, tenant: str | None = None, additional_salt: str | None = None, top: int | None = None
) -> Call[PrefixesAnswer]:
    """The shared prefixes that are asked for most."""
    return _get("/v1/heat/prefixes", PrefixesAnswer, model=model, tenant=tenant, **_few(additional_salt, top))


def heat_single(
    model: str, *, tenant: str | None = None, additional_salt: str | None = None, top: int | None = None
) -> Call[SingleAnswer]:
    """Hot blocks that lie in one place only."""
    return _get("/v1/heat/single", SingleAnswer, model=model, tenant=tenant, **_few(additional_salt, top))


def heat_prewarm(
    model: str,
    instance: str,
    *,
    tenant: str | None = None,
    additional_salt: str | None = None,
    top: int | None = None,
) -> Call[PrewarmAnswer]:
    """What an instance should load first."""
    few = _few(additional_salt, top)
    return _get("/v1/heat/prewarm", PrewarmAnswer, model=model, instance=instance, tenant=tenant, **few)


# Operation


def sources(
    *, tenant: str | None = None, model: str | None = None, instance: str | None = None
) -> Call[SourcesAnswer]:
    """The state of all sources, or of those that fit."""
    return _get("/v1/sources", SourcesAnswer, tenant=tenant, model=model, instance=instance)


def health() -> Call[HealthAnswer]:
    """Is all well, and if not, what is wrong."""
    return _get("/health", HealthAnswer)


def ready() -> Call[ReadyAnswer]:
    """Whether to send queries there; that it is not ready is an answer, too."""
    return Call("GET", "/ready", ReadyAnswer, good=frozenset({200, 503}))


def register(source: SourceSpec) -> Call[Registered]:
    """Have a publisher followed; the same again is fine."""
    names = {
        "instance": "instance_id",
        "replay": "replay_endpoint",
        "rank": "dp_rank",
        "tenant": "tenant_id",
        "lora": "lora_name",
    }
    body = {names.get(name, name): value for name, value in asdict(source).items()}
    return Call("POST", "/register", Registered, msgspec.json.encode(_said(body)))


def unregister(
    instance: str,
    *,
    model: str | None = None,
    tenant: str | None = None,
    rank: int | None = None,
    type: str | None = None,  # noqa: A002 - the word of the contract
) -> Call[Unregistered]:
    """Have the publishers of an instance forgotten, or those of them that fit."""
    body = {"instance_id": instance, "model": model, "tenant_id": tenant, "dp_rank": rank, "type": type}
    return Call("POST", "/unregister", Unregistered, msgspec.json.encode(_said(body)), repeatable=False)


def _post(path: str, answer: type[T], **body: object) -> Call[T]:
    return Call("POST", path, answer, msgspec.msgpack.encode(_said(body)), MSGPACK)


def _get(path: str, answer: type[T], **parameters: object) -> Call[T]:
    said = urlencode(_said(parameters))
    return Call("GET", f"{path}?{said}" if said else path, answer)


def _said(fields: Mapping[str, object]) -> dict[str, object]:
    """Fields that say something: the service knows the defaults."""
    return {name: value for name, value in fields.items() if value is not None}


def _question(question: Question) -> dict[str, object]:
    return {
        name: list(value) if name in ("candidates", "require") and isinstance(value, Iterable) else value
        for name, value in _said(question).items()
    }


def _about(prompt: Prompt) -> dict[str, object]:
    """Keys were made for one block size."""
    return {"block_size": prompt.block_size} if isinstance(prompt, Keys) else {}


def _few(additional_salt: str | None, top: int | None) -> dict[str, object]:
    return {"additional_salt": additional_salt, "top": top}


def _hash(given: EngineHash) -> int | str:
    return given.hex() if isinstance(given, bytes) else given
