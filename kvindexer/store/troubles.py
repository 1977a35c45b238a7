"""What is wrong with the copy, by what it is wrong with: shown in health, logged when it begins and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from kvindexer.errors import StoreError
from kvindexer.events.keeping import StoreProblem
from kvindexer.store.condition import Problem
from kvindexer.store.layout import UnreadableError

CONNECTION: Final = "connection"
"""Whose problems are those of all shards."""

_log = logging.getLogger(__name__)

_FOREIGN: Final = "foreign"
_HINT: Final = "docs/redis.md says what the server needs"


class Troubles:
    """Problems of the connection, of keys and shards, and of the server's condition."""

    def __init__(self) -> None:
        self._problems: dict[str, StoreProblem] = {}
        self._unfit: list[StoreProblem] = []
        """The server's own condition."""

    def all(self) -> Sequence[StoreProblem]:
        """All that there are now."""
        return [*self._problems.values(), *self._unfit]

    def begin(self, where: str, error: StoreError) -> None:
        """Something is wrong, perhaps still."""
        if where not in self._problems:
            _log.warning("the store: %s: %s", where, error)
        self._problems[where] = StoreProblem(error.reason, f"{where}: {error.message}", error.hint)

    def unexpected(self, where: str, what: str) -> None:
        """A failure of ours; to be called where it is caught, for the log shows all of it."""
        _log.exception("the store: %s", what)
        self._problems[where] = StoreProblem("unexpected", what, "see the log")

    def foreign(self, where: str, key: str, error: UnreadableError) -> None:
        """A key of ours holds what is not ours."""
        hint = "choose another store_namespace, or remove that key"
        self.begin(where, StoreError(_FOREIGN, f"{key} is not ours to write: {error}", hint))

    def end(self, where: str) -> None:
        """All is well there."""
        if self._problems.pop(where, None) is not None:
            _log.info("the store: %s: all is well again", where)

    def end_foreign(self, where: str) -> None:
        """What is there is ours again; whatever else is wrong may still be."""
        problem = self._problems.get(where)
        if problem is not None and problem.reason == _FOREIGN:
            self.end(where)

    def forget(self, where: str) -> None:
        """It is not there any more."""
        self._problems.pop(where, None)

    def server_is(self, found: Sequence[Problem]) -> None:
        """What the server's own condition endangers, as it is now."""
        unfit = [StoreProblem(problem.reason, problem.message, _HINT) for problem in found]
        if unfit != self._unfit:
            self._unfit = unfit
            _log.warning("the store: %s", "; ".join(one.message for one in unfit) or "the server is fit again")
