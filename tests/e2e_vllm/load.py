"""Requests that nobody compares: several at once, going on through failures until told to stop."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self

from e2e_vllm.prompts import Prompt, Traffic
from e2e_vllm.servers import Answer, Vllm
from kvindexer.commands.failure import CommandError

CLIENTS: Final = 3
RETRY_AFTER_S: Final = 0.2
TWINS: Final = 4


class Load:
    """Clients of one server while entered; none if it shall be `idle`."""

    def __init__(self, server: Vllm, seed: int, *, idle: bool = False) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS, "load")
        self._count = 0 if idle else CLIENTS
        self._seed = seed
        self.answered = 0
        self.failed = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._clients = [self._pool.submit(self._client, self._seed + number) for number in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def _client(self, seed: int) -> None:
        traffic = Traffic(seed)
        while not self._stopping.is_set():
            prompt = traffic.next()
            try:
                traffic.answered(prompt, self._server.complete(prompt).output)
            except CommandError:
                with self._lock:
                    self.failed += 1
                self._stopping.wait(RETRY_AFTER_S)
            else:
                with self._lock:
                    self.answered += 1


def twins(server: Vllm, prompt: Prompt) -> list[Answer]:
    """Send one prompt several times at once, one of them computed whole for its log-probabilities."""
    extras: list[dict[str, int]] = [{} for _ in range(TWINS - 1)]
    extras.append({"prompt_logprobs": 1})
    with ThreadPoolExecutor(TWINS) as pool:
        return list(pool.map(lambda extra: server.complete(prompt, **extra), extras))
