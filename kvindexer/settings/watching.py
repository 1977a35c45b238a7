"""What operators see of the service from outside: its log lines and its traces."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from kvindexer.settings.values import Count, Seconds, no_boolean


class Watching(BaseModel):
    """Logs and traces."""

    log_format: Literal["text", "json"] = Field(
        default="text",
        description="`json` writes each record as one line of JSON, for collectors of logs "
        "([observability](observability.md)).",
    )
    log_requests: Literal["problems", "all"] = Field(
        default="problems",
        description="Which requests get a line of their own: those that were slow or could not be answered, or all; "
        "with log_level debug it is all.",
    )
    slow_request_s: Seconds = Field(
        default=1.0,
        description="Seconds from which on a request counts as slow in the log.",
    )
    otlp_endpoint: str = Field(
        default="",
        max_length=2048,
        description="Collector of OpenTelemetry traces, as `http://collector:4318`; needs the extra "
        "`kvindexer[otel]`. Without it there are no traces.",
    )
    otlp_sample_ratio: Annotated[float, BeforeValidator(no_boolean)] = Field(
        default=0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of requests and writes to the store that are traced; callers who send a `traceparent` "
        "decide for their requests.",
    )
    otlp_timeout_s: Seconds = Field(
        default=5.0,
        description="Seconds that the collector may take for a batch of spans; also the longest that the end of the "
        "service waits for the last ones.",
    )
    otlp_max_spans: Count = Field(
        default=4096,
        description="Most spans that wait for the collector; past it the oldest are dropped.",
    )

    @field_validator("log_format", "log_requests", mode="before")
    @classmethod
    def _in_any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            url = urlsplit(value)
            usable = not value or (url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0)
        except ValueError:
            usable = False
        if not usable or "@" in value:
            raise ValueError("http://HOST:PORT of a collector, without user and password")
        return value
