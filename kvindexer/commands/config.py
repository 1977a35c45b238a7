"""`kvindexer config check`: whether `kvindexer serve` would start with these settings, and what they are.

It reads variables, file and flags as `serve` does, and looks at all that can be looked at without serving.  What it
prints on standard output is YAML: the settings that differ from their defaults, with secrets hidden.  Exit codes: 0
usable, 2 `serve` would end with 2 (a value, or a file that it names), 1 the store that was asked does not answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import yaml

from kvindexer.cli import UNUSABLE
from kvindexer.commands.serve import overrides
from kvindexer.settings.layers import read_settings
from kvindexer.settings.shown import different

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from kvindexer.commands.settings_check import Problem


def run(options: Namespace) -> int:
    """Read, look, and print."""
    settings, errors, origins = read_settings(options.config, overrides(options), os.environ)
    from kvindexer.commands.settings_check import problems, refused  # noqa: PLC0415 - the service and all its imports

    if settings is None:
        _print(options, [refused(error) for error in errors], {})
        return UNUSABLE
    found = asyncio.run(problems(settings, connect=options.connect))
    values = {name: {"value": value, "from": origins.get(name)} for name, value in different(settings).items()}
    _print(options, found, values)
    levels = {problem.level for problem in found}
    return UNUSABLE if "fail" in levels else int("down" in levels)


def _print(options: Namespace, problems: Sequence[Problem], values: Mapping[str, Mapping[str, Any]]) -> None:
    failed = sum(problem.level != "warn" for problem in problems)
    if options.json:
        told = {"usable": not failed, "problems": [one._asdict() for one in problems], "settings": values}
        print(json.dumps(told, indent=2))
        return
    for name, known in values.items():
        line = yaml.safe_dump({name: known["value"]}, default_flow_style=False, width=10**6, sort_keys=False).rstrip()
        first, newline, rest = line.partition("\n")
        print(f"{first}  # {known['from']}{newline}{rest}")
    for problem in problems:
        print(f"kvindexer: {problem.level}: setting {problem.setting}: {problem.message}", file=sys.stderr)
    if failed:
        print(f"# not usable: {failed} problem{'s' * (failed != 1)}")
    else:
        print(f"# usable; settings that differ from their defaults: {len(values)}")
