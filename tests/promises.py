"""One validator per promise: a pure function of a history that returns the first breach found, or none.

Validators know nothing of how the service works, only what it did and said.  What a source's applied messages since
its last withdrawal are, is its view.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from history import (
    Answered,
    Applied,
    Asked,
    Entry,
    Followed,
    Full,
    Gauged,
    Harmed,
    Logged,
    OfSource,
    Planted,
    Published,
    Said,
    Settled,
    Shed,
    Withdrawn,
)

MATCH: Final = "/v1/match"
READY: Final = "/ready"
OK: Final = 200
NOT_READY: Final = 503
_STATES: Final = {"syncing", "live", "stale", "gone"}
_UNKNOWN: Final = 0
"""The life of a message that its source has never published."""

Message = tuple[int, int]
"""Life and seq."""


class Breach(NamedTuple):
    """A promise was not kept: by which source or instance ("": by the service), at which entry, how."""

    source: str
    entry: int
    what: str


Validator = Callable[[Sequence[Entry]], Breach | None]


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


def p4_every_answer_says_how_sure_it_is(history: Sequence[Entry]) -> Breach | None:
    """Each instance known when a prompt was asked for has a row, with what was true of its source meanwhile.

    Said of the source at some moment between question and answer; P2 judges whether that was the truth.  For
    instances of one source each, and questions that name every instance.
    """
    sources: dict[str, str] = {}
    said: dict[str, list[tuple[int, Said]]] = defaultdict(list)
    asked: dict[int, tuple[int, dict[str, str]]] = {}
    for entry, it in enumerate(history):
        match it:
            case Followed():
                sources[it.instance] = it.source
            case Said():
                said[it.source].append((entry, it))
            case Asked() if it.path == MATCH and it.valid:
                asked[it.request] = entry, dict(sources)
            case Answered(status=200) if it.request in asked:
                since, known = asked[it.request]
                rows = {row["instance"]: row for row in json.loads(it.text)["matches"]}
                for instance, source in known.items():
                    meanwhile = _meanwhile(said[source], since)
                    wrong = _wrong_of(rows.get(instance), meanwhile, it.at - history[0].at)
                    if wrong:
                        return Breach(instance, entry, wrong)
            case _:
                pass
    return None


def _meanwhile(said: Sequence[tuple[int, Said]], since: int) -> set[tuple[str, bool, bool]]:
    """What was said at or after an entry: what held already then, and what came until now."""
    before = [it for entry, it in said if entry < since]
    after = [it for entry, it in said if entry >= since]
    return {(it.state, it.sound, it.complete) for it in before[-1:] + after}


def _wrong_of(row: dict[str, Any] | None, meanwhile: set[tuple[str, bool, bool]], age_s: float) -> str | None:
    """What is wrong with an answer's row, if anything; nothing can lag for longer than the history is old."""
    if row is None:
        return "not in the answer"
    state, sound, complete = flags = row.get("state"), row.get("sound"), row.get("complete")
    if state not in _STATES or not isinstance(sound, bool) or not isinstance(complete, bool):
        return f"without state and flags: {flags}"
    if flags not in meanwhile:
        return f"answered {flags}, when it was {sorted(meanwhile)}"
    lag_ms = row.get("lag_ms")
    if not isinstance(lag_ms, int | float) or not 0 <= lag_ms <= 1000 * age_s + 1:
        return f"a lag of {lag_ms} ms after {age_s:.1f} s"
    return None


def p5_isolation(history: Sequence[Entry]) -> Breach | None:
    """To a source that nothing befalls, nothing happens: all its messages are in, its flags stay up."""
    harmed = {it.source for it in history if isinstance(it, Harmed)}
    up: set[str] = set()
    waiting: dict[str, dict[Message, int]] = defaultdict(dict)
    lives = _lives(history)
    for entry, it in enumerate(history):
        if not isinstance(it, OfSource) or it.source in harmed:
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


def p6_availability(history: Sequence[Entry]) -> Breach | None:
    """Whatever befalls engines and networks: every question without a mistake is answered, once, with 200."""
    waiting: dict[int, tuple[int, Asked]] = {}
    for entry, it in enumerate(history):
        if isinstance(it, Asked) and it.valid and it.path != READY:
            waiting[it.request] = entry, it
        elif isinstance(it, Answered) and it.request in waiting:
            _, asked = waiting.pop(it.request)
            if it.status != OK:
                return Breach("", entry, f"{asked.path} refused with {it.status}: {it.text}")
    for entry, asked in waiting.values():
        return Breach("", entry, f"{asked.path} never answered")
    return None


def p7_bounds(history: Sequence[Entry]) -> Breach | None:
    """No room ever holds more than its limit, and whatever found no place in one is counted for all to see."""
    refused: Counter[str] = Counter()
    shed: dict[str, int] = {}
    for entry, it in enumerate(history):
        match it:
            case Gauged() if it.value > it.limit:
                return Breach(it.source, entry, f"{it.value} in {it.room}, the limit is {it.limit}")
            case Full():
                refused[it.room] += 1
            case Shed():
                shed[it.room] = it.total
            case _:
                pass
    for room, count in refused.items():
        if shed.get(room, 0) < count:
            return Breach("", len(history), f"{room}: {count} times full, {shed.get(room, 0)} counted")
    return None


def p8_readiness(history: Sequence[Entry]) -> Breach | None:
    """`/ready` is 503 until every source known at start was live or past its deadline, and 200 from then on."""
    deadlines: dict[str, float] = {}
    never_live: set[str] = set()
    live: set[str] = set()
    asked: dict[int, tuple[bool, bool]] = {}
    ready = False
    for entry, it in enumerate(history):
        match it:
            case Followed(awaited_until=float(deadline)):
                deadlines[it.source] = deadline
                never_live.add(it.source)
            case Said(state="live"):
                live.add(it.source)
                never_live.discard(it.source)
            case Said():
                live.discard(it.source)
            case Asked() if it.path == READY:
                waiting = {source for source, deadline in deadlines.items() if it.at < deadline}
                asked[it.request] = waiting <= live, ready
            case Answered() if it.request in asked:
                late, was_ready = asked[it.request]
                late = late and deadlines.keys() <= live  # still, so that nothing came between
                early = [source for source in never_live if it.at < deadlines[source]]
                if it.status not in (OK, NOT_READY):
                    return Breach("", entry, f"neither ready nor not: {it.status}")
                if it.status == OK and early and not ready:
                    return Breach(early[0], entry, "ready, and it has neither been live nor had its time")
                if it.status == NOT_READY and (late or was_ready):
                    return Breach(
                        "", entry, "not ready any more" if was_ready else "not ready, with nothing to wait for"
                    )
                ready = ready or it.status == OK
            case _:
                pass
    return None


def p9_secrecy(history: Sequence[Entry]) -> Breach | None:
    """Nothing that was planted in prompts and events appears in an answer, in the metrics or in a log."""
    planted: list[re.Pattern[str]] = []
    for entry, it in enumerate(history):
        if isinstance(it, Planted):
            # a longer number that happens to contain this one is not it
            edge = (r"(?<!\d)", r"(?!\d)") if it.text.isdigit() else ("", "")
            planted.append(re.compile(re.escape(it.text).join(edge)))
        elif isinstance(it, Answered | Logged):
            for pattern in planted:
                if found := pattern.search(it.text):
                    return Breach("", entry, f"{found[0]!r} is in: {it.text}")
    return None


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
        if not isinstance(it, OfSource):
            continue
        view = views[it.source]
        if isinstance(it, Applied):
            known = lives.get((it.source, it.digest))
            view.append(known if known is not None and known[1] == it.seq else (_UNKNOWN, it.seq))
        elif isinstance(it, Withdrawn):
            view.clear()
        yield entry, it.source, view
