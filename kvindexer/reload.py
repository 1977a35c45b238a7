"""Reading the configuration again at SIGHUP: sources, tokens and log level, without a restart.

    SIGHUP ─► variables, file and flags, as at the start ─► what differs ─┬─► sources, log level, tokens: applied
                                                                         └─► the rest: named, it needs a restart

Invariant: settings that can't be used change nothing.  What did not change is not touched: its stream goes on.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Final, Literal, Protocol

from kvindexer.errors import KvIndexerError, RequestError, SettingsError
from kvindexer.events.configured import Difference, difference, rehearse
from kvindexer.settings import Settings
from kvindexer.types import SourceSpec
from kvindexer.watching.logs import OURS, set_level

_log = logging.getLogger(__name__)

Outcome = Literal["applied", "partial", "refused"]
"""`partial`: some sources are not followed, because what others have registered contradicts them."""

RELOADED: Final = ("sources", "log_level")
"""Settings that are applied while the service runs."""


class Configurable(Protocol):
    """The fleet, as far as its sources come from the settings."""

    def follow_configured(self, spec: SourceSpec) -> None:
        """Follow what the settings name as of now.  Raises KvIndexerError."""

    def forget_configured(self, spec: SourceSpec) -> None:
        """The settings don't name it any more."""


class Reloads:
    """Reads the configuration again at each signal; made before the first reading, so that none is lost.

    `load` reads variables, file and flags, and raises nothing but SettingsError.
    """

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._asked = asyncio.Event()
        signal.signal(signal.SIGHUP, self._early)

    def _early(self, _number: int, _frame: FrameType | None) -> None:
        """Nothing runs yet, and what is being read may be from before the change."""
        self._asked.set()

    @asynccontextmanager
    async def running(
        self,
        settings: Settings,
        fleet: Configurable,
        count: Callable[[Outcome], None],
        read_tokens: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[None]:
        """Listen for the signal while it is entered; `settings` are those that run.

        `read_tokens` raises SettingsError if the tokens can't be used, and goes on with those it had.
        """
        applying = _Applying(settings, fleet, read_tokens)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        task = asyncio.create_task(self._keep(applying, count), name="kvindexer-reload")
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end must not be cut short by it
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self, applying: _Applying, count: Callable[[Outcome], None]) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            outcome: Outcome = "refused"
            try:
                read = await asyncio.to_thread(self._load)
                outcome = await applying.apply(read)
            except KvIndexerError as error:
                _log.error("configuration not read again, all goes on as before: %s", error)
            except Exception:  # noqa: BLE001 - the next reading may be better; it is logged
                _log.exception("configuration not read again")
            count(outcome)


class _Applying:
    """What runs, and how it becomes what was read."""

    def __init__(self, running: Settings, fleet: Configurable, read_tokens: Callable[[], None]) -> None:
        self._running = running
        self._fleet = fleet
        self._read_tokens = read_tokens

    async def apply(self, read: Settings) -> Outcome:
        """Apply what can be; raises KvIndexerError, and has changed nothing, if it can't be used."""
        after = await asyncio.to_thread(_fitting, self._running, read)
        self._read_tokens()
        before = self._running
        changes = difference(before.sources, after.sources)
        failed = await self._follow(changes)
        followed = tuple(spec for spec in after.sources if spec not in failed)  # the others are tried again next time
        self._running = after.model_copy(update={"sources": followed})
        waiting = _for_a_restart(read, after)
        level = logging.WARNING if waiting or failed else logging.INFO
        ours, wanted = logging.getLogger(OURS), logging.getLevelNamesMapping()[after.log_level.upper()]
        ours.setLevel(min(ours.level, wanted))  # whoever makes the log quieter sees this last line, too
        _log.log(level, "configuration read again: %s", _said(before, after, changes, len(failed), waiting))
        set_level(after.log_level)
        return "partial" if failed else "applied"

    async def _follow(self, changes: Difference) -> set[SourceSpec]:
        """Change sources, one after the other with everybody else's turn between; returns what can't be followed."""
        for spec in changes.gone:  # first, since a rank has one publisher
            self._fleet.forget_configured(spec)
            await asyncio.sleep(0)
        failed = set()
        for spec in changes.come:
            try:
                self._fleet.follow_configured(spec)
            except KvIndexerError as error:
                failed.add(spec)
                _log.warning("source %s of the configuration is not followed: %s", spec.endpoint, error)
            await asyncio.sleep(0)
        return failed


def _fitting(running: Settings, read: Settings) -> Settings:
    """The running settings with those that can change as read; the running rest of them has to allow it."""
    values = {name: getattr(running, name) for name in Settings.model_fields}
    try:
        after = Settings(**values | {name: getattr(read, name) for name in RELOADED})
        rehearse(after)
    except (SettingsError, RequestError) as error:
        names = _for_a_restart(read, running)
        hint = f"; changed as well, but needs a restart first: {', '.join(names)}" if names else ""
        raise KvIndexerError(f"{error}{hint}") from None
    return after


def _for_a_restart(read: Settings, running: Settings) -> list[str]:
    """Names of settings that were read and are not those that run."""
    names = (name for name in Settings.model_fields if name not in RELOADED)
    return sorted(name for name in names if getattr(read, name) != getattr(running, name))


def _said(before: Settings, after: Settings, changes: Difference, failed: int, waiting: list[str]) -> str:
    added, removed, changed = changes.counts()
    parts = [f"sources: {added} added, {removed} removed, {changed} changed"]
    if failed:
        parts.append(f"{failed} of them not followed")
    if after.log_level != before.log_level:
        parts.append(f"log level {after.log_level}")
    if waiting:
        parts.append(f"needs a restart: {', '.join(waiting)}")
    return "; ".join(parts)
