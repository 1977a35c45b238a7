"""`kvindexer inspect`: what Redis holds of the index, read without a running service.

    sources            what is kept, a line a source
    source SOURCE      one source: checkpoint, facts, digest, memory
    entries SOURCE     its records, one after the other
    holders KEY ...    who holds these blocks

Salts are never shown, and blocks of one tenant only: as with queries it is `default` unless another one is named.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from kvindexer.commands.failure import CommandError
from kvindexer.commands.inspection import Report, show_entries, show_holders, show_source, show_sources
from kvindexer.commands.serve import layered
from kvindexer.errors import SettingsError, StoreError
from kvindexer.settings import load_settings
from kvindexer.store.address import FORMS
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Names
from kvindexer.store.reader import Reader
from kvindexer.store.server import ShardServer

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from kvindexer.settings import Settings
    from kvindexer.store.layout import Meta
    from kvindexer.store.reader import Listed
    from kvindexer.types import SourceSpec

DEFAULT_TENANT: Final = "default"


def run(options: Namespace) -> int:
    """Read and print."""
    flags = {"store": options.store, "store_namespace": options.namespace}
    settings = load_settings(options.config, layered(options.set, flags), os.environ)
    if settings.store.kind == "memory":
        raise SettingsError("store", "memory", f"the URL of what replicas share: {FORMS.removeprefix('memory, ')}")
    asyncio.run(_inspect(settings, options))
    return 0


async def _inspect(settings: Settings, options: Namespace) -> None:
    server = ShardServer(open_client(settings), Names(settings.store_namespace), settings.store_timeout_s)
    reader, report = Reader(server), Report(settings.store_namespace, as_json=options.json)
    try:
        match options.view:
            case "source":
                listed, meta = await _one(reader, options)
                show_source(report, listed, await reader.whole(listed, meta), await reader.memory(listed, meta))
            case "entries":
                listed, meta = await _one(reader, options)
                await show_entries(report, reader, listed, meta, options.limit)
            case "holders":
                await _holders(reader, report, options)
            case _:
                show_sources(report, await reader.sources(_chosen(options)))
    except StoreError as error:
        raise CommandError(f"{settings.store}: {error.message} ({error.reason})", error.hint) from None
    finally:
        await server.close()


async def _holders(reader: Reader, report: Report, options: Namespace) -> None:
    chosen = _chosen(options, tenant=options.tenant or DEFAULT_TENANT)
    listed = [one for one in await reader.sources(chosen) if one.meta is not None]
    found = [held for one in listed for held in await reader.holders(one, set(options.keys))]
    show_holders(report, list(dict.fromkeys(options.keys)), found, len(listed), options.tenant or DEFAULT_TENANT)


async def _one(reader: Reader, options: Namespace) -> tuple[Listed, Meta]:
    """The source that was asked for, by its own name or by its instance's."""
    listed = await reader.sources(_chosen(options))
    named = [one for one in listed if one.source == options.source] or [
        one for one in listed if one.spec is not None and one.spec.instance == options.source and one.meta is not None
    ]
    if not named:
        raise CommandError(f"no source {options.source!r} is kept there", "kvindexer inspect sources lists all")
    if len(named) > 1:
        names = ", ".join(one.source for one in named[:8])
        raise CommandError(f"{options.source!r} has {len(named)} sources", f"name one of them: {names}")
    (one,) = named
    if one.problem:
        raise CommandError(f"source {one.source}: {one.problem}", "docs/redis.md says what should be there")
    if one.meta is None:
        raise CommandError(f"Redis holds nothing of source {one.source}", "is a replica running that follows it?")
    return one, one.meta


def _chosen(options: Namespace, **wanted: Any) -> Callable[[SourceSpec], bool] | None:
    """Which sources the flags let through; None: all of them, also those that can't be understood."""
    wanted = {"tenant": options.tenant, "model": options.model} | wanted
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if not wanted:
        return None
    return lambda spec: all(getattr(spec, name) == value for name, value in wanted.items())
