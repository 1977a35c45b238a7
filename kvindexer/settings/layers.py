"""Where settings come from.

    defaults  <  KVINDEXER_... variables  <  the YAML file of --config  <  flags

A layer replaces a value as a whole; only `tier_weights` and `media` add to what is built in.  Whatever is wrong, in
whichever layer, comes out as one `SettingsError` that names the key, the value and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from kvindexer.errors import SettingsError, UnknownNameError
from kvindexer.hiding import HIDDEN, short
from kvindexer.settings.whole import Settings
from kvindexer.settings.wording import expected_of
from kvindexer.settings.yaml_file import read_yaml
from kvindexer.store.address import without_password

ENV_PREFIX: Final = "KVINDEXER_"


class Reading(NamedTuple):
    """What was made of the layers."""

    settings: Settings | None
    """None: there are errors."""
    errors: list[SettingsError]
    """Everything that can be seen to be wrong at once."""
    origins: dict[str, str]
    """Where the value of a setting comes from: `variable`, `file` or `flag`; the others have their defaults."""


def load_settings(config: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Stack the layers.  Raises nothing but SettingsError."""
    settings, errors, _ = read_settings(config, overrides, environ)
    if settings is None:
        raise errors[0]
    return settings


def read_settings(config: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Reading:
    """Stack the layers, and collect what is wrong with them.  Raises nothing."""
    try:
        content = _yaml_file(config) if config else {}
    except SettingsError as error:
        return Reading(None, [error], {})
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in (("variable", _environment(environ)), ("file", content), ("flag", overrides)):
        values.update(layer)
        origins.update(dict.fromkeys(map(str, layer), origin))
    unknown = [key for key in values if key not in Settings.model_fields]
    errors: list[SettingsError] = [UnknownNameError(str(key), Settings.model_fields, "setting") for key in unknown]
    for key in unknown:
        del values[key]
    try:
        settings = Settings(**values)
    except SettingsError as error:
        errors.append(error)
    except ValidationError as error:
        errors += [_as_ours(one) for one in error.errors(include_url=False)]
    if errors:
        return Reading(None, [error.at(_place(error.key, origins, config)) for error in errors], origins)
    return Reading(settings, [], origins)


def _as_ours(error: ErrorDetails) -> SettingsError:
    name, *inside = error["loc"]
    key = str(name) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inside)
    field = None if inside else Settings.model_fields.get(str(name))
    return SettingsError(key, _shown(str(name), error["input"]), expected_of(error, str(name), field))


def _place(key: str, origins: Mapping[str, str], config: Path | None) -> str:
    """Where the operator has written it."""
    name = key if key in origins else re.split(r"[.\[]", key, maxsplit=1)[0]
    match origins.get(name):
        case "variable":
            return f"variable {ENV_PREFIX}{name.upper()}"
        case "file":
            return f"file {config}"
        case _:
            return ""


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with our prefix; those that Kubernetes sets for a service named kvindexer aren't meant for us."""
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and not _is_service_link(name, value)
    }


_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def _is_service_link(name: str, value: str) -> bool:
    """KVINDEXER_SERVICE_HOST, KVINDEXER_PORT=tcp://10.0.0.1:8090, KVINDEXER_PORT_8090_TCP and their like."""
    return bool(_LINK_NAME.search(name)) or (name.endswith("_PORT") and bool(_LINK_VALUE.match(value)))


def _yaml_file(config: Path) -> dict[str, Any]:
    content = read_yaml(config, "config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else "text" if isinstance(content, str) else "a single value"
        raise SettingsError(
            "config", str(config), f"a YAML map of settings, `name: value` in each line; it is {found}"
        )
    return content


def _shown(name: str, value: object) -> object:
    """Hide secrets and cut what would flood a terminal."""
    field = Settings.model_fields.get(name)
    secret = field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
    if name in ("store", "otlp_endpoint"):
        return without_password(str(value))
    return HIDDEN if secret else short(value)
