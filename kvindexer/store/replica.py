"""The name by which a replica is known to the others."""

from __future__ import annotations

import re
import secrets
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvindexer.settings import Settings

HOST_CHARACTERS: Final = 48


def replica_name(settings: Settings) -> str:
    """The setting `replica`, or a name that no other process has; a new one with each call, so call it once."""
    if settings.replica:
        return settings.replica
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:HOST_CHARACTERS]
    return f"{host}-{secrets.token_hex(4)}"
