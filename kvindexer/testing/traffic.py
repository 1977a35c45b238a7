"""What users of a fleet send: multi-turn chats that share system prompts, and recorded Mooncake traces.

Invariant: the same seed or file gives the same requests, token for token. A chat's next turn repeats everything
before it, answers included, which is what makes prefix caches worth having.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvindexer.testing.request import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOONCAKE_BLOCK_TOKENS: Final = 512
CACHED_TRACE_BLOCKS: Final = 4096


@dataclass(frozen=True, slots=True)
class TrafficRequest:
    """A request to some engine; `session` is what a sticky router goes by."""

    tokens: tuple[int, ...]
    max_tokens: int
    session: str
    salt: str | None = None
    lora: str | None = None
    at_s: float | None = None


class Traffic(Protocol):
    """An endless source of requests that hears the answers."""

    def next_request(self) -> TrafficRequest:
        """Make the next request."""

    def answered(self, request: TrafficRequest, output: Sequence[int]) -> None:
        """Take note of what the model said."""


@dataclass(frozen=True, kw_only=True)
class ChatShape:
    """How long and how alike chats are; lengths in tokens."""

    system_prompts: int = 4
    system_tokens: int = 256
    user_tokens: tuple[int, int] = (16, 128)
    answer_tokens: tuple[int, int] = (8, 64)
    concurrent_chats: int = 16
    max_prompt_tokens: int = 2048
    salts: tuple[str | None, ...] = (None,)
    loras: tuple[str | None, ...] = (None,)


class ChatTraffic:
    """Chats that start from a few shared system prompts and go on turn by turn until they grow too long."""

    def __init__(self, seed: int = 0, shape: ChatShape | None = None) -> None:
        self._shape = shape or ChatShape()
        self._random = random.Random(seed)
        self._systems = [self._text(self._shape.system_tokens) for _ in range(self._shape.system_prompts)]
        self._chats: dict[str, TrafficRequest] = {}
        self._started = 0

    def next_request(self) -> TrafficRequest:
        """Start a chat while there are few, otherwise take some chat a turn further."""
        if len(self._chats) < self._shape.concurrent_chats:
            request = self._start()
        else:
            request = self._continue(self._random.choice(list(self._chats.values())))
        if len(request.tokens) > self._shape.max_prompt_tokens:
            del self._chats[request.session]
            request = self._start()
        self._chats[request.session] = request
        return request

    def answered(self, request: TrafficRequest, output: Sequence[int]) -> None:
        """Make the answer part of the chat."""
        if self._chats.get(request.session) is request:
            self._chats[request.session] = self._grown(request, output)

    def _start(self) -> TrafficRequest:
        self._started += 1
        chat = TrafficRequest(
            tokens=tuple(self._random.choice(self._systems)),
            max_tokens=1,
            session=f"chat-{self._started}",
            salt=self._random.choice(self._shape.salts),
            lora=self._random.choice(self._shape.loras),
        )
        return self._continue(chat)

    def _continue(self, chat: TrafficRequest) -> TrafficRequest:
        turn = self._text(self._random.randint(*self._shape.user_tokens))
        return self._grown(chat, turn, max_tokens=self._random.randint(*self._shape.answer_tokens))

    def _grown(self, chat: TrafficRequest, more: Sequence[int], max_tokens: int = 1) -> TrafficRequest:
        return TrafficRequest((*chat.tokens, *more), max_tokens, chat.session, chat.salt, chat.lora)

    def _text(self, length: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(length)]


def mooncake_trace(path: str | Path, block_size: int = MOONCAKE_BLOCK_TOKENS) -> Iterator[TrafficRequest]:
    """Read a Mooncake trace: JSONL of timestamp (ms), input_length, output_length, hash_ids.

    `block_size` is the number of tokens that one hash id stands for, whatever the engines' own block size.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _trace_request(json.loads(line), number, block_size)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected an object with numbers timestamp, input_length, output_length"
                    f" and a list hash_ids with an id per {block_size} input tokens, found {line[:80]!r} ({error})"
                ) from error


class TraceTraffic:
    """A trace as traffic, from the start again when it ends."""

    def __init__(self, path: str | Path, block_size: int = MOONCAKE_BLOCK_TOKENS) -> None:
        self._requests = list(mooncake_trace(path, block_size))
        if not self._requests:
            raise ValueError(f"{path}: expected at least one request, the file is empty")
        self._next = 0

    def next_request(self) -> TrafficRequest:
        """Return the next line's request."""
        request = self._requests[self._next % len(self._requests)]
        self._next += 1
        return request

    def answered(self, request: TrafficRequest, output: Sequence[int]) -> None:
        """Do nothing: a trace knows its future."""


def _trace_request(line: Any, number: int, block_size: int) -> TrafficRequest:
    hash_ids, length, output = line["hash_ids"], line["input_length"], line["output_length"]
    blocks = -(-length // block_size)
    if not isinstance(hash_ids, list) or len(hash_ids) != blocks or blocks < 1:
        raise ValueError(f"input_length {length} needs {blocks} hash_ids, at least one")
    tokens = [token for hash_id in hash_ids for token in _trace_block(int(hash_id), block_size)]
    return TrafficRequest(
        tokens=tuple(tokens[:length]),
        max_tokens=max(1, int(output)),
        session=f"trace-{number}",
        at_s=float(line["timestamp"]) / 1000,
    )


@lru_cache(maxsize=CACHED_TRACE_BLOCKS)
def _trace_block(hash_id: int, block_size: int) -> tuple[int, ...]:
    choice = random.Random(hash_id)
    return tuple(choice.randrange(VOCABULARY) for _ in range(block_size))
