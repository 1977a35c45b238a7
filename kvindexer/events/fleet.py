"""The registered sources, each with its stream and its share of the index: where events become answers.

    Membership    which sources exist, and why
    Subscriber    their sockets ─► Stream machines ─► Apply, Withdraw, Drop
    LiveFleet     Apply ─► index.apply ─► Followed: what the change means for the source's flags
    Keeper        a copy of all that beyond this process, if there is one
    Answers       what is said of sources and instances

Invariant: whatever a source sends or does, the others go on; what a source lost shows in its flags.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Protocol

from kvindexer.errors import WireError
from kvindexer.events.answers import Answers
from kvindexer.events.curve import open_curve
from kvindexer.events.descriptors import Room
from kvindexer.events.finding import Finder, FindingFigures, Nowhere
from kvindexer.events.followed import TRUST, Followed, open_stream
from kvindexer.events.keeping import Keeper, Nobody, StoreFigures, StoreProblem
from kvindexer.events.membership import Membership
from kvindexer.events.sockets import SubscriberSettings
from kvindexer.events.sources import Registry
from kvindexer.events.status import InstanceStatus, SourceReport
from kvindexer.events.stream import Stream
from kvindexer.events.subscriber import Subscriber
from kvindexer.index.seam import Change, Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.feedback import FeedbackRule, Report
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace, SourceSpec, SourceType
from kvindexer.watching.logs import tell

_log = logging.getLogger(__name__)

LeastTrusted = Callable[[], Iterable[str]]


class Counters(Protocol):
    """Who counts what happens."""

    def applied(self, change: Change) -> None:
        """A batch went into the index."""

    def skipped(self, reasons: Mapping[str, int]) -> None:
        """Messages, events or blocks had no effect."""

    def withdrawn(self, reason: str, entries: int) -> None:
        """Entries of a source were dropped because they may be gone."""


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
        self._membership = Membership(
            Registry(settings.allowed_endpoints, settings.max_sources, settings.bind_endpoints),
            self._keeper,
            follow=self._follow,
            hang_up=self._hang_up,
        )
        self._sources: dict[str, Followed] = {}
        self._room = Room(settings)
        self._subscriber: Subscriber | None = None
        self._answers = Answers(self.index, self._keeper, lambda: self._subscriber)
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
            async with self._membership.running(), self._keeper.running(self) as registered:
                for spec in settings.sources:
                    self._membership.follow_configured(spec)
                for spec in registered:
                    self._membership.register_kept(spec)
                self._membership.await_all()
                async with self._finder.running(self):
                    yield
        finally:
            await self._subscriber.close()
            self._subscriber = None

    # Membership

    @property
    def ready(self) -> bool:
        """Every source known at start is in sync, or has had its time; once true, true until we leave."""
        if not self._ready:
            late = time.monotonic() - self._started_at >= self.settings.sync_deadline_s
            informed = self._keeper.informed and self._finder.informed
            in_sync = informed and self._membership.in_sync(lambda source: self._sources[source].stream.synced)
            self._ready = self._subscriber is not None and (late or in_sync)
        return self._ready and not self.leaving

    def _await(self, spec: SourceSpec) -> None:
        """A source that became known before we were ready is waited for, like those known at start."""
        if not self._ready:
            self._membership.await_also(spec)

    @property
    def generation(self) -> int:
        """Grows whenever `specs` changes."""
        return self._membership.generation

    def specs(self) -> list[SourceSpec]:
        """What is registered: sources, and engines that list theirs."""
        return self._membership.specs()

    def sources(self) -> Mapping[str, SourceSpec]:
        """The publishers that are followed, by identity."""
        return self._membership.sources()

    def register(self, spec: SourceSpec) -> bool:
        """Follow a source; False if just this is registered already.  Raises RequestError or ConflictError.

        An HTTP address stands for the publishers that the engine there lists.
        """
        return self._membership.register(spec)

    def follow_configured(self, spec: SourceSpec) -> None:
        """Follow what the settings name now.  Raises KvIndexerError if it contradicts what others have registered."""
        self._membership.follow_configured(spec)
        self._await(spec)

    def forget_configured(self, spec: SourceSpec) -> None:
        """The settings don't name it any more; what somebody has registered as well stays."""
        self._membership.forget_configured(spec)

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
        return self._membership.unregister(instance, model=model, tenant=tenant, rank=rank, source_type=source_type)

    @property
    def found(self) -> Mapping[str, SourceSpec]:
        """See `Findable.found`."""
        return self._membership.found

    def find(self, spec: SourceSpec) -> None:
        """See `Findable.find`."""
        self._membership.find(spec)
        if not self._finder.informed:
            self._await(spec)

    def lose(self, endpoint: str) -> None:
        """See `Findable.lose`."""
        self._membership.lose(endpoint)

    def register_shared(self, spec: SourceSpec) -> None:
        """See `Kept.register_shared`."""
        self._membership.register_shared(spec)
        self._await(spec)  # the store may have been out of reach when we started

    def unregister_shared(self, source: str) -> None:
        """See `Kept.unregister_shared`."""
        self._membership.unregister_shared(source)

    # The life of a followed source

    def _follow(self, source: str, spec: SourceSpec) -> None:
        """Follow a source that was registered.  Raises KvIndexerError if that can't be."""
        self._sources[source] = known = Followed(source, spec, self._stream(spec), self._rule, self.index)
        self._answers.add(known)
        self._start(known)
        self._room.followed(len(self._sources))
        tell(_log, logging.INFO, "source registered", source=source, instance=spec.instance, model=spec.model)

    def _stream(self, spec: SourceSpec) -> Stream:
        return open_stream(self.settings, spec)

    def _start(self, known: Followed) -> None:
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

    def _hang_up(self, source: str, spec: SourceSpec) -> None:
        """Forget a source that is no longer registered, with all that it holds."""
        if self._subscriber is not None:
            self._subscriber.remove(source)
        if spec.life:
            self._keeper.ended(source)
        self._keeper.forget(source)
        self.changes.forgotten(source)
        self.index.detach(source)
        self._answers.remove(self._sources.pop(source))
        tell(_log, logging.INFO, "source unregistered", source=source, instance=spec.instance, model=spec.model)

    def follow_anew(self, source: str) -> None:
        """See `Kept.follow_anew`."""
        known = self._sources.get(source)
        if known is None or self._subscriber is None:
            return
        self._subscriber.remove(source)
        known.stream = self._stream(known.spec)
        self._start(known)
        self.changed(source)

    def _least_trusted(self) -> Iterator[str]:
        """Sources in the order in which their entries may go when the index is full."""
        order = sorted(
            self._sources.values(),
            key=lambda known: (TRUST[known.stream.state], known.stream.sound, known.stream.complete),
        )
        return (known.source for known in order)

    # Answers

    def problems(self) -> Sequence[StoreProblem]:
        """What is wrong with the durable copy."""
        return self._keeper.problems()

    def store(self) -> StoreFigures:
        """How the durable copy is doing."""
        return self._keeper.figures()

    def finding(self) -> FindingFigures:
        """How the search for sources is doing."""
        return self._finder.figures()

    def status(self, instance: str) -> InstanceStatus:
        """Worst of what is known of the instance's sources."""
        return self._answers.status(instance)

    def each_status(self, instances: Sequence[str]) -> list[InstanceStatus]:
        """See `status`; cheaper for many."""
        return self._answers.each_status(instances)

    def reports(self) -> list[SourceReport]:
        """Everything worth knowing of each source."""
        return self._answers.reports(self._sources.values(), self._membership.silent())

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
        for known in self._answers.of(instance):
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
            known.unread(f"message {seq} can't be read: {error.reason}")
            self._counters.skipped({error.reason: 1})
            self._keeper.applied(source, seq, payload, Change())
            return
        except Exception:  # noqa: BLE001 - one bad source must not stop the others; it is logged and its flags go
            known.unread(f"message {seq} could not be applied")
            self._counters.skipped({"internal_error": 1})
            _log.exception("source %s: message %d could not be applied", source, seq)
            self._keeper.applied(source, seq, payload, Change())
            return
        self._counters.applied(change)
        if self._speculation.alive:
            self._confirm(source, change)
        known.consider(seq, change)
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

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """Forget what a life that is over held; tiers that outlive it stay, and are not proven any more."""
        known = self._sources.get(source)
        if known is None:
            return
        entries = known.withdraw(everything=everything)
        self._counters.withdrawn(reason, entries)
        self.changes.withdrawn(source)
        self._keeper.withdrawn(source, reason)
        tell(_log, logging.WARNING, "entries withdrawn", source=source, entries=entries, reason=reason)

    def changed(self, source: str) -> None:
        """Forget what was answered about the source's instance."""
        known = self._sources.get(source)
        if known is not None:
            self._answers.changed(known.spec.instance)
            known.tell()

    def dropped(self, source: str, reason: str) -> None:  # noqa: ARG002 - metrics have no label a source could choose
        """Count a frame that had no effect."""
        self._counters.skipped({reason: 1})
