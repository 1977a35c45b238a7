"""What is known of sources and instances: how far an answer can be trusted."""

from __future__ import annotations

from typing import NamedTuple

from kvindexer.events.keeping import Stored
from kvindexer.tiering.feedback import AccuracyFigures
from kvindexer.types import SourceSpec


class InstanceStatus(NamedTuple):
    """How far an instance's figures can be trusted: the worst of its sources."""

    state: str
    """`syncing`, `live`, `stale` or `gone`."""
    sound: bool
    """Nothing is claimed that may be gone."""
    complete: bool
    """Nothing that is held may be missing."""
    lag_ms: float
    """Age of the oldest message received and not applied."""
    verified_ms: float | None
    """Time since its stream was last proven to be this life and without loss."""


class SourceReport(NamedTuple):
    """Everything worth knowing of one source."""

    spec: SourceSpec
    source: str
    state: str
    why: str
    sound: bool
    complete: bool
    epoch: int
    seq: int | None
    lag_ms: float
    last_event_s: float | None
    batches: int
    gaps: int
    replays: int
    orphans: int
    poison: int
    blocks: tuple[int, int, int, int]
    stored: Stored | None = None
    """What the durable copy held of it when it was last looked at."""
    accuracy: AccuracyFigures = AccuracyFigures(0, 0, 0, 0, 0, 0)
    """What engines reported against what was predicted."""
    unfilled: int = 0
    """Holes that no replay could fill."""
    gap_open: bool = False
    """A hole is known, and its replay not through yet."""
    verified_s: float | None = None
    """Time since its stream was last proven to be this life and without loss."""
