"""Traffic that knows no mercy with block boundaries: shared prefixes, salts, repeats, exact multiples, long prompts.

Token ids are random, reproducible by the seed; what the model says depends on its build, and conversations go on
from what it said.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from e2e_vllm.model import MAX_MODEL_LEN, VOCABULARY

BLOCK: Final = 32
MAX_PROMPT: Final = 940
MAX_OUTPUT: Final = 70
REMEMBERED: Final = 16
SALTS: Final = ("amber", "birch", "cedar")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent."""

    kind: str
    tokens: list[int] = field(repr=False)
    salt: str | None
    max_tokens: int


class Traffic:
    """Requests, one after the other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._systems = [self._new(size) for size in (2 * BLOCK, 3 * BLOCK + 5, 7 * BLOCK, 9 * BLOCK - 1)]
        self._past: deque[tuple[Prompt, list[int]]] = deque(maxlen=REMEMBERED)
        self._kinds: dict[str, tuple[int, Callable[[], tuple[list[int], str | None]]]] = {
            "shared prefix": (5, self._shared),
            "next turn": (5, self._turn),
            "repeat": (4, self._repeat),
            "cut at a boundary": (4, self._cut),
            "exact multiple": (3, self._exact),
            "other salt": (4, self._resalted),
            "new": (2, self._fresh),
            "long": (2, self._long),
        }

    def next(self, kind: str | None = None) -> Prompt:
        """Make the next prompt, of a kind if one is named."""
        if kind is None:
            kinds = list(self._kinds)
            kind = self._random.choices(kinds, [self._kinds[name][0] for name in kinds])[0]
        tokens, salt = self._kinds[kind][1]()
        return Prompt(kind, tokens[:MAX_PROMPT], salt, self._random.randint(1, MAX_OUTPUT))

    def answered(self, prompt: Prompt, output: Sequence[int]) -> None:
        """Remember what was said, to go on from."""
        self._past.append((prompt, list(output)))

    def _new(self, size: int) -> list[int]:
        return [self._random.randrange(3, VOCABULARY) for _ in range(size)]

    def _before(self) -> tuple[Prompt, list[int]]:
        if self._past:
            return self._random.choice(self._past)
        return Prompt("new", self._new(3 * BLOCK), None, 1), []

    def _shared(self) -> tuple[list[int], str | None]:
        salt = self._random.choice([None, None, None, *SALTS])
        return self._random.choice(self._systems) + self._new(self._random.randint(0, 5 * BLOCK)), salt

    def _turn(self) -> tuple[list[int], str | None]:
        prompt, output = self._before()
        return prompt.tokens + output + self._new(self._random.randint(0, 2 * BLOCK)), prompt.salt

    def _repeat(self) -> tuple[list[int], str | None]:
        prompt, _ = self._before()
        return prompt.tokens, prompt.salt

    def _cut(self) -> tuple[list[int], str | None]:
        prompt, output = self._before()
        whole = prompt.tokens + output
        size = self._random.randint(1, max(1, len(whole) // BLOCK)) * BLOCK + self._random.choice([-1, 0, 1])
        return whole[:size], prompt.salt

    def _exact(self) -> tuple[list[int], str | None]:
        prompt, _ = self._before()
        kept = prompt.tokens[: self._random.randint(0, 4) * BLOCK]
        return kept + self._new(-len(kept) % BLOCK + self._random.randint(1, 4) * BLOCK), prompt.salt

    def _resalted(self) -> tuple[list[int], str | None]:
        prompt, _ = self._before()
        return prompt.tokens, self._random.choice([salt for salt in (None, *SALTS) if salt != prompt.salt])

    def _fresh(self) -> tuple[list[int], str | None]:
        return self._new(self._random.randint(1, 10 * BLOCK)), None

    def _long(self) -> tuple[list[int], str | None]:
        return self._new(self._random.randint(MAX_PROMPT // 2, MAX_PROMPT)), None


if MAX_PROMPT + MAX_OUTPUT > MAX_MODEL_LEN:
    raise ValueError("a prompt and its output must fit the model")
