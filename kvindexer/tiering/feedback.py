"""What engines report against what was predicted: figures of one source, and when its claims are not believed.

    outcome    exact | over (predicted more than was cached) | under (the engine had more)
    wrong      over by more than a block: a claim of blocks that were not there
    verdict    of the last reports within the window, at least `min_reports`, a share of at least `wrong_share`
               was wrong: the source is to be verified anew, and then not again before `pause_s`

An over-prediction may be haste: a block can go between question and prefill.  So one says nothing; many of them at
once do.  Under-predictions cost a hit, not the truth of a claim, and are only counted.

Times are of any one monotonic clock, in seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

Outcome = Literal["exact", "over", "under"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("exact", "over", "under")

MAX_REMEMBERED: Final = 256
"""Most reports of a source that a verdict looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRule:
    """When a source is not believed any more; the settings of these names with `feedback_` say what they mean."""

    window_s: float = 60.0
    min_reports: int = 8
    wrong_share: float = 0.5
    pause_s: float = 300.0


class AccuracyFigures(NamedTuple):
    """What was reported of a source so far."""

    exact: int
    over: int
    under: int
    predicted_tokens: int
    cached_tokens: int
    doubts: int
    """How often the source was found wrong and had to be verified anew."""


class Report(NamedTuple):
    """What one report says."""

    outcome: Outcome
    doubt: bool
    """The source is to be verified anew."""


def outcome_of(predicted_tokens: int, cached_tokens: int) -> Outcome:
    """How a prediction came out."""
    if predicted_tokens == cached_tokens:
        return "exact"
    return "over" if predicted_tokens > cached_tokens else "under"


class Accuracy:
    """The reports on one source."""

    __slots__ = ("_counts", "_recent", "_rule", "_silent_until", "cached_tokens", "doubts", "predicted_tokens")

    def __init__(self, rule: FeedbackRule) -> None:
        self._rule = rule
        self._counts: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self._recent: deque[tuple[float, bool]] = deque(maxlen=MAX_REMEMBERED)
        self._silent_until: float | None = None
        self.predicted_tokens = 0
        self.cached_tokens = 0
        self.doubts = 0

    def add(self, predicted_tokens: int, cached_tokens: int, block_size: int, now: float) -> Report:
        """One more report."""
        outcome = outcome_of(predicted_tokens, cached_tokens)
        self._counts[outcome] += 1
        self.predicted_tokens += predicted_tokens
        self.cached_tokens += cached_tokens
        recent, rule = self._recent, self._rule
        if predicted_tokens:  # nothing was claimed, so nothing can have been wrong
            recent.append((now, predicted_tokens - cached_tokens > block_size))
        while recent and recent[0][0] <= now - rule.window_s:
            recent.popleft()
        if outcome != "over" or (self._silent_until is not None and now < self._silent_until):
            return Report(outcome, doubt=False)
        wrong = sum(was_wrong for _, was_wrong in recent)
        doubt = len(recent) >= rule.min_reports and wrong >= rule.wrong_share * len(recent)
        if doubt:
            self.doubts += 1
            self._silent_until = now + rule.pause_s
            recent.clear()
        return Report(outcome, doubt)

    @property
    def figures(self) -> AccuracyFigures:
        """All counts."""
        counts = self._counts
        return AccuracyFigures(
            counts["exact"],
            counts["over"],
            counts["under"],
            self.predicted_tokens,
            self.cached_tokens,
            self.doubts,
        )
