"""`kvindexer serve`: settings, then the service until a signal."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from kvindexer.commands.stopping import exit_with_stdin
from kvindexer.errors import SettingsError
from kvindexer.reload import Reloads
from kvindexer.settings import load_settings

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Mapping


def run(options: Namespace) -> int:
    """Serve; the settings are complete before anything else of the service is imported."""
    load = partial(load_settings, options.config, overrides(options), os.environ)
    reloads = Reloads(load)
    settings = load()
    if options.exit_with_stdin:
        exit_with_stdin()
    from kvindexer.service import run as serve  # noqa: PLC0415 - a wrong setting needn't wait for its imports

    return serve(settings, reloads)


def overrides(options: Namespace) -> dict[str, Any]:
    """Collect the topmost layer of settings: the flags."""
    named = {
        "host": options.host,
        "port": options.port,
        "log_level": options.log_level,
        "sources": options.source,
        "store": options.store,
    }
    return layered(options.set, named)


def layered(texts: Iterable[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of --set and those of flags with names of their own, where there are any, together."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError("--set", text, "KEY=VALUE")
        if key in values:
            raise SettingsError(key, value, "one --set for each setting")
        values[key] = value
    return values | {key: value for key, value in named.items() if value is not None}
