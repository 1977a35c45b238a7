"""Settings as they may be shown: plain values, and no secret among them.

Invariant: what is not known to be harmless is hidden: a value of a kind that nobody has thought of here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from kvindexer.errors import without_user
from kvindexer.hiding import HIDDEN
from kvindexer.settings.whole import Settings
from kvindexer.store.address import StoreAddress

Plain = None | bool | int | float | str | list[Any] | dict[str, Any]

SECRET_FIELDS: Final = frozenset({"additional_salt", "cache_salt"})
"""Fields of what stands in settings: salts keep the blocks of deployments and callers apart."""


def shown(settings: Settings) -> dict[str, Plain]:
    """All settings."""
    return {name: plain(getattr(settings, name)) for name in Settings.model_fields}


def different(settings: Settings) -> dict[str, Plain]:
    """Those that differ from their defaults."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    names = (name for name in Settings.model_fields if getattr(settings, name) != defaults[name])
    return {name: plain(getattr(settings, name)) for name in names}


def plain(value: object) -> Plain:
    """One value, as JSON and YAML can say it."""
    match value:
        case None | bool() | int() | float():
            return value
        case str() | Path() | StoreAddress():
            return str(value) if isinstance(value, StoreAddress) else without_user(str(value))
        case Mapping():
            return {str(key): plain(inside) for key, inside in value.items()}
        case list() | tuple() | frozenset():
            ordered = sorted(value) if isinstance(value, frozenset) else value
            return [plain(inside) for inside in ordered]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _fields(value)
    return HIDDEN


def _fields(value: Any) -> dict[str, Plain]:
    """The fields of a dataclass that differ from their defaults."""
    given = ((field.name, getattr(value, field.name)) for field in fields(value) if _given(value, field))
    return {name: HIDDEN if name in SECRET_FIELDS else plain(inside) for name, inside in given}


def _given(value: Any, field: Field[Any]) -> bool:
    """Whether a field says something: not its default."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is MISSING or getattr(value, field.name) != default


def secrets(settings: Settings) -> set[str]:
    """Every secret that stands in the settings themselves, for those who look for them in texts."""
    return set(_secrets_in([getattr(settings, name) for name in Settings.model_fields])) - {""}


def _secrets_in(value: object) -> Iterator[str]:
    match value:
        case SecretStr():
            yield value.get_secret_value()
        case Mapping():
            yield from _secrets_in(list(value.values()))
        case list() | tuple():
            for inside in value:
                yield from _secrets_in(inside)
        case _ if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                inside = getattr(value, field.name)
                yield from (str(inside or ""),) if field.name in SECRET_FIELDS else _secrets_in(inside)
