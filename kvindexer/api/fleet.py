"""What the HTTP API needs to know of the sources, and may do to them.  `service` implements it.

Calls never block and never wait; all of them come from the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvindexer.events.finding import FindingFigures
from kvindexer.events.keeping import Stored, StoreFigures, StoreProblem
from kvindexer.events.status import InstanceStatus, SourceReport
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.feedback import Report
from kvindexer.types import SourceSpec, SourceType


class Fleet(Protocol):
    """All sources, registered at start or over HTTP."""

    @property
    def ready(self) -> bool:
        """Whether every source known at start is in sync, or has had its time; once true, true until we leave."""

    @property
    def leaving(self) -> bool:
        """Whether the process was told to end."""

    @property
    def changes(self) -> ChangeLog:
        """What has changed of late."""

    @property
    def generation(self) -> int:
        """Grows whenever `specs` changes; cheap."""

    def specs(self) -> Sequence[SourceSpec]:
        """What is registered: sources, and the HTTP addresses of engines that list theirs."""

    def sources(self) -> Mapping[str, SourceSpec]:
        """The publishers that are followed, by identity; not cheap, `generation` says when to ask again."""

    def register(self, spec: SourceSpec) -> bool:
        """Follow a source; False if just this is registered already.  Raises RequestError or ConflictError."""

    def unregister(
        self,
        instance: str,
        *,
        model: str | None = None,
        tenant: str | None = None,
        rank: int | None = None,
        source_type: SourceType | None = None,
    ) -> list[SourceSpec]:
        """Forget an instance's sources, those that fit what is given; returns what was registered."""

    def status(self, instance: str) -> InstanceStatus:
        """Worst of what is known of the instance's sources; cheap, it is asked for each instance of an answer."""

    def feedback(
        self,
        instance: str,
        predicted_tokens: int,
        cached_tokens: int,
        *,
        tenant: str,
        model: str | None = None,
        rank: int | None = None,
    ) -> Sequence[Report]:
        """What an engine reported against what was predicted; one report for each source that it is about."""

    def each_status(self, instances: Sequence[str]) -> list[InstanceStatus]:
        """The status of each of these; the same object for as long as nothing changes."""

    def reports(self) -> list[SourceReport]:
        """One report a source."""

    def problems(self) -> Sequence[StoreProblem]:
        """What is wrong with the durable copy of the index; nothing of it touches the answers."""

    def store(self) -> StoreFigures:
        """How the durable copy is doing."""

    def finding(self) -> FindingFigures:
        """How the search for sources is doing."""


__all__ = ["FindingFigures", "Fleet", "InstanceStatus", "SourceReport", "StoreFigures", "StoreProblem", "Stored"]
