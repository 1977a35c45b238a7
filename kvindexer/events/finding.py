"""What a fleet gives to whoever finds sources by itself, and what it can ask of that.

    Finder (`discovery.finder`) ── find, lose ──► LiveFleet
    Finder ◄── informed, figures ─────────────── LiveFleet, for /ready, /health, /v1/sources and /metrics

`Nowhere` is the finder of a fleet whose sources are all named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvindexer.types import SourceSpec


class FindingProblem(NamedTuple):
    """Why something is not found, or not followed."""

    reason: str
    """A short fixed word."""
    where: str
    """The pod, pool or namespace that it is about."""
    message: str
    hint: str
    serious: bool = True
    """Whether somebody should look at it; otherwise it may be as it should be."""


class FindingFigures(NamedTuple):
    """How the search is doing; as it is here if there is none."""

    kind: str = "none"
    informed: bool = True
    pods: int = 0
    """That the selectors chose."""
    followed: int = 0
    """Of these, those with a source here."""
    waiting: int = 0
    """Of these, those whose engine has to say something first."""
    relists: int = 0
    """Lists read anew because a watch could not go on."""
    errors: Mapping[str, int] = MappingProxyType({})
    """Lists and watches that failed, by reason."""
    contact_s: float | None = None
    """Longest time since the API server said something of any list; None: it never has."""
    problems: Sequence[FindingProblem] = ()


class Findable(Protocol):
    """The fleet, as its finder sees it."""

    @property
    def found(self) -> Mapping[str, SourceSpec]:
        """What was found and is followed, by endpoint."""

    def find(self, spec: SourceSpec) -> None:
        """Follow this.  Raises ConflictError if it was named by hand, RequestError if it may not be followed."""

    def lose(self, endpoint: str) -> None:
        """It is gone for good, with all that it held."""


class Finder(Protocol):
    """Finds sources, and says what became of that."""

    @property
    def informed(self) -> bool:
        """Whether all that is there at the start is found; until then nobody can say that all is followed."""

    def running(self, fleet: Findable) -> AbstractAsyncContextManager[None]:
        """Find sources for the fleet while it is entered."""

    def figures(self) -> FindingFigures:
        """How the search is doing."""


class Nowhere:
    """Finds nothing."""

    informed = True

    def running(self, fleet: Findable) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        """See `Finder.running`."""
        return nullcontext()

    def figures(self) -> FindingFigures:
        """See `Finder.figures`."""
        return FindingFigures()
