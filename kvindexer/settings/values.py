"""Kinds of values that settings have: counts, sizes, times, and lists given as text."""

from __future__ import annotations

from typing import Annotated, Final

import yaml
from pydantic import BeforeValidator, Field

MIB: Final = 1024 * 1024
MAX_COUNT: Final = 2**31 - 1
"""ZMQ and the operating system take counts and sizes as 32-bit integers in places."""
MAX_SECONDS: Final = 7 * 24 * 3600.0
"""A week: waits are handed to the operating system in 32-bit milliseconds."""


def no_boolean(value: object) -> object:
    """YAML reads a bare `yes` as true, which must not pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number")  # noqa: TRY004 - pydantic reports ValueError
    return value


def from_text(value: object) -> object:
    """Variables and --set are text: read lists and maps from it as YAML, of which JSON is a part."""
    if isinstance(value, str):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            raise ValueError("a list or map, as YAML or JSON") from None
    return value


Count = Annotated[int, BeforeValidator(no_boolean), Field(gt=0, le=MAX_COUNT)]
Bytes = Annotated[int, BeforeValidator(no_boolean), Field(gt=0, le=2**40)]
Seconds = Annotated[float, BeforeValidator(no_boolean), Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)]
Weight = Annotated[float, BeforeValidator(no_boolean), Field(ge=0, le=1e6, allow_inf_nan=False)]
