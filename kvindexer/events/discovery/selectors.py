"""Label selectors as kubectl takes them: `app=vllm,tier in (gpu, hpu),!canary`.

Read here, at start, so that a selector with a slip is an error of the settings and not a list that stays empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

Operator = Literal["=", "!=", "in", "notin", "exists", "!"]

_KEY: Final = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9.]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_VALUE: Final = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_EQUAL: Final = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})")
_SET: Final = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EXISTS: Final = re.compile(rf"(!?)\s*({_KEY})")
_PARTS: Final = re.compile(r"(?:[^,()]|\([^()]*\))+")


class Requirement(NamedTuple):
    """What one label must be."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


def parse_selector(text: str) -> tuple[Requirement, ...]:
    """Raise ValueError, with what was expected, for a text that is no selector."""
    if _PARTS.sub("", text).strip(", \t"):
        raise ValueError("label selectors as kubectl takes them, with closed brackets")
    return tuple(_requirements(text))


def _requirements(text: str) -> Iterator[Requirement]:
    for part in filter(None, map(str.strip, _PARTS.findall(text))):
        if found := _EQUAL.fullmatch(part):
            key, operator, value = found.groups()
            yield Requirement(key, "!=" if operator == "!=" else "=", (value,))
        elif found := _SET.fullmatch(part):
            key, operator, listed = found.groups()
            values = tuple(value.strip() for value in listed.split(","))
            if not all(re.fullmatch(_VALUE, value) for value in values):
                raise ValueError(f"values of labels in {part!r}")
            yield Requirement(key, "in" if operator == "in" else "notin", values)
        elif found := _EXISTS.fullmatch(part):
            yield Requirement(found[2], "!" if found[1] else "exists")
        else:
            raise ValueError(f"key=value, key!=value, key in (a, b), key notin (a, b), key or !key, not {part!r}")
