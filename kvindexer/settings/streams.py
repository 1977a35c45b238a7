"""Which publishers are followed, and how."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from kvindexer.errors import SettingsError
from kvindexer.hiding import short
from kvindexer.settings.source import check_source, parse_source, source_of
from kvindexer.settings.values import MIB, Bytes, Count, Seconds, from_text, no_boolean
from kvindexer.types import SourceSpec


class Streams(BaseModel):
    """Following sources."""

    sources: tuple[SourceSpec, ...] = Field(
        default=(),
        description="Publishers known from the start, each a map with the fields of a source (see below).",
    )
    allowed_endpoints: Annotated[tuple[str, ...], BeforeValidator(from_text)] = Field(
        default=("tcp://*", "http://*", "https://*"),
        description="Patterns (* and ?) of which an endpoint must match one to be dialled; an http address is asked "
        "for the publishers that the engine lists, or for tokens.",
    )
    bind_endpoints: Annotated[tuple[str, ...], BeforeValidator(from_text)] = Field(
        default=(),
        description="Endpoints to listen on for engines that dial in; their sources are told apart by topic and "
        "rank, which any peer can claim.",
    )
    max_message_bytes: Bytes = Field(
        default=64 * MIB,
        description="Largest message of a publisher in bytes; a larger one is dropped and counted.",
    )
    receive_hwm: Count = Field(
        default=32,
        description="Most messages that wait in a source's socket; past it they wait at the publisher, which drops "
        "what is beyond its own limit (seen as a gap).",
    )
    held_max_frames: Count = Field(
        default=10_000,
        description="Most messages of a source held behind a gap or a replay; past it the gap stays open.",
    )
    held_max_bytes: Bytes = Field(
        default=64 * MIB,
        description="Most bytes of a source held behind a gap or a replay; past it the gap stays open.",
    )
    replay_timeout_s: Seconds = Field(
        default=5.0,
        description="Seconds without a frame after which a replay counts as failed and is tried again later.",
    )
    replay_max_bytes: Bytes = Field(
        default=512 * MIB,
        description="Most bytes taken from one replay; past it the replay counts as failed.",
    )
    replay_retry_min_s: Seconds = Field(
        default=0.5,
        description="Seconds before the first new try of a failed replay; doubled with every further one.",
    )
    replay_retry_max_s: Seconds = Field(
        default=30.0,
        description="Seconds between tries of a failing replay, at most.",
    )
    max_concurrent_replays: Count = Field(
        default=8,
        description="Most replays under way at once; further ones wait for their turn.",
    )
    sync_deadline_s: Seconds = Field(
        default=20.0,
        description="Seconds that a source known at start may hold up /ready.",
    )
    probe_interval_s: Seconds = Field(
        default=5.0,
        description="Seconds of silence after which a source's replay socket is asked whether all is well.",
    )
    stale_after_s: Seconds = Field(
        default=15.0,
        description="Seconds without a sign of life after which a source is shown as stale.",
    )
    gone_after_s: Seconds = Field(
        default=300.0,
        description="Seconds without a sign of life after which a source leaves the answers.",
    )
    slice_ms: Annotated[float, BeforeValidator(no_boolean)] = Field(
        default=2.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Longest stretch of ingest in milliseconds before waiting queries get their turn.",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, value: object) -> object:
        listed = from_text(value)
        if not isinstance(listed, list | tuple):
            raise ValueError("a list of sources")  # noqa: TRY004 - pydantic reports ValueError
        return tuple(_source(item, f"sources[{place}]") for place, item in enumerate(listed))

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        for smaller, larger in (
            ("replay_retry_min_s", "replay_retry_max_s"),
            ("probe_interval_s", "stale_after_s"),
            ("stale_after_s", "gone_after_s"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                value = getattr(self, larger)
                raise SettingsError(larger, value, f"at least {smaller}, which is {getattr(self, smaller)}")
        return self

    @model_validator(mode="after")
    def _one_source_an_endpoint(self) -> Self:
        dialled: dict[str, SourceSpec] = {}
        for place, spec in enumerate(self.sources):
            key = f"sources[{place}].endpoint"
            if spec.endpoint in self.bind_endpoints:
                continue
            if not self.allows(spec.endpoint):
                raise SettingsError(key, spec.endpoint, f"a match of allowed_endpoints {self.allowed_endpoints}")
            if dialled.setdefault(spec.endpoint, spec) != spec:
                raise SettingsError(key, spec.endpoint, "one source an endpoint")
        return self

    def allows(self, endpoint: str) -> bool:
        """Whether the operator lets us dial this endpoint."""
        return any(fnmatchcase(endpoint, pattern) for pattern in self.allowed_endpoints)


def _source(item: object, key: str) -> SourceSpec:
    match item:
        case SourceSpec():
            check_source(item, key)
            return item
        case dict():
            return source_of(item, key)
        case str():
            return parse_source(item, key)
    raise SettingsError(key, short(item), "a map with the fields of a source")
