"""A YAML file that an operator wrote: read whole, and refused with the place of what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvindexer.errors import SettingsError


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, key: str, *, secret: bool = False) -> Any:
    """Read the file.  Raises SettingsError that names the setting `key`, and repeats nothing of a secret file."""
    shown = str(path)
    try:
        with path.open("rb") as file:
            return yaml.load(file, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise SettingsError(key, shown, f"a readable file ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = (
            "it can't be read"
            if secret
            else getattr(error, "problem", None) or "it is no UTF-8 text, or nested too deeply"
        )
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(key, shown, f"YAML ({problem}{place})") from None
