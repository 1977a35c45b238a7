"""Histories of faulty runs, and one validator per promise.

    engines ──► Published ─┐
    fleet ────► Applied ───┤
                Withdrawn ─┼──► history ──► validator of a promise ──► the first breach found, or none
                Said ──────┤
    the end ──► Settled ───┘

Validators are pure functions of a history; they know nothing of how the service works, only what it did and said.
What a source's applied messages since its last withdrawal are, is its view.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from kvindexer.events.fleet import LiveFleet
from kvindexer.testing import AllBlocksCleared, Event, FakeEngine
from live import held, truth
from proxied import ProxiedEngine


class Published(NamedTuple):
    """An engine has given a message to its socket, in this life of it."""

    at: float
    source: str
    life: int
    seq: int
    digest: int
    clears: bool = False
    """It begins with the news that the cache is empty."""


class Applied(NamedTuple):
    """The fleet has counted a message into the index."""

    at: float
    source: str
    seq: int
    digest: int


class Withdrawn(NamedTuple):
    """The fleet has forgotten what the source held."""

    at: float
    source: str
    reason: str


class Said(NamedTuple):
    """What the fleet says of a source from now on."""

    at: float
    source: str
    state: str
    sound: bool
    complete: bool


class Settled(NamedTuple):
    """The network is whole, traffic has stopped, time has passed: what the index claims, what the engine holds."""

    at: float
    source: str
    claimed: Mapping[Any, int]
    holds: Mapping[Any, int]


Entry = Published | Applied | Withdrawn | Said | Settled
Message = tuple[int, int]
"""Life and seq."""


class Breach(NamedTuple):
    """A promise was not kept: by which source, at which entry, how."""

    source: str
    entry: int
    what: str


# -- recording -----------------------------------------------------------------------------------------------


class RecordingEngine(ProxiedEngine):
    """Notes what it publishes, in which life, before anybody can have heard it."""

    def __init__(self, history: list[Entry], **options: Any) -> None:
        self._history = history
        self._life = 1
        self._clears = False
        super().__init__(**options)

    def publish_events(self, events: Sequence[Event]) -> int:
        """As every engine."""
        with self._lock:
            self._clears = isinstance(events[0], AllBlocksCleared)
            return super().publish_events(events)

    def publish_raw(self, payload: bytes) -> int:
        """As every engine."""
        with self._lock:
            digest = xxh3_64_intdigest(payload)
            self._history.append(
                Published(time.monotonic(), self.endpoint, self._life, self._next_seq, digest, self._clears)
            )
            return super().publish_raw(payload)

    def restart(self, *, hash_seed: int | str | None = None, down_s: float = 0.0) -> None:
        """As every engine."""
        with self._lock:
            self._life += 1
            super().restart(hash_seed=hash_seed, down_s=down_s)


class RecordingFleet(LiveFleet):
    """Notes what it does with each source, and what it says of it."""

    def __init__(self, history: list[Entry], *arguments: Any) -> None:
        self._history = history
        super().__init__(*arguments)

    def apply(self, source: str, seq: int, payload: bytes) -> None:
        """As every fleet."""
        self._history.append(Applied(time.monotonic(), source, seq, xxh3_64_intdigest(payload)))
        super().apply(source, seq, payload)

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """As every fleet."""
        self._history.append(Withdrawn(time.monotonic(), source, reason))
        super().withdraw(source, reason, everything=everything)

    def changed(self, source: str) -> None:
        """As every fleet."""
        super().changed(source)
        known = self._sources.get(source)
        if known is not None:
            now = known.stream
            self._history.append(Said(time.monotonic(), source, now.state.value, now.sound, now.complete))

    def settled(self, engine: FakeEngine) -> None:
        """The end of a source's history."""
        self._history.append(Settled(time.monotonic(), engine.endpoint, held(self, engine), truth(engine)))


# -- validators ----------------------------------------------------------------------------------------------


def p1_order(history: Sequence[Entry]) -> Breach | None:
    """Batches of a source apply in seq order, each exactly once, and are its own.

    No message names its life: two of them may meet in one view, which is then not sound (P2).
    """
    for entry, source, view in _views(history):
        if not isinstance(history[entry], Applied):
            continue
        life, seq = view[-1]
        if life == _UNKNOWN:
            return Breach(source, entry, f"it has never published what was applied as seq {seq}")
        if len(view) > 1 and view[-2][1] >= seq:
            return Breach(source, entry, f"life {life}, seq {seq} was applied behind {view[-2]}")
    return None


def p2_no_silent_falsehood(history: Sequence[Entry]) -> Breach | None:
    """Sound: the view, since the last clear in it, is one unbroken run of one life.

    Complete too: it begins with that clear, or with the life's first message.
    """
    fresh = _fresh_starts(history)
    clears = {(it.source, it.life, it.seq) for it in history if isinstance(it, Published) and it.clears}
    for entry, source, view in _views(history):
        said = history[entry]
        if not isinstance(said, Said) or said.state != "live" or not said.sound:
            continue
        clear = max((i for i, message in enumerate(view) if (source, *message) in clears), default=0)
        run = view[clear:]
        for before, after in pairwise(run):
            if after != (before[0], before[1] + 1):
                return Breach(source, entry, f"called sound, though {after} follows {before}")
        if said.complete and run and (source, *run[0]) not in fresh | clears:
            return Breach(source, entry, f"called complete, though it begins with {run[0]}")
    return None


def p3_convergence(history: Sequence[Entry]) -> Breach | None:
    """In the end every source is live, and the index is what its engine holds, unless it says that it may not be."""
    last: dict[str, Said] = {}
    for entry, it in enumerate(history):
        if isinstance(it, Said):
            last[it.source] = it
        elif isinstance(it, Settled):
            said = last.get(it.source)
            if said is None or said.state != "live":
                return Breach(it.source, entry, f"not live in the end: {said}")
            gone = {block for block, n in it.claimed.items() if n > it.holds.get(block, 0)}
            missing = {block for block, n in it.holds.items() if n > it.claimed.get(block, 0)}
            if said.sound and gone:
                return Breach(it.source, entry, f"called sound, and claims {len(gone)} blocks that are gone")
            if said.complete and missing:
                return Breach(it.source, entry, f"called complete, and misses {len(missing)} blocks")
    return None


def p5_isolation(history: Sequence[Entry], harmed: Collection[str]) -> Breach | None:
    """To a source that nothing has befallen, nothing happens: all its messages are in, its flags stay up."""
    up: set[str] = set()
    waiting: dict[str, dict[Message, int]] = defaultdict(dict)
    lives = _lives(history)
    for entry, it in enumerate(history):
        if it.source in harmed:
            continue
        match it:
            case Published():
                waiting[it.source][it.life, it.seq] = entry
            case Applied():
                waiting[it.source].pop(lives.get((it.source, it.digest), (_UNKNOWN, it.seq)), None)
            case Withdrawn():
                return Breach(it.source, entry, f"withdrawn ({it.reason}), though nothing had befallen it")
            case Said() if (it.state, it.sound, it.complete) == ("live", True, True):
                up.add(it.source)
            case Said() if it.source in up:
                return Breach(it.source, entry, "lost its state or a flag, though nothing had befallen it")
            case _:
                pass
    for source, messages in waiting.items():
        for message, entry in messages.items():
            return Breach(source, entry, f"{message} was never applied, though nothing had befallen it")
    return None


Validator = Callable[[Sequence[Entry]], Breach | None]
_UNKNOWN = 0


def _lives(history: Sequence[Entry]) -> dict[tuple[str, int], Message]:
    """Of each payload: the life and the seq under which its source has published it."""
    return {(it.source, it.digest): (it.life, it.seq) for it in history if isinstance(it, Published)}


def _fresh_starts(history: Sequence[Entry]) -> set[tuple[str, int, int]]:
    """The first message of each life of each source."""
    first: dict[tuple[str, int], int] = {}
    for it in history:
        if isinstance(it, Published):
            first.setdefault((it.source, it.life), it.seq)
    return {(*life, seq) for life, seq in first.items()}


def _views(history: Sequence[Entry]) -> Iterator[tuple[int, str, list[Message]]]:
    """After every entry about a source: its view."""
    lives = _lives(history)
    views: dict[str, list[Message]] = defaultdict(list)
    for entry, it in enumerate(history):
        view = views[it.source]
        if isinstance(it, Applied):
            known = lives.get((it.source, it.digest))
            view.append(known if known is not None and known[1] == it.seq else (_UNKNOWN, it.seq))
        elif isinstance(it, Withdrawn):
            view.clear()
        yield entry, it.source, view
