"""What is answered about the followed sources: the status of each instance, and a report of each source.

Invariant: a kept status is given only while nothing waits to be applied, and until something changes its instance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kvindexer.events.followed import TRUST, Followed
from kvindexer.events.keeping import Keeper
from kvindexer.events.listing import Listing
from kvindexer.events.states import State
from kvindexer.events.status import InstanceStatus, SourceReport
from kvindexer.events.subscriber import Subscriber
from kvindexer.index.seam import Index


class Answers:
    """The followed sources by instance, and what is said of them.

    `subscriber` gives the one that runs, for what only sockets know: what waits, and who refuses us.
    """

    def __init__(self, index: Index, keeper: Keeper, subscriber: Callable[[], Subscriber | None]) -> None:
        self._index = index
        self._keeper = keeper
        self._subscriber = subscriber
        self._by_instance: dict[str, list[Followed]] = {}
        self._statuses: dict[str, InstanceStatus] = {}
        """Answers to `status`, until something changes; every tick does, which keeps `verified_ms` fresh."""

    def add(self, known: Followed) -> None:
        """A source is followed from now on."""
        self._by_instance.setdefault(known.spec.instance, []).append(known)

    def remove(self, known: Followed) -> None:
        """It is followed no more."""
        instance = known.spec.instance
        self._by_instance[instance].remove(known)
        if not self._by_instance[instance]:
            del self._by_instance[instance]
        self.changed(instance)

    def changed(self, instance: str) -> None:
        """Forget what was answered about the instance."""
        self._statuses.pop(instance, None)

    def of(self, instance: str) -> Sequence[Followed]:
        """The instance's sources."""
        return self._by_instance.get(instance, ())

    def status(self, instance: str) -> InstanceStatus:
        """Worst of what is known of the instance's sources."""
        cached = self._statuses.get(instance)
        subscriber = self._subscriber()
        if cached is not None and subscriber is not None and not subscriber.busy:
            return cached
        status = self._status(self.of(instance), time.monotonic())
        if status.lag_ms == 0.0:
            self._statuses[instance] = status
        return status

    def each_status(self, instances: Sequence[str]) -> list[InstanceStatus]:
        """See `status`; cheaper for many."""
        known = self._statuses
        subscriber = self._subscriber()
        if subscriber is None or subscriber.busy:
            known = {}
        try:
            return [known[instance] for instance in instances]  # nearly always all are kept
        except KeyError:
            return [known.get(instance) or self.status(instance) for instance in instances]

    def _status(self, sources: Sequence[Followed], now: float) -> InstanceStatus:
        if not sources:
            return InstanceStatus(State.GONE.value, sound=False, complete=False, lag_ms=0.0, verified_ms=None)
        worst = min((known.stream.state for known in sources), key=TRUST.__getitem__)
        verified = [known.stream.verified_at for known in sources]
        oldest = None if None in verified else min(at for at in verified if at is not None)
        return InstanceStatus(
            worst.value,
            sound=all(known.stream.sound for known in sources),
            complete=all(known.complete for known in sources),
            lag_ms=round(1000 * max(self._lag_s(known, now) for known in sources), 1),
            verified_ms=None if oldest is None else round(1000 * (now - oldest), 1),
        )

    def _lag_s(self, known: Followed, now: float) -> float:
        subscriber = self._subscriber()
        backlog_s = subscriber.backlog_s(known.source, now) if subscriber is not None else 0.0
        return max(known.stream.lag_s(now), backlog_s)

    def _refusal(self, source: str) -> str:
        subscriber = self._subscriber()
        return subscriber.refusal(source) if subscriber is not None else ""

    def reports(self, sources: Iterable[Followed], silent: Iterable[Listing]) -> list[SourceReport]:
        """Everything worth knowing of each source, and of each engine that has listed none yet."""
        now = time.monotonic()
        return [self._report(known, now) for known in sources] + [_not_listed(listing) for listing in silent]

    def _report(self, known: Followed, now: float) -> SourceReport:
        stream, stats = known.stream, self._index.stats(known.source)
        return SourceReport(
            spec=known.spec,
            source=known.source,
            state=stream.state.value,
            why=self._refusal(known.source) or ("entries were dropped at a bound" if stats.truncated else stream.why),
            sound=stream.sound,
            complete=stream.complete and not stats.truncated,
            epoch=stream.epoch,
            seq=stream.last_seq,
            lag_ms=round(1000 * self._lag_s(known, now), 1),
            last_event_s=None if stream.event_at is None else round(now - stream.event_at, 3),
            batches=known.batches,
            gaps=stream.gaps,
            replays=stream.replays,
            orphans=stats.orphans,
            poison=known.poison,
            blocks=stats.blocks,
            stored=self._keeper.stored(known.source),
            accuracy=known.accuracy.figures,
            unfilled=stream.unfilled,
            gap_open=stream.gap_open,
            verified_s=None if stream.verified_at is None else round(now - stream.verified_at, 3),
        )


def _not_listed(listing: Listing) -> SourceReport:
    """The report of an engine that has not listed its publishers yet."""
    return SourceReport(
        spec=listing.spec,
        source=listing.spec.endpoint,
        state=State.SYNCING.value,
        why=listing.why,
        sound=True,
        complete=False,
        epoch=0,
        seq=None,
        lag_ms=0.0,
        last_event_s=None,
        batches=0,
        gaps=0,
        replays=0,
        orphans=0,
        poison=0,
        blocks=(0, 0, 0, 0),
    )
