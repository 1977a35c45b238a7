"""Sources that nobody names: found where the engines run."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from kvindexer.errors import SettingsError
from kvindexer.events.discovery.selectors import parse_selector
from kvindexer.settings.values import Count, Seconds, from_text, no_boolean

Discovery = Literal["none", "kubernetes"]
Port = Annotated[int, BeforeValidator(no_boolean), Field(gt=0, le=65535)]

_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_POOL: Final = re.compile(rf"({_NAMESPACE.pattern}/)?[a-z0-9]([-.a-z0-9]{{0,251}}[a-z0-9])?")


class Discovering(BaseModel):
    """Discovery."""

    discovery: Discovery = Field(
        default="none",
        description="`kubernetes` follows the pods of engines as they come and go ([discovery](discovery.md)); it "
        "needs the extra `kvindexer[kubernetes]`.",
    )
    discovery_namespaces: Annotated[tuple[str, ...], BeforeValidator(from_text)] = Field(
        default=(),
        description="Namespaces in which pods are looked for; none: the one that kvindexer runs in.",
    )
    discovery_selector: str = Field(
        default="llm-d.ai/inference-serving=true",
        max_length=4096,
        description="Label selector of the engines' pods, as kubectl takes it; empty: only those of discovery_pools.",
    )
    discovery_pools: Annotated[tuple[str, ...], BeforeValidator(from_text)] = Field(
        default=(),
        description="InferencePools whose pods are followed too, as `name` or `namespace/name`; a bare name is "
        "looked for in each of the namespaces.",
    )
    discovery_event_port: Port | None = Field(
        default=None,
        description="Port at which the first rank of a pod publishes its events, unless the pod says otherwise; "
        "empty: the engine is asked (`GET /kv_event_sources`), and one that has no such list publishes at 5557.",
    )
    discovery_replay_port: Port | None = Field(
        default=None,
        description="Port of the first rank's replay socket, unless the pod says otherwise; without one, losses can "
        "be seen but not repaired.",
    )
    discovery_http_port: Port = Field(
        default=8000,
        description="Port of an engine's HTTP server, unless the pod or its InferencePool says otherwise: part of "
        "its name, and asked for its model.",
    )
    discovery_model: str = Field(
        default="",
        max_length=1024,
        description="Model that the pods serve, unless their annotation says otherwise; empty: the engine is asked "
        "(`GET /v1/models`).",
    )
    discovery_tenant: str = Field(
        default="default",
        min_length=1,
        max_length=1024,
        description="Tenant of the pods' blocks, unless their annotation says otherwise.",
    )
    discovery_block_size: Count = Field(
        default=16,
        description="Tokens a block of the pods' engines, unless their annotation says otherwise; what events say "
        "wins over both.",
    )
    discovery_kubeconfig: str = Field(
        default="",
        description="A kubeconfig file for the way to the API server; empty: the pod's own service account.",
    )
    discovery_watch_s: Seconds = Field(
        default=290.0,
        description="Longest that one watch of the API server stays open before the next one takes over.",
    )
    discovery_timeout_s: Seconds = Field(
        default=10.0,
        description="Longest that the API server, or an engine that is asked for its model, may take for an answer.",
    )
    discovery_retry_max_s: Seconds = Field(
        default=30.0,
        description="Longest pause, jitter apart, before the API server is asked again after a failure.",
    )
    discovery_max_pods: Count = Field(
        default=4096,
        description="Most pods that are looked at; past it the rest is left out, and said so.",
    )

    @field_validator("discovery_event_port", "discovery_replay_port", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _names_can_be(self) -> Self:
        for index, namespace in enumerate(self.discovery_namespaces):
            if not _NAMESPACE.fullmatch(namespace):
                raise SettingsError(f"discovery_namespaces[{index}]", namespace, "the name of a namespace")
        for index, pool in enumerate(self.discovery_pools):
            if not _POOL.fullmatch(pool):
                raise SettingsError(f"discovery_pools[{index}]", pool, "name or namespace/name of an InferencePool")
        try:
            parse_selector(self.discovery_selector)
        except ValueError as error:
            raise SettingsError("discovery_selector", self.discovery_selector, str(error)) from None
        if self.discovery != "none" and not self.discovery_selector.strip() and not self.discovery_pools:
            expected = "a label selector, or discovery_pools"
            raise SettingsError("discovery_selector", self.discovery_selector, expected)
        if self.discovery_replay_port is not None and self.discovery_replay_port == self.discovery_event_port:
            raise SettingsError(
                "discovery_replay_port", self.discovery_replay_port, "another port than discovery_event_port"
            )
        return self
