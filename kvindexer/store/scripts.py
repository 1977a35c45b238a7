"""The Lua scripts: what has to happen at once, or not at all."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final, NamedTuple

from redis.exceptions import NoScriptError

from kvindexer.store.connect import Client


class Script(NamedTuple):
    """A script's text, and the digest by which a server that has seen it knows it."""

    text: str
    sha1: str


def _script(*names: str) -> Script:
    text = "\n".join((files(__package__) / "lua" / f"{name}.lua").read_text() for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


FLUSH: Final = _script("common", "flush")
STAGE: Final = _script("common", "stage")
SWITCH: Final = _script("common", "switch")
GROW: Final = _script("common", "grow")
SWEEP: Final = _script("common", "sweep")
REMOVE: Final = _script("common", "remove")
REGISTER: Final = _script("register")
BEAT: Final = _script("beat")


async def call(client: Client, script: Script, keys: list[str], *arguments: bytes | str | float) -> object:
    """Run a script; one that the server has not seen, or has lost in a restart, is sent in full."""
    try:
        return await client.evalsha(script.sha1, len(keys), *keys, *arguments)
    except NoScriptError:
        return await client.eval(script.text, len(keys), *keys, *arguments)
