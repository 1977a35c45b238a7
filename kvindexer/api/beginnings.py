"""Prompts of one batch that begin alike: the keys of what they share are made once.

    earlier   ■ ■ ■ ■ ■ ■ ■ ■        a system prompt and a question
    this one  ■ ■ ■ ■ ■ □ □          the same tokens: the same keys; hashing goes on behind them

A key stands for the tokens up to its block, so what counts is that the tokens are equal; where they part is found by
comparing bytes, which costs next to nothing beside hashing.
"""

from __future__ import annotations

from typing import Final

from kvindexer.api.prompt import Prompt, TokenPrompt

_KNOWN_BY: Final = 64
"""Bytes at the beginning by which an earlier prompt is found."""


class Beginnings:
    """The prompts of one batch so far, the latest one of each beginning."""

    def __init__(self) -> None:
        self._known: dict[bytes, TokenPrompt] = {}

    def meet(self, prompt: Prompt) -> None:
        """Let a prompt have the keys of an earlier one, as far as they are its own."""
        if not isinstance(prompt, TokenPrompt) or not prompt.plain or len(prompt.packed) < _KNOWN_BY:
            return
        beginning = prompt.packed[:_KNOWN_BY]
        earlier = self._known.get(beginning)
        self._known[beginning] = prompt
        if earlier is not None:
            prompt.follow(earlier)
