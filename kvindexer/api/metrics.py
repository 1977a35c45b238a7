"""Counters of the service, in Prometheus' text format.

The hot paths only add to plain integers; names, labels and histograms are put together at scrape time.  Labels
have few values, all of them ours: never the name of a model, an instance or anything else a caller can choose.

Invariant: a counter never falls, whatever sources come and go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from kvindexer import __version__
from kvindexer.api.counting import Accumulated, Latencies
from kvindexer.api.fleet import FindingFigures, Fleet, SourceReport, StoreFigures, StoreProblem
from kvindexer.index.seam import Change
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.feedback import OUTCOMES, Outcome
from kvindexer.tiering.heat import HeatCounts
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import TIERS
from kvindexer.watching.tracing import SPAN_OUTCOMES, SpanOutcome
from kvindexer.watching.work import present

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
STATES: Final = ("syncing", "live", "stale", "gone")
STREAM_ENDS: Final = ("ask_again", "hung_up", "leaving", "too_slow", "took_nothing")
"""How a stream of /v1/changes ends: the follower went, we go, it fell behind what is kept, or took nothing."""
RELOADS: Final = ("applied", "partial", "refused")
"""What becomes of a configuration that is read again."""
MAX_LABELS: Final = 64
"""Different values of one label, at most; further ones are counted as `other`."""


class Metrics:
    """All counters of one service; `collect` is what Prometheus' registry calls at a scrape."""

    def __init__(self) -> None:
        self.events = 0
        self.batches = 0
        self.stored = 0
        self.removed = 0
        self.queries = 0
        self.hit_tokens = 0
        self.asked_tokens = 0
        self._skipped: Counter[str] = Counter()
        self._withdrawn: Counter[str] = Counter()
        self._texts: Counter[str] = Counter()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._latencies: dict[str, Latencies] = {}
        self._gaps = Accumulated()
        self._unfilled = Accumulated()
        self._replays = Accumulated()
        self._unreadable = Accumulated()
        self._streams: Counter[str] = Counter(dict.fromkeys(STREAM_ENDS, 0))
        self._spans: Counter[str] = Counter(dict.fromkeys(SPAN_OUTCOMES, 0))
        self._max_entries = 0
        self._requests: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._feedback: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._predicted_tokens = 0
        self._cached_tokens = 0
        self._doubts = 0
        self._reloads: Counter[str] = Counter(dict.fromkeys(RELOADS, 0))
        self._reloaded_whole = True
        self._fleet: Fleet | None = None
        self._speculation: Speculation | None = None
        self._heat: HeatCounts | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def watch(self, fleet: Fleet) -> None:
        """Take the figures of the sources from this fleet."""
        self._fleet = fleet

    def watch_tiering(self, speculation: Speculation, heat: HeatCounts) -> None:
        """Take the figures of what is routed and of what is asked for from these."""
        self._speculation, self._heat = speculation, heat

    def watch_bounds(self, max_entries: int, requests: Callable[[], tuple[int, int]]) -> None:
        """Take what is full or nearly so from these; `requests` says how many are open, and how many may be."""
        self._max_entries, self._requests = max_entries, requests

    def render(self) -> bytes:
        """The whole as text."""
        return generate_latest(self._registry)

    # Ingest

    def applied(self, change: Change) -> None:
        """A batch went into the index."""
        self.batches += 1
        self.events += change.events
        self.stored += change.stored
        self.removed += change.removed
        if change.skipped:
            self.skipped(change.skipped)

    def skipped(self, reasons: Mapping[str, int]) -> None:
        """Messages, events or blocks had no effect."""
        for reason, count in reasons.items():
            self._skipped[_bounded(reason, self._skipped)] += count

    def withdrawn(self, reason: str, entries: int) -> None:
        """Entries of a source were dropped because they may be gone."""
        self._withdrawn[_bounded(reason, self._withdrawn)] += entries

    # Queries

    def asked(self, hit_tokens: int, asked_tokens: int) -> None:
        """A query was answered; `hit_tokens` is the figure of its best instance."""
        self.queries += 1
        self.hit_tokens += hit_tokens
        self.asked_tokens += asked_tokens
        work = present()
        if work is not None:
            work.prompts += 1
            work.tokens += asked_tokens
            work.hit_tokens += hit_tokens

    def text(self, outcome: str) -> None:
        """A query's text has become tokens, or has not; `outcome` is one of our words."""
        self._texts[outcome] += 1

    def feedback(self, outcome: Outcome, predicted_tokens: int, cached_tokens: int, doubted: int) -> None:
        """An engine's report came in; `doubted` sources were wrong too often."""
        self._feedback[outcome] += 1
        self._predicted_tokens += predicted_tokens
        self._cached_tokens += cached_tokens
        self._doubts += doubted

    def spans(self, outcome: SpanOutcome, count: int) -> None:
        """Spans were sent to the collector, or could not be; called by one thread beside the loop."""
        self._spans[outcome] += count

    def stream_ended(self, reason: str) -> None:
        """A stream of /v1/changes is over; `reason` is one of `STREAM_ENDS`."""
        self._streams[reason] += 1

    def reloaded(self, outcome: str) -> None:
        """The configuration was read again; `outcome` is one of `RELOADS`."""
        self._reloads[outcome] += 1
        self._reloaded_whole = outcome == "applied"

    def answered(self, route: str, status: int, seconds: float | None) -> None:
        """A request was answered; `route` is one of our paths, never what the caller wrote.

        `seconds` is the time since its body was complete; None: it was refused before.
        """
        self._answers[route, status] += 1
        if seconds is None:
            return
        latencies = self._latencies.get(route)
        if latencies is None:
            latencies = self._latencies[route] = Latencies()
        latencies.add(seconds)

    # Scrape

    def collect(self) -> Iterator[Metric]:
        """Every metric; the table of docs/metrics.md names them in this order."""
        build = GaugeMetricFamily("kvindexer_build_info", "1; which version runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield _counter("events_applied", "Events applied to the index.", self.events)
        yield _counter("batches_applied", "Batches (messages) applied to the index.", self.batches)
        yield _counter("blocks_stored", "Blocks that events announced as stored.", self.stored)
        yield _counter("blocks_removed", "Blocks that events announced as removed.", self.removed)
        yield _counters(
            "skipped",
            "Messages, events and blocks without effect, or not the one asked for.",
            "reason",
            self._skipped,
        )
        yield _counters(
            "entries_withdrawn", "Entries dropped because they may be gone, by reason.", "reason", self._withdrawn
        )
        yield from self._of_sources(self._fleet.reports() if self._fleet is not None else [])
        if self._fleet is not None:
            yield from self._of_store(self._fleet.store(), self._fleet.problems())
            yield from _of_discovery(self._fleet.finding())
        yield from self._of_queries()
        yield from self._of_feedback()
        if self._fleet is not None:
            yield from self._of_changes(self._fleet.changes)
        if self._speculation is not None and self._heat is not None:
            yield from _of_tiering(self._speculation, self._heat)
        yield _counters("trace_spans", "Spans for the collector of traces.", "outcome", self._spans)
        yield _counters("config_reloads", "Readings of the configuration at SIGHUP.", "outcome", self._reloads)
        whole = int(self._reloaded_whole)
        yield _gauge("config_reload_successful", "1 unless the last of them was not applied as a whole.", whole)

    def _of_sources(self, reports: list[SourceReport]) -> Iterator[Metric]:
        yield _counter("gaps", "Holes seen in the order of messages.", self._gaps.look(_sums(reports, "gaps")))
        unfilled = self._unfilled.look(_sums(reports, "unfilled"))
        yield _counter("gaps_unfilled", "Holes of them that no replay could fill.", unfilled)
        open_gaps = sum(report.gap_open for report in reports)
        yield _gauge("sources_with_gap", "Sources with a hole whose replay is under way.", open_gaps)
        yield _counter("replays", "Replays asked for.", self._replays.look(_sums(reports, "replays")))
        sources = GaugeMetricFamily("kvindexer_sources", "Registered sources, by state.", labels=["state"])
        for state in STATES:
            sources.add_metric([state], sum(report.state == state for report in reports))
        yield sources
        yield _gauge("sources_unsound", "Sources of which claimed blocks may be gone.", _without(reports, "sound"))
        yield _gauge("sources_incomplete", "Sources of which blocks may be missing.", _without(reports, "complete"))
        blocks = GaugeMetricFamily(
            "kvindexer_blocks", "Entries in the index, by tier and state of their source.", labels=["tier", "state"]
        )
        for tier in TIERS:
            for state in STATES:
                held = sum(report.blocks[tier] for report in reports if report.state == state)
                blocks.add_metric([tier.label, state], held)
        yield blocks
        yield _gauge("blocks_limit", "Most entries that the index may hold (`max_entries`).", self._max_entries)
        orphans = sum(report.orphans for report in reports)
        yield _gauge("orphans", "Held blocks whose place in a prompt is not known yet.", orphans)
        poison = sum(report.poison for report in reports)
        yield _gauge("poison", "Unreadable batches and events of the registered sources.", poison)
        unreadable = self._unreadable.look(_sums(reports, "poison"))
        yield _counter("unreadable", "Unreadable batches and events of all sources that there were.", unreadable)
        lag_s = max((report.lag_ms for report in reports), default=0.0) / 1000
        yield _gauge("ingest_lag_seconds", "Age of the oldest message received and not applied.", lag_s)
        yield _age(
            "event_age_seconds",
            "Time since the last event of any source; absent if there was none.",
            min((report.last_event_s for report in reports if report.last_event_s is not None), default=None),
        )
        yield _age(
            "verified_age_seconds",
            "Longest time since a source was proven to be in step; of those that ever were.",
            max((report.verified_s for report in reports if report.verified_s is not None), default=None),
        )
        yield _gauge("ready", "1 once the service is ready.", int(self._fleet is not None and self._fleet.ready))

    def _of_store(self, store: StoreFigures, problems: Iterable[StoreProblem]) -> Iterator[Metric]:
        yield _gauge("store_reachable", "1 if the store answers, or there is none.", int(store.reachable))
        yield _gauge("store_replicas", "Replicas heard lately, with this one.", store.replicas)
        yield _counter("store_writes", "Writes of a source to the store, refused ones too.", store.writes)
        yield _counter("store_records_written", "Records sent to the store.", store.records_written)
        yield _counter("store_refusals", "Writes refused: the store knew better or more.", store.refusals)
        yield _counter("store_checks", "Comparisons of a source in memory and in the store.", store.checks)
        yield _counter("store_divergences", "Comparisons that found a difference.", store.divergences)
        shards = GaugeMetricFamily(
            "kvindexer_store_shards", "Sources by how the store stands to memory.", labels=["state"]
        )
        for state, count in store.shards.items():
            shards.add_metric([state], count)
        yield shards
        yield _gauge("store_lag_seconds", "Age of the oldest change that is not in the store.", store.lag_s)
        yield _gauge("store_pending_bytes", "Changes that wait for the store.", store.pending_bytes)
        reasons = Counter(problem.reason for problem in problems)
        found = GaugeMetricFamily("kvindexer_store_problems", "What is wrong with the store.", labels=["reason"])
        for reason, count in sorted(reasons.items()):
            found.add_metric([reason], count)
        yield found

    def _of_queries(self) -> Iterator[Metric]:
        yield _counter("queries", "Prefix queries answered.", self.queries)
        yield _counter("asked_tokens", "Tokens of the prompts that were asked for.", self.asked_tokens)
        yield _counter("hit_tokens", "Tokens of them that the best instance holds.", self.hit_tokens)
        yield _counters("texts", "Texts of queries, by what became of them.", "outcome", self._texts)
        answers = CounterMetricFamily("kvindexer_http_requests", "Requests answered.", labels=["route", "status"])
        for (route, status), count in sorted(self._answers.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
        is_open, limit = self._requests()
        yield _gauge("http_requests_open", "Requests that are being answered, streams among them.", is_open)
        yield _gauge("http_requests_limit", "Most of them at once (`max_concurrent_requests`).", limit)
        latency = HistogramMetricFamily(
            "kvindexer_http_request_duration_seconds",
            "Time to answer a request whose body has been received.",
            labels=["route"],
        )
        for route, latencies in sorted(self._latencies.items()):
            latency.add_metric([route], buckets=latencies.cumulative(), sum_value=latencies.sum_s)
        yield latency

    def _of_changes(self, changes: ChangeLog) -> Iterator[Metric]:
        yield _gauge("changes_followers", "Followers of /v1/changes.", changes.followers)
        yield _gauge("changes_kept_bytes", "Recent changes kept for them.", changes.kept_bytes)
        yield _counters("changes_ended", "Streams of changes that ended, by reason.", "reason", self._streams)

    def _of_feedback(self) -> Iterator[Metric]:
        yield _counters("feedback", "Reports of engines, by how the prediction came out.", "outcome", self._feedback)
        yield _counter("feedback_predicted_tokens", "Tokens that were predicted as cached.", self._predicted_tokens)
        yield _counter("feedback_cached_tokens", "Tokens that engines reported as cached.", self._cached_tokens)
        yield _counter("feedback_doubts", "Sources that were wrong too often and verified anew.", self._doubts)


def _of_discovery(finding: FindingFigures) -> Iterator[Metric]:
    yield _gauge("discovery_pods", "Pods that discovery's selectors choose.", finding.pods)
    yield _gauge("discovery_followed", "Pods of them with a source that is followed.", finding.followed)
    yield _gauge("discovery_waiting", "Pods of them whose engine has not answered yet.", finding.waiting)
    reasons = Counter(problem.reason for problem in finding.problems)
    problems = GaugeMetricFamily("kvindexer_discovery_problems", "What is wrong with discovery.", labels=["reason"])
    for reason, count in sorted(reasons.items()):
        problems.add_metric([reason], count)
    yield problems
    yield _counter("discovery_relists", "Lists of the API server that were read anew.", finding.relists)
    yield _counters("discovery_errors", "Lists and watches that failed, by reason.", "reason", finding.errors)
    yield _age(
        "discovery_contact_age_seconds",
        "Longest time since the API server said something of a list; absent if it never has.",
        finding.contact_s,
    )


def _of_tiering(speculation: Speculation, heat: HeatCounts) -> Iterator[Metric]:
    speculation.expire(monotonic())
    yield _counter("routed", "Prompts told to /v1/routed.", speculation.routed)
    yield _gauge("speculative_blocks", "Blocks of them that no event has confirmed yet.", speculation.blocks)
    ended = {"confirmed": speculation.confirmed, "expired": speculation.expired, "made_room": speculation.made_room}
    yield _counters("speculative_ended", "Blocks of them that are not awaited any more.", "reason", ended)
    yield _gauge("heat_blocks", "Blocks whose heat is counted.", heat.blocks)
    yield _counter("heat_prompts", "Prompts whose blocks were counted.", heat.counted)
    yield _counter("heat_left_out", "Prompts for which there was no time; others stand for them.", heat.left_out)


def _bounded(label: str, known: Mapping[str, int]) -> str:
    return label if label in known or len(known) < MAX_LABELS else "other"


def _sums(reports: Iterable[SourceReport], field: str) -> dict[str, int]:
    return {report.source: getattr(report, field) for report in reports}


def _without(reports: Iterable[SourceReport], flag: str) -> int:
    return sum(not getattr(report, flag) for report in reports)


def _counter(name: str, documentation: str, value: int) -> Metric:
    return CounterMetricFamily(f"kvindexer_{name}", documentation, value=value)


def _counters(name: str, documentation: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"kvindexer_{name}", documentation, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _age(name: str, documentation: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"kvindexer_{name}", documentation, value=value)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kvindexer_{name}", documentation, value=value)


__all__ = ["CONTENT_TYPE", "STATES", "Metrics"]
