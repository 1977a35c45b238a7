"""The tables of docs/settings.md; `python -m kvindexer.settings` prints them."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from kvindexer.settings.layers import ENV_PREFIX
from kvindexer.settings.values import MIB
from kvindexer.settings.whole import GROUPS


def markdown_tables() -> str:
    """All settings, a table a group."""
    return "\n\n".join(_table((group.__doc__ or "").rstrip("."), group.model_fields) for group in GROUPS)


def _table(title: str, members: dict[str, FieldInfo]) -> str:
    lines = [f"### {title}", "", "| setting | variable | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in members.items():
        shown = _default(name, field.default)
        lines.append(f"| `{name}` | `{ENV_PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines)


def _default(name: str, default: Any) -> str:
    if default in ((), {}, "", None):
        return "none"
    if isinstance(default, dict):
        return ", ".join(f"{key} {value}" for key, value in default.items())
    if isinstance(default, tuple):
        return ", ".join(f"`{value}`" for value in default)
    if isinstance(default, int) and default >= MIB and default % MIB == 0 and name.endswith("_bytes"):
        return f"{default} ({default // MIB} MiB)"
    return str(default)
