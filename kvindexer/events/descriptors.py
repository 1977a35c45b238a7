"""Open files: how many sources they leave room for, and a word in time before that runs out.

`max_sources` is a bound, not a plan: by default it is far above what most fleets have, so a limit of the operating
system below it (RLIMIT_NOFILE) is no trouble by itself.  It is one where sources come near it.

Invariant: on the way up it is warned of once, and again only after half of the room was free meanwhile.
"""

from __future__ import annotations

import logging
import resource
from typing import Final

from kvindexer.settings import Settings

_log = logging.getLogger(__name__)

DESCRIPTORS_A_SOURCE: Final = 8
"""SUB, its monitor's two ends, the TCP connection, a replay with its own, and room for its successor."""
SPARE_DESCRIPTORS: Final = 1024
_NEAR: Final = 0.9
_FAR: Final = 0.5


def wanted_descriptors(settings: Settings) -> int:
    """Open files that as many sources as may be registered need."""
    return DESCRIPTORS_A_SOURCE * settings.max_sources + SPARE_DESCRIPTORS + settings.max_connections


def room_in(allowed: int, settings: Settings) -> int:
    """How many sources so many open files are enough for, besides the connections of callers."""
    if allowed == resource.RLIM_INFINITY:
        return settings.max_sources
    left = allowed - SPARE_DESCRIPTORS - settings.max_connections
    return min(settings.max_sources, max(0, left) // DESCRIPTORS_A_SOURCE)


def shortage(settings: Settings, allowed: int) -> str:
    """What is wrong with the limit for these settings; nothing, if what they name or ask for has room."""
    room = room_in(allowed, settings)
    named = len(settings.sources)
    if "max_sources" in settings.model_fields_set and settings.max_sources > room:
        return _said(f"max_sources={settings.max_sources} is asked for", allowed, room)
    if named and room < settings.max_sources and named >= room * _NEAR:
        return _said(f"{named} sources are configured", allowed, room)
    return ""


def _said(what: str, allowed: int, room: int) -> str:
    more = "allow more (ulimit -n, LimitNOFILE) or lower max_connections"
    return f"{what}, and {allowed} open files are enough for about {room}: {more}"


class Room:
    """How near the sources that are followed are to what the open files allow."""

    def __init__(self, settings: Settings) -> None:
        self._allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._room = room_in(self._allowed, settings)
        self._bounded = self._room < settings.max_sources
        self._told = bool(shortage(settings, self._allowed))  # at the start, by whoever raised the limit

    def followed(self, sources: int) -> None:
        """So many are followed now."""
        if self._told:
            self._told = sources > self._room * _FAR
        elif self._bounded and sources >= self._room * _NEAR:
            self._told = True
            _log.warning("%s", _said(f"{sources} sources are followed", self._allowed, self._room))
