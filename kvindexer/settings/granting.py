"""What callers are allowed, as an operator writes it: a list of roles, or a map of roles, tenant and cache salt.

[query]
{roles: [query, register], tenant: team-a, cache_salt: team-a}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvindexer.access.identity import ROLES, Grant, Role
from kvindexer.errors import SettingsError, UnknownNameError
from kvindexer.hiding import HIDDEN, short

MAX_NAME: Final = 1024
FIELDS: Final = ("roles", "tenant", "cache_salt")


def grants_of(value: object, key: str) -> dict[str, Grant]:
    """A map of names and what each is allowed.  Raises SettingsError."""
    if not isinstance(value, Mapping):
        raise SettingsError(key, short(value), "a map of names, each with its roles")
    for name in value:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise SettingsError(key, short(name), "names as keys, in quotes if they look like numbers")
    return {name: grant_of(grant, f"{key}.{name}") for name, grant in value.items()}


def grant_of(value: object, key: str) -> Grant:
    """What one caller is allowed.  Raises SettingsError."""
    if isinstance(value, Grant):
        return value
    if not isinstance(value, Mapping):
        return Grant(roles_of(value, f"{key}.roles"))
    for name in value:
        if name not in FIELDS:
            raise UnknownNameError(f"{key}.{short(name)}", FIELDS)
    return checked_grant(value, key)


def checked_grant(value: Mapping[Any, Any], key: str) -> Grant:
    """The three fields of a map, whatever else it has.  Raises SettingsError."""
    tenant, cache_salt = (_text(value, name, key) for name in ("tenant", "cache_salt"))
    grant = Grant(roles_of(value.get("roles"), f"{key}.roles"), tenant, cache_salt)
    if "admin" in grant.roles and (tenant or cache_salt):
        raise SettingsError(f"{key}.roles", "admin", "query or register: an admin sees everything of all tenants")
    return grant


def roles_of(value: object, key: str) -> frozenset[Role]:
    """At least one role.  Raises SettingsError."""
    listed = value if isinstance(value, list | tuple | set | frozenset) else []
    roles = frozenset(role for role in ROLES if role in listed)
    if not roles or len(roles) != len(listed):
        raise SettingsError(key, short(value), f"a list of roles: {', '.join(ROLES)}")
    return roles


def _text(value: Mapping[Any, Any], name: str, key: str) -> str | None:
    given = value.get(name)
    if given is None:
        return None
    if not isinstance(given, str) or not 0 < len(given) <= MAX_NAME:
        shown = HIDDEN if name == "cache_salt" else short(given)
        raise SettingsError(f"{key}.{name}", shown, "some text, in quotes if it looks like a number")
    return given
