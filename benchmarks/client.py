"""An HTTP client that costs next to nothing itself: one keep-alive connection, requests built beforehand."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
import xxhash

from benchmarks.workload import BLOCK_SIZE, Blocks, Query

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL: Final = "meta-llama/Llama-3.1-8B-Instruct"
TIMEOUT_S: Final = 30.0
BY_HASH: Final = "/query_by_hash"
BY_TOKENS: Final = "/query"


def local_hashes(blocks: Blocks, path: Sequence[int]) -> list[int]:
    """The blocks' local hashes as RFC #1527 defines them, signed, as Dynamo insists."""
    hashes = []
    for block in path:
        tokens = blocks.tokens[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].tobytes()
        value = xxhash.xxh3_64_intdigest(tokens, seed=1337)
        hashes.append(value - (1 << 64) if value >> 63 else value)
    return hashes


def body_of(route: str, blocks: Blocks, path: Sequence[int]) -> bytes:
    """Build a query's body; the same for every service."""
    body: dict[str, Any] = {"model_name": MODEL}
    if route == BY_HASH:
        body["block_hashes"] = local_hashes(blocks, path)
    else:
        tokens = blocks.tokens
        body["token_ids"] = [t for b in path for t in tokens[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]]
    return msgspec.json.encode(body)


def request_of(route: str, body: bytes) -> bytes:
    """Build a whole POST request."""
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Answer(msgspec.Struct):
    """The part of an answer that every service gives in Dynamo's dialect."""

    scores: dict[str, dict[str, int]]


_decode = msgspec.json.Decoder(Answer).decode


def is_right(answer: bytes, query: Query) -> bool:
    """Say whether the answer names exactly the expected engines and depths; instance ids are engine + 1."""
    try:
        scores = _decode(answer).scores
    except msgspec.DecodeError:
        return False
    given = {int(instance) - 1: sum(ranks.values()) for instance, ranks in scores.items()}
    return {engine: tokens for engine, tokens in given.items() if tokens} == query.expected


class Connection:
    """A blocking keep-alive connection to a local service."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.status = 0

    def ask(self, request: bytes) -> bytes:
        """Send one request, return the answer's body; `status` holds its status."""
        self._socket.sendall(request)
        data = self._socket.recv(1 << 18)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[:end].lower()
        self.status = int(head[9:12])
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        parts = [data[end + 4 :]]
        missing = length - len(parts[0])
        while missing > 0:
            parts.append(self._more())
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def timed(self, request: bytes) -> tuple[float, bytes]:
        """Ask and time it: seconds from the first byte sent to the last one received, and the body."""
        start = time.perf_counter()
        answer = self.ask(request)
        return time.perf_counter() - start, answer

    def _more(self) -> bytes:
        if not (data := self._socket.recv(1 << 18)):
            raise ConnectionError("the service closed the connection")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
