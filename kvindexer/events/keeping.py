"""What a fleet tells to whoever keeps its index beyond this process, and what that may ask of the fleet.

    LiveFleet ── registered, applied, withdrawn, ended, unregistered ──► Keeper (`store.keeper`)
    LiveFleet ◄── dial, follow anew, register, unregister ─────── Keeper

`Nobody` is the keeper of an index that lives in memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvindexer.events.stream import Stream
from kvindexer.index.seam import Change, Index
from kvindexer.types import SourceSpec


class StoreProblem(NamedTuple):
    """Why the durable copy is not as it should be."""

    reason: str
    message: str
    hint: str


class Stored(NamedTuple):
    """What the durable copy held of a source when it was last looked at."""

    epoch: int
    seq: int | None
    """Of the last message that is in it."""
    entries: int


class StoreFigures(NamedTuple):
    """How the durable copy is doing; as it is here if there is none."""

    kind: str = "memory"
    """`memory`, or the scheme of the store's URL."""
    reachable: bool = True
    replicas: int = 1
    """Replicas that were heard lately, with this one."""
    writes: int = 0
    records_written: int = 0
    refusals: int = 0
    checks: int = 0
    divergences: int = 0
    shards: Mapping[str, int] = MappingProxyType({})
    """Sources by how the copy stands to memory."""
    lag_s: float = 0.0
    pending_bytes: int = 0


class Kept(Protocol):
    """The fleet, as its keeper sees it."""

    @property
    def index(self) -> Index:
        """Where what the sources hold is."""

    def follow_anew(self, source: str) -> None:
        """Hang up on a source, forget what it holds, and follow it as if it had just been registered."""

    def register_shared(self, spec: SourceSpec) -> None:
        """Follow what another replica has registered.  Raises KvIndexerError."""

    def unregister_shared(self, source: str) -> None:
        """Forget what another replica has unregistered."""


class Keeper(Protocol):
    """Keeps a copy of the index; calls never block, raise or wait."""

    @property
    def informed(self) -> bool:
        """Whether it is known what is registered: until then nobody can say that all sources are followed."""

    def running(self, fleet: Kept) -> AbstractAsyncContextManager[Sequence[SourceSpec]]:
        """Keep the fleet's index while it is entered; gives the sources that are registered already."""

    def follow(self, source: str, spec: SourceSpec, stream: Stream, dial: Callable[[], None]) -> None:
        """A source was attached to the index: warm it, tell its stream where to resume, then `dial`, once."""

    def applied(self, source: str, seq: int, payload: bytes, change: Change) -> None:
        """A message went into the index."""

    def withdrawn(self, source: str, reason: str) -> None:
        """Entries of a source were dropped: `new_life`, `rebuild` or `gone`."""

    def forget(self, source: str) -> None:
        """A source is not followed here any more."""

    def ended(self, source: str) -> None:
        """The life of this source that is followed is over, for all replicas: nobody will go on from its copy."""

    def registered(self, source: str, spec: SourceSpec) -> None:
        """Somebody has registered a source with this replica, for all of them."""

    def unregistered(self, source: str) -> None:
        """Somebody has unregistered a source with this replica, for all of them."""

    def problems(self) -> Sequence[StoreProblem]:
        """What is wrong with the copy; nothing of it touches the answers."""

    def figures(self) -> StoreFigures:
        """How the copy is doing."""

    def stored(self, source: str) -> Stored | None:
        """What the copy held of a source when it was last looked at; None: nothing, or that is not known."""


class Nobody:
    """Keeps nothing."""

    informed = True

    def running(self, fleet: Kept) -> AbstractAsyncContextManager[Sequence[SourceSpec]]:  # noqa: ARG002
        """See `Keeper.running`."""
        return nullcontext(())

    def follow(self, source: str, spec: SourceSpec, stream: Stream, dial: Callable[[], None]) -> None:  # noqa: ARG002
        """There is nothing to warm the source with."""
        dial()

    def applied(self, source: str, seq: int, payload: bytes, change: Change) -> None:
        """See `Keeper.applied`."""

    def withdrawn(self, source: str, reason: str) -> None:
        """See `Keeper.withdrawn`."""

    def forget(self, source: str) -> None:
        """See `Keeper.forget`."""

    def ended(self, source: str) -> None:
        """See `Keeper.ended`."""

    def registered(self, source: str, spec: SourceSpec) -> None:
        """See `Keeper.registered`."""

    def unregistered(self, source: str) -> None:
        """See `Keeper.unregistered`."""

    def problems(self) -> Sequence[StoreProblem]:
        """Nothing can go wrong with nothing."""
        return ()

    def figures(self) -> StoreFigures:
        """See `Keeper.figures`."""
        return StoreFigures()

    def stored(self, source: str) -> Stored | None:  # noqa: ARG002
        """See `Keeper.stored`."""
        return None
