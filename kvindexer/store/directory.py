"""The directory of sources that all replicas share: what was registered over HTTP, and what was unregistered.

Each line has a generation, and the higher one is the newer truth, whoever brings it.  So a registration that Redis
has lost is published again by those who remember it, an unregistration is a line too (a tombstone), and an emptied
directory never reads as "all unregistered".

    registered   over HTTP with one replica, for all
    removed      unregistered with one replica, for all
    local        follows from a replica's own settings, its discovery or an engine's list; here only so that readers
                 find its shard
    dropped      not a line, but the wish that a local one be none: the life that it names is over
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


class Directory:
    """What this replica knows of the directory, and what it still has to write there."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._wanted: dict[str, Wanted] = {}
        self._was_read = False

    def want(self, source: str, kind: Kind, spec: bytes) -> None:
        """Something was registered or unregistered here."""
        self._wanted[source] = Wanted(source, kind, spec, None)

    def note_local(self, source: str, spec: bytes) -> None:
        """A source is followed that nobody registered over HTTP."""
        known, wanted = self._lines.get(source), self._wanted.get(source)
        free = wanted is None or wanted.kind is Kind.DROPPED
        if free and (known is None or (known.kind, known.spec) != (Kind.REGISTERED, spec)):
            self.want(source, Kind.LOCAL, spec)

    def drop(self, source: str, spec: bytes) -> None:
        """What a local line says is over; a line that somebody has registered since stays."""
        known, wanted = self._lines.get(source), self._wanted.get(source)
        named = Kind.REGISTERED in (known and known.kind, wanted and wanted.kind)
        if not named:
            self.want(source, Kind.DROPPED, spec)

    def wanted(self) -> list[Wanted]:
        """What has to be written; before the directory was read, nothing that may stand there better already."""
        return [wanted for wanted in self._wanted.values() if self._was_read or wanted.kind is not Kind.LOCAL]

    def written(self, wanted: Wanted, generation: int) -> None:
        """It is there, as this generation."""
        if self._wanted.get(wanted.source) == wanted:
            del self._wanted[wanted.source]
        self._keep(wanted.source, Line(generation, wanted.kind, wanted.spec))

    def generation(self, source: str) -> int:
        """The newest generation known of a source; 0 if there is none."""
        line = self._lines.get(source)
        return 0 if line is None else line.generation

    def merge(self, found: Mapping[str, Line]) -> list[tuple[str, Line]]:
        """Compare with what Redis has: returns its news, and wants what it has lost."""
        self._was_read = True
        for source, line in found.items():
            wanted = self._wanted.get(source)
            registered = line.kind is Kind.REGISTERED
            if wanted is not None and wanted.kind is Kind.LOCAL and registered and wanted.spec == line.spec:
                del self._wanted[source]
        news = [(source, line) for source, line in found.items() if line.generation > self.generation(source)]
        for source, line in news:
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
