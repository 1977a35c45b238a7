"""The sources that the settings name: what a second reading of them changes, and whether they can be followed at all.

Only what differs between two readings is touched: a source that stands in both as it was goes on undisturbed, and so
does what somebody has unregistered over HTTP since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvindexer.events.listing import is_listing
from kvindexer.events.sources import Registry
from kvindexer.settings import Settings
from kvindexer.types import SourceSpec


class Difference(NamedTuple):
    """From the sources of one reading to those of the next; a source with other values is in both lists."""

    gone: tuple[SourceSpec, ...]
    come: tuple[SourceSpec, ...]

    def counts(self) -> tuple[int, int, int]:
        """How many were added, removed and changed."""
        gone, come = ({spec.endpoint for spec in specs} for specs in self)
        return len(come - gone), len(gone - come), len(gone & come)


def difference(before: Sequence[SourceSpec], after: Sequence[SourceSpec]) -> Difference:
    """What has to be given up, and what has to be followed."""
    earlier, later = set(before), set(after)
    return Difference(
        tuple(dict.fromkeys(spec for spec in before if spec not in later)),
        tuple(dict.fromkeys(spec for spec in after if spec not in earlier)),
    )


def rehearse(settings: Settings) -> None:
    """Register the sources of the settings with nobody.  Raises RequestError for those that contradict each other."""
    registry = Registry(settings.allowed_endpoints, settings.max_sources, settings.bind_endpoints)
    for spec in settings.sources:
        if is_listing(spec.endpoint):
            registry.check_endpoint(spec.endpoint)
        else:
            registry.register(spec)
