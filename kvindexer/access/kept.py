"""What was last read from files that change while we run: secrets that are rotated.

Invariant: `value` is what the last good reading gave.  Files that become unreadable, or wrong, change nothing but
`problem`; they are tried again at every look until they are well.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from kvindexer.errors import SettingsError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Trouble(NamedTuple):
    """What is not as it should be, for /health and the log."""

    reason: str
    message: str
    hint: str


class Kept(Generic[T]):
    """Some files, read together."""

    def __init__(
        self, name: str, paths: Sequence[Path], read: Callable[[], T], *, secret: Sequence[Path] = ()
    ) -> None:
        """Read them for the first time; who may read the `secret` ones is looked at too.  Raises SettingsError."""
        self.name = name
        """Of the setting."""
        self._paths = paths
        self._read = read
        self._signature = self._seen()
        self.problem: Trouble | None = None
        self.value = read()
        for path in secret:
            warn_if_open(name, path)

    def look(self) -> None:
        """Read them again if they have changed, or were not well."""
        signature = self._seen()
        if signature != self._signature or self.problem is not None:
            with suppress(SettingsError):  # it is the problem now, and logged
                self.reload()

    def reload(self) -> None:
        """Read them again.  Raises SettingsError: then what was read before stays."""
        signature = self._seen()
        changed, self._signature = signature != self._signature, signature
        try:
            self.value = self._read()
        except SettingsError as error:
            if self.problem is None or changed:
                _log.error("%s; what was read before stays in force", error)
            self.problem = Trouble(
                f"{self.name}_unusable", str(error), "repair the file; what was read before stays in force"
            )
            raise
        if changed or self.problem is not None:
            _log.info("%s was read again", self.name)
        self.problem = None

    def _seen(self) -> tuple[tuple[int, ...], ...]:
        """What tells two versions of the files apart; Kubernetes swaps links, so inodes count."""
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, ...]:
    try:
        known = path.stat()
    except OSError:
        return ()
    return known.st_dev, known.st_ino, known.st_mtime_ns, known.st_size


def warn_if_open(name: str, path: Path) -> None:
    """Others on this machine have no business with our secrets; a group that may read them is Kubernetes' way."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        _log.warning("%s: %s is open to others (mode %03o); chmod 600 it", name, path, stat.S_IMODE(mode))
