"""Everything about access that a service opens at start, and keeps watching: who may come in, and its own TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvindexer.access.guard import Guard, Reread, open_guard, reload_all, watch
from kvindexer.access.kept import Trouble
from kvindexer.access.transport import RotatingContext, open_transport
from kvindexer.settings import Settings


class Access:
    """The guard, None: everybody may do everything; and the context of TLS, None: plain HTTP."""

    def __init__(self, guard: Guard | None = None, context: RotatingContext | None = None) -> None:
        self.guard = guard
        self.context = context

    def _rereads(self) -> list[Reread]:
        found: list[Reread] = [] if self.guard is None else self.guard.rereads()
        return found if self.context is None else [*found, self.context.kept]

    def reload(self) -> None:
        """Read all files again.  Raises SettingsError for one that is not usable: what was read before stays."""
        if self.guard is not None:
            self.guard.forget()
        reload_all(self._rereads())

    def problems(self) -> list[Trouble]:
        """What is not as it should be; what was read before is still in force."""
        found = [] if self.guard is None else self.guard.problems()
        if self.context is not None and self.context.kept.problem is not None:
            found.append(self.context.kept.problem)
        return found

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Read files again when they change, while it is entered."""
        task = asyncio.create_task(watch(self._rereads()), name="kvindexer-access")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self.guard is not None:
                await self.guard.close()


def open_access(settings: Settings) -> Access:
    """What the settings ask for.  Raises SettingsError."""
    return Access(open_guard(settings), open_transport(settings))
