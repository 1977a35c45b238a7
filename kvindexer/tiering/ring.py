"""The recent changes of one source: messages in their order, each with the hashes that it may have changed.

    before ─► entry ─► entry ─► entry ─► end        numbers grow, and never start again
              first                                 dropped at the bound: from the first on

A position stands behind a message.  It can be taken up as long as that message is the one before the first entry, or
one of the entries, of the same life.
Invariant: what is kept is without a hole from `first` to `end`; after `begin` nothing that was told before counts.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Final, Protocol

from kvindexer.tiering.position import Mark, mark_digest
from kvindexer.types import SourceSpec

NOTHING_YET: Final = -1
"""The seq before a life's first."""
_ENTRY_BYTES: Final = 200
_HASH_BYTES: Final = 8


class Life(Protocol):
    """What a source's stream knows of its life; `events.stream.Stream` does."""

    @property
    def epoch(self) -> int:
        """Which life it is."""

    @property
    def last_seq(self) -> int | None:
        """Of the last message that was applied."""

    @property
    def sound(self) -> bool:
        """Nothing is claimed that may be gone."""

    @property
    def complete(self) -> bool:
        """Nothing that is held may be missing."""

    def applied_digest(self, seq: int) -> bytes | None:
        """Digest of an applied message, if it was one of the last ones."""


Entry = tuple[int | None, bytes, "array[int]"]
"""A message: its seq, its digest, which hashes it may have changed; without a seq: a message of another source."""


class Ring:
    """See above."""

    def __init__(self, source: str, spec: SourceSpec, life: Life, generation: int) -> None:
        self.source = source
        self.spec = spec
        self.life = life
        self.generation = generation
        """Another one: nothing that was told before counts."""
        self.entries: deque[Entry] = deque()
        self.first = 0
        """Number of the first entry that is kept; numbers never start again."""
        self.before: tuple[int, bytes] | None = None
        """The message before that entry."""
        self._dropped = (NOTHING_YET, b"")
        self.dead = 0
        """Entries that were dropped before it was their turn."""

    @property
    def end(self) -> int:
        """Number of the entry to come."""
        return self.first + len(self.entries)

    @property
    def last(self) -> tuple[int, bytes]:
        """The newest message."""
        return next(((seq, digest) for seq, digest, _ in reversed(self.entries) if seq is not None), self._dropped)

    def begin(self, generation: int) -> int:
        """Nothing of what is kept counts any more; returns how many bytes that was."""
        size = sum(map(size_of, self.entries))
        self.generation = generation
        self.first = self.end
        self.dead += len(self.entries)
        self.entries.clear()
        seq = self.life.last_seq
        digest = b"" if seq is None else self.life.applied_digest(seq) or b""
        self.before = self._dropped = (NOTHING_YET, b"") if seq is None else (seq, digest)
        return size

    def drop_first(self) -> int:
        """The oldest entry is kept no longer; returns how many bytes it was."""
        if self.dead:
            self.dead -= 1
            return 0
        entry = self.entries.popleft()
        self.first += 1
        seq, digest, _ = entry
        self.before = None if seq is None else (seq, digest)
        if seq is not None:
            self._dropped = (seq, digest)
        return size_of(entry)

    def behind(self, mark: Mark) -> int | None:
        """Number of the entry behind a mark; None: the mark is too old, too new or of another life."""
        if self.before is not None and _is_at(mark, *self.before):
            return self.first
        for number, (seq, digest, _) in enumerate(self.entries, self.first + 1):
            if seq is not None and _is_at(mark, seq, digest):
                return number
        return None


def _is_at(mark: Mark, seq: int, digest: bytes) -> bool:
    return mark.next == seq + 1 and mark.digest == mark_digest(digest) and (bool(digest) or seq == NOTHING_YET)


def size_of(entry: Entry) -> int:
    """Bytes that an entry takes, as far as the bound is concerned."""
    return _ENTRY_BYTES + _HASH_BYTES * len(entry[2])
