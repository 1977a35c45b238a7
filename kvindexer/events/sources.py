"""Which sources exist: registered at start, by flag or file, and later over HTTP.

The identity of a source is the endpoint that we dial; nothing that a message says can change it.  Registering the
same thing again is fine, something that contradicts it is refused until the old one is unregistered.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from fnmatch import fnmatchcase
from typing import Final

from kvindexer.errors import ConflictError, RequestError, TooLargeError
from kvindexer.types import SourceSpec, SourceType

_PRIVATE: Final = "additional_salt"
_Holder = tuple[str, str, str, int, SourceType]


class Registry:
    """The registered sources, by identity."""

    def __init__(
        self,
        allowed_endpoints: tuple[str, ...] = ("tcp://*",),
        max_sources: int = 4096,
        bind_endpoints: tuple[str, ...] = (),
    ) -> None:
        self._allowed = allowed_endpoints
        self._bound = bind_endpoints
        self._max_sources = max_sources
        self._specs: dict[str, SourceSpec] = {}
        self._holders: dict[_Holder, SourceSpec] = {}
        """The same, by what only one publisher can speak for."""
        self.generation = 0
        """Grows with every source that comes or goes."""

    def __contains__(self, source: str) -> bool:
        return source in self._specs

    def __iter__(self) -> Iterator[tuple[str, SourceSpec]]:
        return iter(self._specs.items())

    def __len__(self) -> int:
        return len(self._specs)

    def register(self, spec: SourceSpec) -> str | None:
        """Add a source; returns its identity, or None if just this is registered already.

        Raises ConflictError, TooLargeError, or RequestError for an endpoint that may not be dialled.
        """
        source = self.identity(spec)
        for endpoint in (spec.endpoint, spec.replay):
            if endpoint is not None and endpoint not in self._bound:
                self.check_endpoint(endpoint)
        known = self._specs.get(source)
        if known == spec:
            return None
        if known is not None:
            raise ConflictError(
                f"endpoint {source} is registered with other values: {_differences(known, spec)}",
                f"unregister instance {known.instance!r} first if they changed",
            )
        other = self._holders.get(_holder(spec))
        if other is not None:
            raise ConflictError(
                f"instance {spec.instance!r} rank {spec.rank} of {spec.model!r} publishes at {other.endpoint}",
                "unregister it first, or give this publisher its own instance or rank",
            )
        if len(self._specs) >= self._max_sources:
            raise TooLargeError("registered sources", len(self._specs) + 1, self._max_sources, "max_sources")
        self._specs[source] = self._holders[_holder(spec)] = spec
        self.generation += 1
        return source

    def unregister(
        self,
        instance: str,
        *,
        model: str | None = None,
        tenant: str | None = None,
        rank: int | None = None,
        source_type: SourceType | None = None,
        but: Container[str] = (),
    ) -> list[tuple[str, SourceSpec]]:
        """Remove an instance's sources, all or those of one model, tenant, rank or type; returns what was removed."""
        chosen = [
            (source, spec)
            for source, spec in self._specs.items()
            if spec.instance == instance
            and source not in but
            and model in (None, spec.model)
            and tenant in (None, spec.tenant)
            and rank in (None, spec.rank)
            and source_type in (None, spec.type)
        ]
        for source, _ in chosen:
            self.remove(source)
        return chosen

    def remove(self, source: str) -> SourceSpec | None:
        """Remove one source; returns what it was registered as."""
        self.generation += 1
        spec = self._specs.pop(source, None)
        if spec is not None:
            del self._holders[_holder(spec)]
        return spec

    def identity(self, spec: SourceSpec) -> str:
        """What we dial; of a publisher that dials us the topic and rank too, for nothing else tells it apart."""
        if spec.endpoint not in self._bound:
            return spec.endpoint
        if not spec.topic:
            raise RequestError(
                "topic_needed",
                f"publishers that dial in to {spec.endpoint} are told apart by their topics",
                "give the topic that the engine publishes under",
            )
        return f"{spec.endpoint}#{spec.topic}#{spec.rank}"

    def check_endpoint(self, endpoint: str) -> None:
        """Raise RequestError for an endpoint that may not, or can't, be dialled."""
        if not any(fnmatchcase(endpoint, pattern) for pattern in self._allowed):
            raise RequestError(
                "endpoint_not_allowed",
                f"endpoint {endpoint!r} may not be dialled",
                f"allowed are {', '.join(self._allowed)} (setting allowed_endpoints)",
            )
        host, _, port = endpoint.partition("://")[2].rpartition(":")
        if endpoint.startswith("tcp://") and not (
            host and host != "*" and port.isdecimal() and 0 < int(port) < 2**16
        ):
            raise RequestError(
                "bad_endpoint",
                f"endpoint {endpoint!r} can't be dialled",
                "give the address and port that the engine can be reached at, like tcp://10.0.0.7:5557",
            )


def _holder(spec: SourceSpec) -> _Holder:
    return spec.tenant, spec.model, spec.instance, spec.rank, spec.type


def _differences(known: SourceSpec, new: SourceSpec) -> str:
    """What differs, without the salt of a deployment, which is nobody else's business."""
    names = [name for name in SourceSpec.__slots__ if getattr(known, name) != getattr(new, name)]
    shown = (f"{name} is {getattr(known, name)!r}, not {getattr(new, name)!r}" for name in names if name != _PRIVATE)
    return ", ".join([*shown, *(["the additional salt is another"] if _PRIVATE in names else [])])
