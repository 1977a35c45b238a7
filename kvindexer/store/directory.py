"""The directory of sources that all replicas share: what was registered over HTTP, and what was unregistered.

Each line has a generation, and the higher one is the newer truth, whoever brings it.  So a registration that Redis
has lost is published again by those who remember it, an unregistration is a line too (a tombstone), and an emptied
directory never reads as "all unregistered".

    registered   over HTTP with one replica, for all
    removed      unregistered with one replica, for all
    local        follows from a replica's own settings, its discovery or an engine's list; here only so that readers
                 find its shard

Two wishes are no lines:

    found        a local line for a source that discovery has found
    dropped      no local line any more: the life that it names is over

Neither they nor a local line ever touch what somebody has registered.  So whoever knows a registration and finds a
local line in its place has missed that it was unregistered in between: the directory is looked at now and then, and
what was found may have its line a moment after the tombstone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from kvindexer.store.layout import UnreadableError

MAX_TOMBSTONES: Final = 4096


class Kind(StrEnum):
    """What a line says of its source."""

    REGISTERED = "registered"
    REMOVED = "removed"
    LOCAL = "local"
    FOUND = "found"
    DROPPED = "dropped"


_OVER: Final = (Kind.REMOVED, Kind.DROPPED)


class Line(NamedTuple):
    """One source in the directory."""

    generation: int
    kind: Kind
    spec: bytes


def read_line(text: bytes) -> Line:
    """Raise UnreadableError if it is no line of ours."""
    generation, _, rest = text.partition(b":")
    kind, _, spec = rest.partition(b":")
    try:
        return Line(int(generation), Kind(kind.decode("ascii")), spec)
    except ValueError:
        raise UnreadableError("a line of the directory is not <generation>:<kind>:<spec>") from None


def read_lines(lines: Mapping[bytes, bytes]) -> Iterator[tuple[str, Line | UnreadableError]]:
    """Every source's line; an error in the place of one that can't be understood."""
    for source, text in lines.items():
        if source.startswith(b"#"):
            continue
        try:
            yield source.decode(), read_line(text)
        except (UnreadableError, UnicodeDecodeError) as error:
            yield source.decode(errors="replace"), UnreadableError(str(error))


class Wanted(NamedTuple):
    """A line that has to be written."""

    source: str
    kind: Kind
    spec: bytes
    generation: int | None
    """None: it is news; otherwise it is published again."""


def _told(known: Line | None, found: Line) -> Line:
    """What a line says to somebody who knows an older one."""
    if known is not None and known.kind is Kind.REGISTERED and found.kind is Kind.LOCAL:
        return Line(found.generation - 1, Kind.REMOVED, known.spec)
    return found


class Directory:
    """What this replica knows of the directory, and what it still has to write there."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._wanted: dict[str, Wanted] = {}
        self._found: dict[str, bytes] = {}
        """What discovery follows here; each should have its line, unless somebody has registered it."""
        self._was_read = False

    def want(self, source: str, kind: Kind, spec: bytes) -> None:
        """Something was registered or unregistered here."""
        self._wanted[source] = Wanted(source, kind, spec, None)

    def note_local(self, source: str, spec: bytes) -> None:
        """A source is followed that nobody registered over HTTP."""
        known = self._lines.get(source)
        if source not in self._wanted and (known is None or (known.kind, known.spec) != (Kind.REGISTERED, spec)):
            self.want(source, Kind.LOCAL, spec)

    def note_found(self, source: str, spec: bytes) -> None:
        """A source is followed that discovery has found; its line takes the place of the life before it."""
        self._found[source] = spec
        wanted = self._wanted.get(source)
        if wanted is not None and wanted.kind is Kind.DROPPED:
            del self._wanted[source]

    def drop(self, source: str, spec: bytes) -> None:
        """The life of a found source is over."""
        self._found.pop(source, None)
        known, wanted = self._lines.get(source), self._wanted.get(source)
        if wanted is None and (known is None or known.kind is not Kind.REGISTERED):
            self.want(source, Kind.DROPPED, spec)

    def wanted(self) -> list[Wanted]:
        """What has to be written; before the directory was read, nothing that may stand there better already."""
        listed = [wanted for wanted in self._wanted.values() if self._was_read or wanted.kind is not Kind.LOCAL]
        for source, spec in self._found.items() if self._was_read else ():
            known = self._lines.get(source)
            good = known is not None and (
                known.kind is Kind.REGISTERED or (known.kind, known.spec) == (Kind.LOCAL, spec)
            )
            if not good and source not in self._wanted:
                listed.append(Wanted(source, Kind.FOUND, spec, None))
        return listed

    def written(self, wanted: Wanted, generation: int) -> None:
        """A line of this generation is there; 0: another one that ours must not touch.

        Where ours was to be published again and another generation is there, that is a newer line, whose kind only
        reading it tells: taken for ours, it would never be news.
        """
        if self._wanted.get(wanted.source) == wanted:
            del self._wanted[wanted.source]
        if generation and wanted.generation in (None, generation):
            kind = Kind.LOCAL if wanted.kind is Kind.FOUND else wanted.kind
            self._keep(wanted.source, Line(generation, kind, wanted.spec))

    def generation(self, source: str) -> int:
        """The newest generation known of a source; 0 if there is none."""
        line = self._lines.get(source)
        return 0 if line is None else line.generation

    def merge(self, found: Mapping[str, Line]) -> list[tuple[str, Line]]:
        """Compare with what Redis has: returns its news, and wants what it has lost."""
        self._was_read = True
        for source, line in found.items():
            wanted = self._wanted.get(source)
            if wanted is None or line.kind is not Kind.REGISTERED:
                continue
            if wanted.kind is Kind.DROPPED or (wanted.kind, wanted.spec) == (Kind.LOCAL, line.spec):
                del self._wanted[source]
        news: list[tuple[str, Line]] = []
        for source, line in found.items():
            if line.generation > self.generation(source):
                news.append((source, _told(self._lines.get(source), line)))
                self._keep(source, line)
        for source, line in self._lines.items():
            there = found.get(source)
            if line.kind is Kind.DROPPED:
                continue
            if source not in self._wanted and (there is None or there.generation < line.generation):
                self._wanted[source] = Wanted(source, line.kind, line.spec, line.generation)
        return [(source, line) for source, line in news if source not in self._wanted]

    def removed(self) -> Iterator[tuple[str, Line]]:
        """The tombstones."""
        return ((source, line) for source, line in self._lines.items() if line.kind is Kind.REMOVED)

    def _keep(self, source: str, line: Line) -> None:
        self._lines.pop(source, None)
        self._lines[source] = line
        if line.kind not in _OVER:
            return
        tombstones = [name for name, known in self._lines.items() if known.kind in _OVER]
        if len(tombstones) > MAX_TOMBSTONES:
            del self._lines[tombstones[0]]
