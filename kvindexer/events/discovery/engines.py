"""What only the engines themselves can say: their model, and whether they list their publishers.

    GET http://pod:8000/v1/models            the model: the first one that is no adapter of another one
    GET http://pod:8000/kv_event_sources     200: there is a list (events.listing); 4xx: there is none

An engine that does not answer, or with a 5xx, may still be loading its weights: it is asked again, for as long as its
pod lives.  What it has answered holds for that life.

Invariant: nothing is asked of an engine whose life is over; every wait ends, every answer is bounded in bytes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx
import msgspec

from kvindexer.events.discovery.reading import Answer, Ask
from kvindexer.events.finding import FindingProblem
from kvindexer.events.listing import PATH

_log = logging.getLogger(__name__)

MODELS: Final = "/v1/models"
RETRY_MIN_S: Final = 0.5
RETRY_MAX_S: Final = 15.0
MAX_AT_ONCE: Final = 32
MAX_NAME: Final = 1024
"""Longest name of a model that is believed."""
_MAX_BYTES: Final = 1 << 20
_SERVER_ERROR: Final = 500
_NO_CERTIFICATES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Engines are asked in clear; reading the certificates of the system would take a while."""


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


_read_models = msgspec.json.Decoder(_Models).decode
_read_list = msgspec.json.Decoder(dict[str, Any]).decode


class _SilentError(Exception):
    """The engine can't say it yet."""


def model_of(body: bytes) -> str | None:
    """The model that an engine serves; adapters have a parent.  Raises msgspec.MsgspecError."""
    models = _read_models(body).data
    return next((one.id for one in models if not one.parent and 0 < len(one.id) <= MAX_NAME), None)


class Engines:
    """All engines that have to be asked; `answered` is called when one has said something new."""

    def __init__(self, timeout_s: float, answered: Callable[[], None]) -> None:
        self.answers: dict[str, Answer] = {}
        """By life."""
        self._silent: dict[str, FindingProblem] = {}
        self._tried: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timeout_s = timeout_s
        self._answered = answered
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=_NO_CERTIFICATES)

    @property
    def tried(self) -> bool:
        """Whether every engine was asked at least once."""
        return self._tried >= self._tasks.keys()

    @property
    def waiting(self) -> int:
        """Engines that have not answered yet."""
        return sum(life not in self.answers for life in self._tasks)

    def problems(self) -> list[FindingProblem]:
        """Which engines are silent."""
        return list(self._silent.values())

    def ask(self, questions: Mapping[str, Ask]) -> None:
        """Ask these, and no others any more."""
        for life in [life for life in self._tasks if life not in questions]:
            self._tasks.pop(life).cancel()
            self.answers.pop(life, None)
            self._silent.pop(life, None)
            self._tried.discard(life)
        for life, question in questions.items():
            if life not in self._tasks:
                self._tasks[life] = asyncio.create_task(self._ask(question), name=f"kvindexer-asking {question.url}")

    async def close(self) -> None:
        """Ask no more."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._client.aclose()

    async def _ask(self, question: Ask) -> None:
        pause_s = RETRY_MIN_S
        while True:
            try:
                async with self._turns:
                    answer = await self._answer(question)
            except Exception as error:  # noqa: BLE001 - whatever an engine says, it is asked again; the reason is shown
                self._say(question, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            else:
                self._silent.pop(question.life, None)
                new = self.answers.get(question.life) != answer
                self.answers[question.life] = answer
                self._tried.add(question.life)
                if new:
                    self._answered()
                if answer.model or not question.for_model:
                    return
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, guards nothing
            pause_s = min(RETRY_MAX_S, 2 * pause_s)

    def _say(self, question: Ask, why: str) -> None:
        first = question.life not in self._tried
        self._tried.add(question.life)
        hint = "it may be starting; annotations or settings that name its model and ports make the question needless"
        message = f"{question.url} can't be asked: {why}"
        self._silent[question.life] = FindingProblem("engine_silent", question.where, message, hint, serious=False)
        if first:
            _log.info("discovery: pod %s: %s; it is asked again", question.where, message)
            self._answered()

    async def _answer(self, question: Ask) -> Answer:
        async with asyncio.timeout(self._timeout_s):
            model, lists = None, False
            if question.for_ports:
                body = await self._get(question.url + PATH)
                lists = body is not None and _is_list(body)
            if question.for_model:
                body = await self._get(question.url + MODELS)
                model = None if body is None else model_of(body)
            return Answer(model, lists)

    async def _get(self, url: str) -> bytes | None:
        """None: the engine has no such thing.  Raises _SilentError, httpx.HTTPError."""
        async with self._client.stream("GET", url, headers={"accept-encoding": "identity"}) as response:
            if response.status_code >= _SERVER_ERROR:
                raise _SilentError(f"{url} answers {response.status_code}")
            if response.status_code != httpx.codes.OK:
                return None
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > _MAX_BYTES:
                    raise _SilentError(f"{url} answers more than {_MAX_BYTES} bytes")
            return bytes(body)


def _is_list(body: bytes) -> bool:
    """Whether this is a list of publishers; pages that answer every path are none."""
    try:
        _read_list(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True
