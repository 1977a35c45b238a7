"""Everything an operator can choose, in one frozen object.

    values      kinds of values: counts, sizes, times
    serving, requests, streams, holding, storing, texts, learning, discovering
                the settings themselves, a group a file
    whole       the groups put together: `Settings`
    layers      defaults, variables, file and flags, stacked: `load_settings`
    table       what docs/settings.md shows

Settings are built in one place, at start; nothing reads the environment later.
"""

from kvindexer.settings.layers import load_settings
from kvindexer.settings.whole import Settings

__all__ = ["Settings", "load_settings"]
