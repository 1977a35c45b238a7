"""What followers of the index are told: words only, for `tiering.follower` to say and `api.changes` to pass on.

What is said of a hash is absolute, where it lies now, so hearing it twice or late does no harm.
"""

from __future__ import annotations

from typing import NamedTuple

from kvindexer.index.records import Spot
from kvindexer.types import SourceSpec


class Reset(NamedTuple):
    """Forget what was told of a source: what it holds now follows."""

    source: str
    spec: SourceSpec
    epoch: int
    seq: int | None


class Block(NamedTuple):
    """A block that is held: which one, and where it lies now."""

    hash: int
    key: int | None
    block_size: int
    spots: tuple[Spot, ...]


class Blocks(NamedTuple):
    """What some hashes of a source are now."""

    source: str
    spec: SourceSpec
    epoch: int
    seq: int | None
    held: list[Block]
    removed: list[int]
    rest: int | None
    """After a reset: how many hashes are still to come."""


class Gone(NamedTuple):
    """A source is not registered any more."""

    source: str


Told = Reset | Blocks | Gone


class TooSlowError(Exception):
    """What a follower should have been told next is not kept any more."""
