"""What a scheduler does with the service's answers, in its simplest form: the router of `simulate --route`."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

from kvindexer.commands.client import OPEN, WayIn, call
from kvindexer.commands.failure import CommandError

if TYPE_CHECKING:
    from kvindexer.testing import TrafficRequest


class PrefixRouter:
    """Sends a request where at least half of its prompt is cached already, anywhere otherwise.

    The half keeps a prompt that everybody begins with from drawing all requests to one engine.  Without an answer
    the router goes on at random, and says so once: an index is a help, never a need.
    """

    def __init__(self, url: str, model: str, seed: int, way: WayIn = OPEN) -> None:
        self._url = url
        self._way = way
        self._told = False
        self._model = model
        self._random = random.Random(seed)  # noqa: S311 - reproducible traffic needs a seed

    def __call__(self, request: TrafficRequest, engines: int) -> int:
        """Pick an engine by its number, which is also the end of its instance's name."""
        named = {"lora": request.lora, "cache_salt": request.salt}
        body = {
            "model": self._model,
            "tokens": request.tokens,
            **{name: text for name, text in named.items() if text},
        }
        try:
            matches: list[dict[str, Any]] = call(self._url, "/v1/match", body, timeout_s=1.0, way=self._way)[
                "matches"
            ]
        except CommandError as error:
            matches = []
            if not self._told:
                self._told = True
                print(f"kvindexer: requests go anywhere while --route has no answer: {error}", file=sys.stderr)
        for match in matches:
            number = str(match["instance"]).removeprefix("engine-")
            if match["matched_tokens"] * 2 >= len(request.tokens) and number.isdigit() and int(number) < engines:
                return int(number)
        return self._random.randrange(engines)
