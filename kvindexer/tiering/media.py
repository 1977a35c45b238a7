"""Which tier a publisher's `medium` names.

Engines spell media as they like ("GPU", "cpu", "CPU_PINNED", "STORAGE"); the comparison ignores case.  The table
is a setting: rows of `Settings.media` come on top of the built-in ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvindexer.types import Tier

MEDIA: Final[Mapping[str, Tier]] = {
    "GPU": Tier.GPU,
    "CPU": Tier.CPU,
    "CPU_PINNED": Tier.CPU,
    "CPU_TIER1": Tier.CPU,
    "CPU_TIER2": Tier.CPU,
    "DISK": Tier.DISK,
    "STORAGE": Tier.DISK,
    "FS": Tier.DISK,
    "SHARED_STORAGE": Tier.REMOTE,
    "OBJECT_STORE": Tier.REMOTE,
    "OBJ": Tier.REMOTE,
    "EXTERNAL": Tier.REMOTE,
}

REMOTE_LOCALITY: Final = "REMOTE"


def tier_named(name: str) -> Tier:
    """The tier called `gpu`, `cpu`, `disk` or `remote`.  Raises ValueError for another name."""
    try:
        return Tier[name.upper()]
    except KeyError:
        listed = ", ".join(tier.label for tier in Tier)
        raise ValueError(f"{name!r} is no tier: {listed}") from None


class MediaTable:
    """Maps (medium, locality) to a tier; an unknown medium is `remote`, the tier nobody prefers."""

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        rows = {medium.upper(): tier_named(tier) for medium, tier in (extra or {}).items()}
        self._rows: dict[str, Tier] = {**MEDIA, **rows}

    def tier(self, medium: str, locality: str | None = None) -> tuple[Tier, bool]:
        """The tier of a medium, and whether the medium is known."""
        if locality is not None and locality.upper() == REMOTE_LOCALITY:
            return Tier.REMOTE, True
        found = self._rows.get(medium.upper())
        return (Tier.REMOTE, False) if found is None else (found, True)
