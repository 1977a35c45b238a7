"""What is wrong with settings, as far as that can be seen without serving: files are read, nothing is listened on.

`fail`: the service would not start.  `down`: it would, and what it needs does not answer.  `warn`: it would start,
and this would be missed.  The store is asked only if that is wanted; engines and the Kubernetes API server never are.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from kvindexer.access.guard import Guard, open_guard
from kvindexer.access.transport import open_transport
from kvindexer.errors import RequestError, SettingsError, StoreError
from kvindexer.events.configured import rehearse
from kvindexer.events.curve import open_curve
from kvindexer.events.descriptors import shortage
from kvindexer.service import open_finder, open_texts, open_tracing
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Names
from kvindexer.store.server import ShardServer
from kvindexer.watching.tracing import Tracing


class Problem(NamedTuple):
    """What is wrong with one setting."""

    level: Literal["fail", "down", "warn"]
    setting: str
    message: str


def refused(error: SettingsError) -> Problem:
    """What a value is not usable for."""
    return Problem("fail", error.key, error.problem)


async def problems(settings: Settings, *, connect: bool) -> list[Problem]:
    """Everything that was found; `connect`: the store is asked, too."""
    found = [*_sources(settings), *await _openings(settings), *_descriptors(settings)]
    found += await _tokenizers(settings)
    if settings.store.kind != "memory":
        found += await _store(settings, connect=connect)
    return found


def _sources(settings: Settings) -> Iterator[Problem]:
    try:
        rehearse(settings)
    except RequestError as error:
        yield Problem("fail", "sources", f"{error.message}; {error.hint}" if error.hint else error.message)


async def _tokenizers(settings: Settings) -> list[Problem]:
    """Each by itself, so that all that can't be loaded are named."""
    found = []
    for model, spec in settings.tokenizers.items():
        try:
            await open_texts(settings.model_copy(update={"tokenizers": {model: spec}})).close()
        except SettingsError as error:
            found.append(refused(error))
    return found


async def _openings(settings: Settings) -> list[Problem]:
    """What a service opens at its start, in the functions that it does so with, each by itself."""
    found = []
    openings: tuple[Callable[[], object], ...] = (
        lambda: open_guard(settings),
        lambda: open_transport(settings),
        lambda: open_curve(settings.curve_secret_key_file),
        lambda: open_finder(settings),
        lambda: open_tracing(settings),
    )
    for opening in openings:
        try:
            opened = opening()
        except SettingsError as error:
            found.append(refused(error))
        else:
            if isinstance(opened, Guard):
                await opened.close()
            if isinstance(opened, Tracing):
                async with opened.running():
                    pass
    return found


def _descriptors(settings: Settings) -> Iterator[Problem]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if message := shortage(settings, hard):
        yield Problem("warn", "max_sources", message)


async def _store(settings: Settings, *, connect: bool) -> list[Problem]:
    try:
        client = open_client(settings)
    except (SettingsError, OSError, ValueError) as error:
        return [Problem("fail", "store", f"{settings.store} can't be used: {error}")]
    server = ShardServer(client, Names(settings.store_namespace), settings.store_timeout_s)
    try:
        if not connect:
            return []
        return [Problem("warn", "store", problem.message) for problem in await server.examine()]
    except StoreError as error:
        return [Problem("down", "store", f"{settings.store}: {error.message} ({error.reason}); {error.hint}")]
    finally:
        await server.close()
