"""What errors and logs repeat of a value that can't be used: nothing of a secret, little of anything else."""

from __future__ import annotations

from typing import Final

HIDDEN: Final = "**********"
"""What stands in an error or a repr where a secret was."""

SHOWN_CHARACTERS: Final = 200
"""Longest piece of an unusable value that an error repeats."""


def short(value: object) -> object:
    """Cut what would flood a terminal or a log line."""
    text = repr(value)
    return value if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
