"""One follower of the index: how far it has been told of each source, and what it is told next.

It is given each source's content from the start (a reset), or from its position on; between the pieces of a long
content it hears of the other sources.  A position can be taken up if the ring still has the message that it stands
behind.  On another replica also its content must be the same: both sound and complete at that message of the same
life, and no hashes shared with other sources, which replicas may have heard in another order.  Everything else begins
anew.

Invariant: a follower that has been told all that there is has exactly the content of the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple, Protocol

from kvindexer.index.records import read
from kvindexer.index.seam import Index
from kvindexer.tiering.position import Mark, Position, mark_digest
from kvindexer.tiering.ring import NOTHING_YET, Ring
from kvindexer.tiering.told import Block, Blocks, Gone, Reset, Told, TooSlowError
from kvindexer.types import SourceSpec

PIECE: Final = 512
"""Hashes that are told at once."""
_MOST: Final = 2**64 - 1
_UNFINISHED: Final = Mark(0, 0, b"", 0, exact=False)
"""Something of the source was told, and not all since: it begins anew, or is gone."""


class Log(Protocol):
    """Where the rings are; `tiering.changes.ChangeLog` is one."""

    @property
    def index(self) -> Index:
        """What a hash is now is asked of it."""

    @property
    def name(self) -> str:
        """Tells this log from those of other replicas and of earlier processes."""

    @property
    def rings(self) -> Mapping[str, Ring]:
        """By source."""

    def exact(self, ring: Ring) -> bool:
        """Whether every replica that is as sure as this one has the same content at the same message."""


class _Cursor:
    """How far a follower has been told of a source."""

    def __init__(self, generation: int, at: int, last: tuple[int, bytes]) -> None:
        self.generation = generation
        self.at = at
        self.last = last


class _Snapshot(NamedTuple):
    """The content of a source, on its way to a follower."""

    source: str
    cursor: _Cursor
    hashes: Iterator[int]
    rest: int
    """How many are still to come."""


class Follower:
    """Who is told; `step` says what next."""

    def __init__(
        self, log: Log, fits: Callable[[SourceSpec], bool], since: Position | None, wake: Callable[[], None]
    ) -> None:
        self._log = log
        self._fits = fits
        self._wake = wake
        self._cursors: dict[str, _Cursor] = {}
        self._changed: dict[str, None] = {}
        self._fresh: dict[str, None] = {}
        """Sources that are to be told from the start."""
        self._snapshot: _Snapshot | None = None
        self._gone: list[str] = []
        self._turn = False
        marks = {} if since is None else since.marks
        self._holds = set(marks)
        """Sources of which it may have some content."""
        for source, ring in log.rings.items():
            if fits(ring.spec):
                self._begin_with(ring, since, marks.get(source))
        self._gone += (source for source in marks if source not in self._changed)
        self._holds.difference_update(self._gone)

    def _begin_with(self, ring: Ring, since: Position | None, mark: Mark | None) -> None:
        self._changed[ring.source] = None
        if since is None or mark is None:
            return
        known = mark.generation == ring.generation if since.log == self._log.name else mark.exact
        if not known or (since.log != self._log.name and not self._log.exact(ring)):
            return
        number = ring.behind(mark)
        if number is not None:
            self._cursors[ring.source] = _Cursor(ring.generation, number, (mark.next - 1, mark.digest))

    # What the log says

    def changed(self, ring: Ring) -> None:
        """There is something new of a source."""
        if self._fits(ring.spec):
            self._changed[ring.source] = None
            self._wake()

    def lost(self, source: str) -> None:
        """A source is not there any more."""
        self._cursors.pop(source, None)
        if self._snapshot is not None and self._snapshot.source == source:
            self._snapshot = None
        if source in self._holds:
            self._holds.remove(source)
            self._gone.append(source)
            self._wake()

    # What is told

    def step(self) -> Told | None:
        """The next piece; None: everything is told for now.  Raises TooSlowError."""
        if self._gone:
            return Gone(self._gone.pop())
        self._turn = not self._turn  # so that a long snapshot keeps nobody from hearing of other sources
        first, second = (self._next_change, self._next_of_snapshot)[:: 1 if self._turn else -1]
        return first() or second() or first()

    @property
    def position(self) -> Position:
        """Where to go on from what was told so far."""
        marks = dict.fromkeys((*self._holds, *self._gone), _UNFINISHED)
        for source, cursor in self._cursors.items():
            ring = self._log.rings.get(source)
            if ring is not None and ring.generation == cursor.generation:
                seq, digest = cursor.last
                behind = min(seq + 1, _MOST)
                exact = self._log.exact(ring)
                marks[source] = Mark(ring.life.epoch, behind, mark_digest(digest), ring.generation, exact)
        return Position(self._log.name, marks)

    def _next_change(self) -> Told | None:
        while self._changed:
            source = next(iter(self._changed))
            ring = self._log.rings.get(source)
            cursor = self._cursors.get(source)
            if ring is None or (self._snapshot is not None and self._snapshot.source == source):
                del self._changed[source]
                continue
            if cursor is None or cursor.generation != ring.generation:
                del self._changed[source]
                self._cursors.pop(source, None)
                self._fresh[source] = None
                continue
            if cursor.at < ring.first:
                raise TooSlowError
            if cursor.at == ring.end:
                del self._changed[source]
                continue
            hashes: dict[int, None] = {}
            for entry in islice(ring.entries, cursor.at - ring.first, None):
                seq, digest, touched = entry
                hashes.update(dict.fromkeys(touched))
                cursor.at += 1
                if seq is not None:
                    cursor.last = (seq, digest)
                if len(hashes) >= PIECE:
                    break
            if hashes:
                return self._blocks(ring, hashes, cursor.last[0], None)
        return None

    def _next_of_snapshot(self) -> Told | None:
        snapshot = self._snapshot
        if snapshot is not None:
            ring = self._log.rings.get(snapshot.source)
            if ring is not None and ring.generation == snapshot.cursor.generation:
                return self._go_on(ring, snapshot)
            self._snapshot = None
            if ring is not None:
                self._fresh[snapshot.source] = None
        while self._fresh:
            source = next(iter(self._fresh))
            del self._fresh[source]
            ring = self._log.rings.get(source)
            if ring is None or not self._fits(ring.spec):
                continue
            hashes = self._log.index.hashes(source)
            cursor = _Cursor(ring.generation, ring.end, ring.last)
            self._holds.add(source)
            self._snapshot = _Snapshot(source, cursor, iter(hashes), len(hashes))
            return Reset(source, ring.spec, ring.life.epoch, _seq(ring.last[0]))
        return None

    def _go_on(self, ring: Ring, snapshot: _Snapshot) -> Told:
        hashes = list(islice(snapshot.hashes, PIECE))
        rest = snapshot.rest - len(hashes)
        self._snapshot = snapshot._replace(rest=rest)
        if not rest:
            self._snapshot = None
            self._cursors[ring.source] = snapshot.cursor
            self._changed[ring.source] = None
        return self._blocks(ring, hashes, snapshot.cursor.last[0], rest)

    def _blocks(self, ring: Ring, hashes: Iterable[int], seq: int, rest: int | None) -> Blocks:
        hashes = list(hashes)
        own = ring.spec.block_size
        held: list[Block] = []
        removed: list[int] = []
        for block_hash, packed in zip(hashes, self._log.index.records(ring.source, hashes), strict=True):
            record = read(packed, own) if packed else None
            if record is not None and record.spots:
                held.append(Block(block_hash, record.key, record.block_size, record.spots))
            elif rest is None:
                removed.append(block_hash)
        return Blocks(ring.source, ring.spec, ring.life.epoch, _seq(seq), held, removed, rest)


def _seq(seq: int) -> int | None:
    return None if seq == NOTHING_YET else seq
