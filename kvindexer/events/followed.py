"""One followed source: its machine, its share of the index, and what each batch means for the truth of its flags.

Invariant: whatever the index could not read, keep or be sure of shows in the source's flags.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Final

from kvindexer.events.states import State
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.index.seam import Change, Index
from kvindexer.index.topology import is_store
from kvindexer.settings import Settings
from kvindexer.tiering.feedback import Accuracy, FeedbackRule
from kvindexer.tiering.media import tier_named
from kvindexer.types import TIERS, SourceSpec, Tier
from kvindexer.watching.logs import tell

_log = logging.getLogger(__name__)

TRUST: Final = {State.GONE: 0, State.STALE: 1, State.SYNCING: 2, State.LIVE: 3}
"""How far a state is trusted."""
_JITTER: Final = 0.2
"""How far probes and retries of different sources are spread, so that a fleet does not ask in one voice."""
_LOST_EVENTS: Final = ("bad_event", "over_bound")


def open_stream(settings: Settings, spec: SourceSpec) -> Stream:
    """The machine of a source that has just come, or is followed anew."""
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


class Followed:
    """What the service keeps of one source, beside its share of the index."""

    def __init__(self, source: str, spec: SourceSpec, stream: Stream, rule: FeedbackRule, index: Index) -> None:
        self.source = source
        self.spec = spec
        self.stream = stream
        self.accuracy = Accuracy(rule)
        self.batches = 0
        self.poison = 0
        self._index = index
        self._told, self._told_epoch, self._told_at = State.SYNCING, stream.epoch, time.monotonic()
        """The state and life that the log knows, and since when."""

    @property
    def complete(self) -> bool:
        """Nothing that the source holds may be missing."""
        return self.stream.complete and not self._index.truncated(self.source)

    def unread(self, why: str) -> None:
        """A whole message had no effect."""
        self.poison += 1
        self.stream.damaged(why)

    def consider(self, seq: int, change: Change) -> None:
        """What a batch means for the truth of the source's flags."""
        lost = sum(change.skipped.get(reason, 0) for reason in _LOST_EVENTS)
        if lost:
            self.poison += lost
            self.stream.damaged(f"{lost} events could not be read or kept")
        if change.uncertain:
            tiers = ", ".join(tier.label for tier in change.uncertain)
            self.stream.uncertain(f"the cache was reset; whether {tiers} was emptied too is not on the wire")
        elif change.cleared and not lost:
            blocks = self._index.stats(self.source).blocks
            if not any(blocks[tier] for tier in TIERS if tier not in change.cleared):
                self.stream.cleared(seq)

    def withdraw(self, *, everything: bool) -> int:
        """Forget what a life that is over held; tiers that outlive it stay, and are not proven any more.

        Returns how many entries went.
        """
        durable: set[Tier] = set() if everything else {tier_named(name) for name in self.spec.durable_tiers}
        if is_store(self.spec) and not everything:
            durable = set(TIERS)
        entries = self._index.withdraw(self.source, [tier for tier in TIERS if tier not in durable])
        if any(self._index.stats(self.source).blocks):
            self.stream.uncertain("entries of an earlier life were kept")
        return entries

    def tell(self) -> None:
        """If the source has another state, or another life: one line, with how long the last one lasted."""
        stream = self.stream
        if stream.state is self._told and stream.epoch == self._told_epoch:
            return
        now = time.monotonic()
        before, self._told = self._told, stream.state
        lasted_s, self._told_at, self._told_epoch = now - self._told_at, now, stream.epoch
        tell(
            _log,
            logging.INFO if stream.state in (State.LIVE, State.SYNCING) else logging.WARNING,
            f"source {stream.state.value}",
            source=self.source,
            instance=self.spec.instance,
            before=before.value,
            duration_ms=round(1000 * lasted_s, 1),
            epoch=stream.epoch,
            seq=stream.last_seq,
            sound=stream.sound,
            complete=self.complete,
            blocks=sum(self._index.stats(self.source).blocks),
            why=stream.why,
        )
