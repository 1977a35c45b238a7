"""What leaves with a support bundle: the same answers, without secrets and without the names of tenants.

Invariant: a secret that is known here is in no text that comes out, whatever field it was in.  Nor is the name of a
tenant, unless names were asked for; the same `tenant-N` stands for it everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvindexer.errors import without_user
from kvindexer.hiding import HIDDEN

NEVER_HIDDEN: Final = "default"
"""The tenant of those who name none; its name says nothing."""

KEYED_BY_TENANT: Final = frozenset({"auth_tenant_endpoints"})
"""Maps whose keys are names of tenants; all other keys are names of ours."""

SHORTEST_SECRET: Final = 4
"""Anything shorter would be found in half of all words; such a secret is hidden where it stands, not everywhere."""

_BEARER: Final = re.compile(r"(?i)(?<=\bbearer )\S+")


class Redaction:
    """Knows what must not be seen; what it learns later holds for what is cleaned later."""

    def __init__(self, *, with_names: bool) -> None:
        self._with_names = with_names
        self._secrets: set[str] = set()
        self._tenants: dict[str, str] = {}
        self._pattern: re.Pattern[str] | None = None

    def hide(self, secrets: Iterable[str]) -> None:
        """These must not be seen."""
        self._secrets.update(secret for secret in secrets if len(secret) >= SHORTEST_SECRET)

    def tenants(self, names: Iterable[str]) -> None:
        """These are the names of tenants."""
        for name in sorted({name for name in names if name and name != NEVER_HIDDEN}):
            self._tenants.setdefault(name, f"tenant-{len(self._tenants) + 1}")
        longest_first = sorted(self._tenants, key=len, reverse=True)
        names_or = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(rf"(?<![\w-])({names_or})(?![\w-])") if longest_first else None

    def clean(self, value: Any, key: str = "") -> Any:
        """The value, fit to be seen: texts in it at any depth."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                by_tenant = key in KEYED_BY_TENANT
                return {
                    self.text(str(name)) if by_tenant else str(name): self.clean(inside, str(name))
                    for name, inside in value.items()
                }
            case list() | tuple():
                return [self.clean(inside, key) for inside in value]
        return value

    def text(self, text: str) -> str:
        """The text, fit to be seen."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        text = _BEARER.sub(HIDDEN, without_user(text))
        if self._pattern is None or self._with_names:
            return text
        return self._pattern.sub(lambda found: self._tenants[found[0]], text)
