"""The process: where it listens, what it logs, how it ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from kvindexer.settings.values import MAX_SECONDS, Name, Seconds, no_boolean

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class Serving(BaseModel):
    """The process."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0 is every address of the machine.",
    )
    port: Annotated[int, BeforeValidator(no_boolean)] = Field(
        default=8090,
        ge=0,
        le=65535,
        description="TCP port of the HTTP service; with 0 the operating system chooses one.",
    )
    log_level: LogLevel = Field(default="info", description="The least important messages that are still logged.")
    replica: Name = Field(
        default="",
        description="Name of this replica, different from all others; without one, the host's name and a random "
        "suffix.",
    )
    shutdown_grace_s: Seconds = Field(
        default=5.0,
        description="Seconds that open requests get to end at a stop; then they are cut off.",
    )
    drain_s: Annotated[float, BeforeValidator(no_boolean)] = Field(
        default=3.0,
        ge=0,
        le=MAX_SECONDS,
        allow_inf_nan=False,
        description=(
            "Seconds after SIGTERM in which /ready is 503 and queries are still answered, so that load balancers "
            "turn elsewhere first; 0: none."
        ),
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value
