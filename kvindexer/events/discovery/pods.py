"""Pods and InferencePools as the API server writes them, as far as they matter here.

Everything may be missing, for objects are written by many hands; what is not named here is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

MAX_TARGET_PORTS: Final = 64
"""More than InferencePools may have."""


class Metadata(msgspec.Struct):
    """Who an object is."""

    name: str = ""
    namespace: str | None = None
    uid: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creationTimestamp: str | None = None  # noqa: N815 - the API's name
    deletionTimestamp: str | None = None  # noqa: N815 - the API's name
    resourceVersion: str | None = None  # noqa: N815 - the API's name


class ContainerPort(msgspec.Struct):
    """A port that a container declares."""

    containerPort: int  # noqa: N815 - the API's name
    name: str | None = None


class Container(msgspec.Struct):
    """What a pod wants to run."""

    name: str
    ports: list[ContainerPort] | None = None


class Running(msgspec.Struct):
    """Since when a container runs."""

    startedAt: str | None = None  # noqa: N815 - the API's name


class ContainerState(msgspec.Struct):
    """What a container is doing; only that it runs matters."""

    running: Running | None = None


class ContainerStatus(msgspec.Struct):
    """How a container is."""

    name: str
    state: ContainerState | None = None
    containerID: str | None = None  # noqa: N815 - the API's name
    restartCount: int = 0  # noqa: N815 - the API's name


class PodSpec(msgspec.Struct):
    """What a pod wants to be."""

    containers: list[Container] | None = None


class PodStatus(msgspec.Struct):
    """How a pod is."""

    phase: str | None = None
    podIP: str | None = None  # noqa: N815 - the API's name
    containerStatuses: list[ContainerStatus] | None = None  # noqa: N815 - the API's name


class Pod(msgspec.Struct):
    """A pod, or a bookmark in the place of one."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: PodSpec | None = None
    status: PodStatus | None = None

    @property
    def uid(self) -> str:
        """Different for each pod that there ever was."""
        return self.metadata.uid or f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def where(self) -> str:
        """How people call it."""
        return f"{self.metadata.namespace or 'default'}/{self.metadata.name}"


class Pool(NamedTuple):
    """What an InferencePool says of its pods."""

    labels: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]


def read_pool(spec: object) -> Pool:
    """Raise ValueError for a pool without labels: an empty selector would mean every pod.

    v1: `selector.matchLabels`, `targetPorts[].number`; v1alpha2: `selector`, `targetPortNumber`.
    """
    if not isinstance(spec, Mapping):
        raise ValueError("it has no spec")  # noqa: TRY004 - one kind of error for what others have written
    selector = spec.get("selector")
    if isinstance(selector, Mapping) and isinstance(selector.get("matchLabels"), Mapping):
        selector = selector["matchLabels"]
    if not isinstance(selector, Mapping) or not selector:
        raise ValueError("it has no selector")
    if not all(isinstance(value, str) for pair in selector.items() for value in pair):
        raise ValueError("its selector is not a map of labels")
    listed: Any = spec.get("targetPorts") or [{"number": spec.get("targetPortNumber")}]
    numbers = [port.get("number") for port in listed if isinstance(port, Mapping)] if isinstance(listed, list) else []
    ports = tuple(number for number in numbers if isinstance(number, int) and 0 < number < 2**16)
    return Pool(tuple(sorted(selector.items())), ports[:MAX_TARGET_PORTS])
