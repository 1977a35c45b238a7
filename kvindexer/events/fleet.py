"""The registered sources, each with its stream and its share of the index: where events become answers.

    Registry      which sources exist
    Subscriber    their sockets ─► Stream machines ─► Apply, Withdraw, Drop
    LiveFleet     Apply ─► index.apply ─► what the change means for the source's flags
    Keeper        a copy of all that beyond this process, if there is one

Invariant: whatever a source sends or does, the others go on; what a source lost shows in its flags.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Protocol

from kvindexer.errors import ConflictError, KvIndexerError, WireError
from kvindexer.events.curve import open_curve
from kvindexer.events.finding import Finder, FindingFigures, Nowhere
from kvindexer.events.keeping import Keeper, Nobody, StoreFigures, StoreProblem
from kvindexer.events.listing import Listing, is_listing
from kvindexer.events.sockets import SubscriberSettings
from kvindexer.events.sources import Registry
from kvindexer.events.states import State
from kvindexer.events.status import InstanceStatus, SourceReport
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.events.subscriber import Subscriber
from kvindexer.index.seam import Change, Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.feedback import Accuracy, FeedbackRule, Report
from kvindexer.tiering.media import tier_named
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import TIERS, Keyspace, SourceSpec, SourceType, Tier
from kvindexer.watching.logs import tell

_log = logging.getLogger(__name__)
_TRUST = {State.GONE: 0, State.STALE: 1, State.SYNCING: 2, State.LIVE: 3}
_JITTER = 0.2
"""How far probes and retries of different sources are spread, so that a fleet does not ask in one voice."""
_LOST_EVENTS = ("bad_event", "over_bound")

LeastTrusted = Callable[[], Iterable[str]]


class Counters(Protocol):
    """Who counts what happens."""

    def applied(self, change: Change) -> None:
        """A batch went into the index."""

    def skipped(self, reasons: Mapping[str, int]) -> None:
        """Messages, events or blocks had no effect."""

    def withdrawn(self, reason: str, entries: int) -> None:
        """Entries of a source were dropped because they may be gone."""


class _Source:
    """What the service keeps of one source, beside its machine and its share of the index."""

    def __init__(self, source: str, spec: SourceSpec, stream: Stream, rule: FeedbackRule) -> None:
        self.source = source
        self.spec = spec
        self.stream = stream
        self.accuracy = Accuracy(rule)
        self.batches = 0
        self.poison = 0
        self.told, self.told_epoch, self.told_at = State.SYNCING, stream.epoch, time.monotonic()
        """The state and life that the log knows, and since when."""


class LiveFleet:
    """The registered sources, followed; `Fleet` of the HTTP API, `Sink` of the subscriber, `Kept` of its keeper.

    `open_index` makes the index engine; what it is given names sources in the order in which they may lose entries.
    `speculation` is told which blocks events have spoken of.
    """

    def __init__(
        self,
        settings: Settings,
        open_index: Callable[[LeastTrusted], Index],
        counters: Counters,
        keeper: Keeper | None = None,
        speculation: Speculation | None = None,
        *,
        finder: Finder | None = None,
    ) -> None:
        self.settings = settings
        self._speculation = speculation or Speculation(settings.max_speculative_blocks)
        self._rule = FeedbackRule(
            window_s=settings.feedback_window_s,
            min_reports=settings.feedback_min_reports,
            wrong_share=settings.feedback_wrong_share,
            pause_s=settings.feedback_pause_s,
        )
        self.index = open_index(self._least_trusted)
        self._counters = counters
        self._keeper = keeper or Nobody()
        self._finder = finder or Nowhere()
        self._found: dict[str, SourceSpec] = {}
        """What the finder has found, and nobody has named, by endpoint."""
        self._registry = Registry(settings.allowed_endpoints, settings.max_sources, settings.bind_endpoints)
        self._sources: dict[str, _Source] = {}
        self._by_instance: dict[str, list[_Source]] = {}
        self._statuses: dict[str, InstanceStatus] = {}
        """Answers to `status`, until something changes; every tick does, which keeps `verified_ms` fresh."""
        self._subscriber: Subscriber | None = None
        self._listings: dict[str, Listing] = {}
        self._listing_changes = 0
        self._awaited: set[str] = set()
        self._configured: set[str] = set()
        """What is followed because the settings name it."""
        self._asked_for: set[str] = set()
        """What was registered over HTTP, here or at another replica."""
        self._ready = False
        self.changes = ChangeLog(self.index, settings.changes_max_bytes, token_hex(8))
        """What has changed of late, for those who follow it."""
        self.leaving = False
        """The process was told to end; it answers for a while yet, and asks for no more."""
        self._started_at = time.monotonic()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Subscribe to the sources of the settings; hang up on all of them at the end."""
        settings = self.settings
        self._subscriber = Subscriber(
            SubscriberSettings(
                receive_hwm=settings.receive_hwm,
                max_message_bytes=settings.max_message_bytes,
                replay_max_bytes=settings.replay_max_bytes,
                replay_timeout_s=settings.replay_timeout_s,
                max_concurrent_replays=settings.max_concurrent_replays,
                max_sources=settings.max_sources,
                slice_s=settings.slice_ms / 1000,
            ),
            self,
            open_curve(settings.curve_secret_key_file),
        )
        self._started_at = time.monotonic()
        try:
            for endpoint in settings.bind_endpoints:
                self._subscriber.bind(endpoint)
            async with self._keeper.running(self) as registered:
                for spec in settings.sources:
                    self.follow_configured(spec)
                for spec in registered:
                    self._register_found(spec)
                self._awaited = {*self._sources, *self._listings}
                async with self._finder.running(self):
                    yield
        finally:
            for listing in self._listings.values():
                await listing.close()
            await self._subscriber.close()
            self._subscriber = None

    # Fleet

    @property
    def ready(self) -> bool:
        """Every source known at start is in sync, or has had its time; once true, true until we leave."""
        if not self._ready:
            late = time.monotonic() - self._started_at >= self.settings.sync_deadline_s
            informed = self._keeper.informed and self._finder.informed
            in_sync = informed and all(self._in_sync(name) for name in self._awaited)
            self._ready = self._subscriber is not None and (late or in_sync)
        return self._ready and not self.leaving

    def _in_sync(self, name: str) -> bool:
        """Whether a source, or all that an engine lists, is past its first synchronisation, or gone again."""
        listing = self._listings.get(name)
        if listing is not None:
            return bool(listing.sources) and all(self._in_sync(spec.endpoint) for spec in listing.sources)
        known = self._sources.get(name)
        return known is None or known.stream.synced

    @property
    def generation(self) -> int:
        """Grows whenever `specs` changes."""
        return self._registry.generation + self._listing_changes

    def specs(self) -> list[SourceSpec]:
        """What is registered: sources, and engines that list theirs."""
        return [*(spec for _, spec in self._registry), *(listing.spec for listing in self._listings.values())]

    def sources(self) -> Mapping[str, SourceSpec]:
        """The publishers that are followed, by identity."""
        return dict(self._registry)

    def register(self, spec: SourceSpec) -> bool:
        """Follow a source; False if just this is registered already.  Raises RequestError or ConflictError.

        An HTTP address stands for the publishers that the engine there lists.
        """
        new = self._register(spec)
        self._asked_for.add(self._name(spec))
        if new:
            self._keeper.registered(self._registry.identity(spec), spec)
        return new

    def _name(self, spec: SourceSpec) -> str:
        """What a source, or an engine that lists its own, is known by."""
        return spec.endpoint if is_listing(spec.endpoint) else self._registry.identity(spec)

    def follow_configured(self, spec: SourceSpec) -> None:
        """Follow what the settings name now.  Raises KvIndexerError if it contradicts what others have registered."""
        self._register(spec)
        self._configured.add(self._name(spec))
        self._await(spec)

    def forget_configured(self, spec: SourceSpec) -> None:
        """The settings don't name it any more; what somebody has registered as well stays."""
        name = self._name(spec)
        if name in self._configured:
            self._configured.discard(name)
            if name not in self._asked_for:
                self._hang_up(name)

    def _await(self, spec: SourceSpec) -> None:
        """A source that became known before we were ready is waited for, like those known at start."""
        if not self._ready:
            self._awaited.add(self._name(spec))

    def _register(self, spec: SourceSpec) -> bool:
        """Follow what somebody has named, also if it was found before: it is followed as named then."""
        self._give_way(spec)
        return self._add(spec)

    def _add(self, spec: SourceSpec) -> bool:
        if is_listing(spec.endpoint):
            return self._list(spec)
        return self._follow(spec)

    def _register_found(self, spec: SourceSpec) -> None:
        """Follow what was registered before this process started; the settings of today win over it."""
        try:
            self._register(spec)
        except KvIndexerError as error:
            _log.warning("source %s of the store is not followed: %s", spec.endpoint, error)
        else:
            self._asked_for.add(self._name(spec))

    def _list(self, spec: SourceSpec) -> bool:
        known = self._listings.get(spec.endpoint)
        if known is not None:
            if known.spec == spec:
                return False
            raise ConflictError(f"{spec.endpoint} is registered with other values", "unregister it first")
        self._registry.check_endpoint(spec.endpoint)
        follow = self._follow if spec.life else self._follow_listed
        self._listings[spec.endpoint] = Listing(spec, follow, self._forget)
        self._listing_changes += 1
        return True

    def _follow_listed(self, spec: SourceSpec) -> bool:
        """Follow what is listed by an engine that somebody has named."""
        self._give_way(spec)
        return self._follow(spec)

    def _forget(self, spec: SourceSpec) -> None:
        source = self._registry.identity(spec)
        if self._registry.remove(source) is not None:
            self._drop([(source, spec)])

    def _follow(self, spec: SourceSpec) -> bool:
        if self._subscriber is None:
            raise RuntimeError("the service is not running")
        source = self._registry.register(spec)
        if source is None:
            return False
        self._sources[source] = known = _Source(source, spec, self._stream(spec), self._rule)
        self._by_instance.setdefault(spec.instance, []).append(known)
        try:
            self._start(known)
        except KvIndexerError:
            self._forget(spec)
            raise
        tell(_log, logging.INFO, "source registered", source=source, instance=spec.instance, model=spec.model)
        return True

    def _stream(self, spec: SourceSpec) -> Stream:
        settings = self.settings
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load, guards nothing
        return Stream(
            StreamSettings(
                replayable=spec.replay is not None,
                dialled=spec.endpoint not in settings.bind_endpoints,
                held_max_frames=settings.held_max_frames,
                held_max_bytes=settings.held_max_bytes,
                probe_interval_s=settings.probe_interval_s * spread,
                stale_after_s=settings.stale_after_s,
                gone_after_s=settings.gone_after_s,
                retry_min_s=settings.replay_retry_min_s * spread,
                retry_max_s=settings.replay_retry_max_s,
            )
        )

    def _start(self, known: _Source) -> None:
        """Warm the source's share, then dial."""
        stream = known.stream

        def dial() -> None:
            still = self._sources.get(known.source) is known and known.stream is stream
            if still and self._subscriber is not None:
                self.changes.attached(known.source, known.spec, stream)  # the keeper has loaded it
                self._subscriber.add(known.source, known.spec, stream)

        self.index.attach(known.source, known.spec)
        self.changes.attached(known.source, known.spec, stream)
        self._keeper.follow(known.source, known.spec, stream, dial)

    def unregister(
        self,
        instance: str,
        *,
        model: str | None = None,
        tenant: str | None = None,
        rank: int | None = None,
        source_type: SourceType | None = None,
    ) -> list[SourceSpec]:
        """Hang up on an instance's sources and forget what they hold; returns what was registered.

        What was found stays.  Raises ConflictError if it is all there is.
        """
        found = self._found_sources()
        listings = [
            listing
            for name, listing in self._listings.items()
            if name not in found
            and listing.spec.instance == instance
            and rank is None
            and model in (None, listing.spec.model)
            and tenant in (None, listing.spec.tenant)
            and source_type in (None, listing.spec.type)
        ]
        for listing in listings:
            listing.cancel()
            del self._listings[listing.spec.endpoint]
            self._disown(listing.spec.endpoint)
            self._listing_changes += 1
            self._keeper.unregistered(listing.spec.endpoint)
        removed = self._registry.unregister(
            instance, model=model, tenant=tenant, rank=rank, source_type=source_type, but=found
        )
        if not removed and not listings and any(spec.instance == instance for spec in found.values()):
            hint = "it goes with its pod, or with the annotation kvindexer.io/follow: 'false'"
            raise ConflictError(f"instance {instance!r} was found by discovery", hint)
        for source, _ in removed:
            self._keeper.unregistered(source)
        self._drop(removed)
        return [listing.spec for listing in listings] or [spec for _, spec in removed]

    def _drop(self, removed: Iterable[tuple[str, SourceSpec]]) -> None:
        """Hang up on sources that are no longer registered."""
        for source, spec in removed:
            if self._subscriber is not None:
                self._subscriber.remove(source)
            if spec.life:
                self._keeper.ended(source)
            self._keeper.forget(source)
            self._disown(source)
            self.changes.forgotten(source)
            self.index.detach(source)
            known = self._sources.pop(source)
            self._by_instance[spec.instance].remove(known)
            if not self._by_instance[spec.instance]:
                del self._by_instance[spec.instance]
            self._statuses.pop(spec.instance, None)
            tell(_log, logging.INFO, "source unregistered", source=source, instance=spec.instance, model=spec.model)

    def _hang_up(self, name: str) -> None:
        """Forget a source, or an engine that lists its own and what it has listed."""
        listing = self._listings.pop(name, None)
        if listing is not None:
            self._disown(name)
            self._listing_changes += 1
            listing.cancel()
            for listed in listing.sources:
                self._forget(listed)
        spec = self._registry.remove(name)
        if spec is not None:
            self._drop([(name, spec)])

    def _disown(self, name: str) -> None:
        self._configured.discard(name)
        self._asked_for.discard(name)
        self._found.pop(name, None)

    # Found

    @property
    def found(self) -> Mapping[str, SourceSpec]:
        """See `Findable.found`."""
        return self._found

    def find(self, spec: SourceSpec) -> None:
        """See `Findable.find`."""
        name = self._name(spec)
        if name in self._registry or name in self._listings:
            raise ConflictError(f"{name} is registered already", "that registration is the one that counts")
        self._add(spec)
        self._found[spec.endpoint] = spec
        if not self._finder.informed:
            self._await(spec)

    def lose(self, endpoint: str) -> None:
        """See `Findable.lose`."""
        spec = self._found.pop(endpoint, None)
        if spec is not None:
            self._hang_up(self._name(spec))

    def _found_sources(self) -> dict[str, SourceSpec]:
        """What was found, and what engines that were found list."""
        sources = dict(self._found)
        for endpoint in self._found:
            listing = self._listings.get(endpoint)
            sources |= {spec.endpoint: spec for spec in listing.sources} if listing is not None else {}
        return sources

    def _give_way(self, spec: SourceSpec) -> None:
        """Somebody names what we have found: it is theirs."""
        for endpoint in list(self._found):
            listing = self._listings.get(endpoint)
            listed = listing is not None and any(one.endpoint == spec.endpoint for one in listing.sources)
            if endpoint == spec.endpoint or listed:
                self.lose(endpoint)

    def finding(self) -> FindingFigures:
        """How the search for sources is doing."""
        return self._finder.figures()

    # Kept

    def follow_anew(self, source: str) -> None:
        """See `Kept.follow_anew`."""
        known = self._sources.get(source)
        if known is None or self._subscriber is None:
            return
        self._subscriber.remove(source)
        known.stream = self._stream(known.spec)
        self._start(known)
        self.changed(source)

    def register_shared(self, spec: SourceSpec) -> None:
        """See `Kept.register_shared`."""
        self._register(spec)
        self._asked_for.add(self._name(spec))
        self._await(spec)  # the store may have been out of reach when we started

    def unregister_shared(self, source: str) -> None:
        """See `Kept.unregister_shared`."""
        self._hang_up(source)

    def problems(self) -> Sequence[StoreProblem]:
        """What is wrong with the durable copy."""
        return self._keeper.problems()

    def store(self) -> StoreFigures:
        """How the durable copy is doing."""
        return self._keeper.figures()

    # Answers

    def status(self, instance: str) -> InstanceStatus:
        """Worst of what is known of the instance's sources."""
        cached = self._statuses.get(instance)
        if cached is not None and self._subscriber is not None and not self._subscriber.busy:
            return cached
        status = self._status(self._by_instance.get(instance, ()), time.monotonic())
        if status.lag_ms == 0.0:
            self._statuses[instance] = status
        return status

    def each_status(self, instances: Sequence[str]) -> list[InstanceStatus]:
        """See `status`; cheaper for many."""
        known = self._statuses
        if self._subscriber is None or self._subscriber.busy:
            known = {}
        return [known.get(instance) or self.status(instance) for instance in instances]

    def _status(self, sources: list[_Source] | tuple[()], now: float) -> InstanceStatus:
        if not sources:
            return InstanceStatus(State.GONE.value, sound=False, complete=False, lag_ms=0.0, verified_ms=None)
        worst = min((known.stream.state for known in sources), key=_TRUST.__getitem__)
        verified = [known.stream.verified_at for known in sources]
        oldest = None if None in verified else min(at for at in verified if at is not None)
        return InstanceStatus(
            worst.value,
            sound=all(known.stream.sound for known in sources),
            complete=all(self._complete(known) for known in sources),
            lag_ms=round(1000 * max(self._lag_s(known, now) for known in sources), 1),
            verified_ms=None if oldest is None else round(1000 * (now - oldest), 1),
        )

    def _complete(self, known: _Source) -> bool:
        return known.stream.complete and not self.index.truncated(known.source)

    def _lag_s(self, known: _Source, now: float) -> float:
        backlog_s = self._subscriber.backlog_s(known.source, now) if self._subscriber is not None else 0.0
        return max(known.stream.lag_s(now), backlog_s)

    def _refusal(self, source: str) -> str:
        return self._subscriber.refusal(source) if self._subscriber is not None else ""

    def reports(self) -> list[SourceReport]:
        """Everything worth knowing of each source."""
        now = time.monotonic()
        silent = [listing for listing in self._listings.values() if not listing.sources]
        return [self._report(known, now) for known in self._sources.values()] + [_not_listed(it) for it in silent]

    def _report(self, known: _Source, now: float) -> SourceReport:
        stream, stats = known.stream, self.index.stats(known.source)
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

    def feedback(
        self,
        instance: str,
        predicted_tokens: int,
        cached_tokens: int,
        *,
        tenant: str,
        model: str | None = None,
        rank: int | None = None,
    ) -> list[Report]:
        """What an engine reported against what was predicted; one report for each source that it is about."""
        now = time.monotonic()
        reports = []
        for known in self._by_instance.get(instance, ()):
            spec = known.spec
            fits = spec.tenant == tenant and model in (None, spec.model) and rank in (None, spec.rank)
            if not fits or is_store(spec):
                continue
            report = known.accuracy.add(predicted_tokens, cached_tokens, spec.block_size, now)
            reports.append(report)
            if report.doubt:
                known.stream.found_wrong("its engine reports fewer cached tokens than its events claim", now)
                self.changed(known.source)
                _log.warning("source %s: claims were wrong again and again, it is verified anew", known.source)
        return reports

    def _least_trusted(self) -> Iterator[str]:
        """Sources in the order in which their entries may go when the index is full."""
        order = sorted(
            self._sources.values(),
            key=lambda known: (_TRUST[known.stream.state], known.stream.sound, known.stream.complete),
        )
        return (known.source for known in order)

    # Sink

    def apply(self, source: str, seq: int, payload: bytes) -> None:
        """Count the next payload of a source into the index."""
        known = self._sources.get(source)
        if known is None:
            return
        known.batches += 1
        try:
            change = self.index.apply(source, payload)
        except WireError as error:
            known.poison += 1
            known.stream.damaged(f"message {seq} can't be read: {error.reason}")
            self._counters.skipped({error.reason: 1})
            self._keeper.applied(source, seq, payload, Change())
            return
        except Exception:  # noqa: BLE001 - one bad source must not stop the others; it is logged and its flags go
            known.poison += 1
            known.stream.damaged(f"message {seq} could not be applied")
            self._counters.skipped({"internal_error": 1})
            _log.exception("source %s: message %d could not be applied", source, seq)
            self._keeper.applied(source, seq, payload, Change())
            return
        self._counters.applied(change)
        if self._speculation.alive:
            self._confirm(source, change)
        self._consider(known, seq, change)
        self.changes.applied(source, seq, change)
        self._keeper.applied(source, seq, payload, change)

    def _confirm(self, source: str, change: Change) -> None:
        """What events speak of is held or not, as the index says: there is nothing to speculate about any more."""
        for name, hashes in ((source, change.touched), *change.touched_of.items()):
            known = self._sources.get(name)
            if known is None or is_store(known.spec) or not self._speculation.awaits(known.spec.instance):
                continue
            spec = known.spec
            keys: dict[int, list[int]] = {}
            for binding in self.index.resolve(name, set(hashes)):
                if binding is not None:
                    keys.setdefault(binding.block_size, []).append(binding.key)
            for size, of_size in keys.items():
                keyspace = Keyspace(spec.tenant, spec.model, spec.additional_salt, size)
                self._speculation.confirm(keyspace, spec.instance, of_size)

    def _consider(self, known: _Source, seq: int, change: Change) -> None:
        """What a batch means for the truth of the source's flags."""
        lost = sum(change.skipped.get(reason, 0) for reason in _LOST_EVENTS)
        if lost:
            known.poison += lost
            known.stream.damaged(f"{lost} events could not be read or kept")
        if change.uncertain:
            tiers = ", ".join(tier.label for tier in change.uncertain)
            known.stream.uncertain(f"the cache was reset; whether {tiers} was emptied too is not on the wire")
        elif change.cleared and not lost:
            blocks = self.index.stats(known.source).blocks
            if not any(blocks[tier] for tier in TIERS if tier not in change.cleared):
                known.stream.cleared(seq)

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """Forget what a life that is over held; tiers that outlive it stay, and are not proven any more."""
        known = self._sources.get(source)
        if known is None:
            return
        durable: set[Tier] = set() if everything else {tier_named(name) for name in known.spec.durable_tiers}
        if is_store(known.spec) and not everything:
            durable = set(TIERS)
        entries = self.index.withdraw(source, [tier for tier in TIERS if tier not in durable])
        if any(self.index.stats(source).blocks):
            known.stream.uncertain("entries of an earlier life were kept")
        self._counters.withdrawn(reason, entries)
        self.changes.withdrawn(source)
        self._keeper.withdrawn(source, reason)
        tell(_log, logging.WARNING, "entries withdrawn", source=source, entries=entries, reason=reason)

    def changed(self, source: str) -> None:
        """Forget what was answered about the source's instance."""
        known = self._sources.get(source)
        if known is not None:
            self._statuses.pop(known.spec.instance, None)
            if known.stream.state is not known.told or known.stream.epoch != known.told_epoch:
                self._tell(known)

    def _tell(self, known: _Source) -> None:
        """The source has another state, or another life: one line, with how long the last one lasted."""
        stream, now = known.stream, time.monotonic()
        before, known.told = known.told, stream.state
        lasted_s, known.told_at, known.told_epoch = now - known.told_at, now, stream.epoch
        tell(
            _log,
            logging.INFO if stream.state in (State.LIVE, State.SYNCING) else logging.WARNING,
            f"source {stream.state.value}",
            source=known.source,
            instance=known.spec.instance,
            before=before.value,
            duration_ms=round(1000 * lasted_s, 1),
            epoch=stream.epoch,
            seq=stream.last_seq,
            sound=stream.sound,
            complete=self._complete(known),
            blocks=sum(self.index.stats(known.source).blocks),
            why=stream.why,
        )

    def dropped(self, source: str, reason: str) -> None:  # noqa: ARG002 - metrics have no label a source could choose
        """Count a frame that had no effect."""
        self._counters.skipped({reason: 1})


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
