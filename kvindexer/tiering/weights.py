"""How much a prefix is worth, by the tier it lies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvindexer.types import TIERS, Tier

DEFAULT_WEIGHTS: Final[Mapping[Tier, float]] = {Tier.GPU: 1.0, Tier.CPU: 0.8, Tier.DISK: 0.4, Tier.REMOTE: 0.2}


def score(cumulative: tuple[int, int, int, int], weights: Mapping[Tier, float] = DEFAULT_WEIGHTS) -> float:
    """Weighted length of a prefix: what each tier adds to the nearer ones, times the tier's weight.

    `cumulative` is in blocks or tokens, in the order of `TIERS`; the score is in the same unit.
    """
    total, nearer = 0.0, 0
    for tier in TIERS:
        total += (cumulative[tier] - nearer) * weights[tier]
        nearer = cumulative[tier]
    return total
