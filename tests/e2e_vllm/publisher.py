"""What an engine's publisher has said, fetched from its replay socket: independent of anything kvindexer does."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final, NamedTuple

import msgspec
import zmq

from e2e_vllm.processes import RunError

END: Final = b"\xff" * 8
TIMEOUT_MS: Final = 10_000


class Message(NamedTuple):
    """One batch of events."""

    seq: int
    payload: bytes


class Told(NamedTuple):
    """All that one life of an engine has told."""

    messages: int
    stored: int
    removed: int
    cleared: int
    held: int
    """Different blocks that it holds by its own account."""
    copies: int


def ask(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, start: int) -> list[Message]:
    """Fetch the messages from a seq on."""
    messages = []
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        socket.connect(endpoint)
        socket.send_multipart([b"", start.to_bytes(8, "big")])
        try:
            while (frames := socket.recv_multipart())[-2] != END:
                messages.append(Message(int.from_bytes(frames[-2], "big"), frames[-1]))
        except zmq.Again:
            raise RunError(f"{endpoint} gave no answer") from None
    return messages


def told(messages: list[Message]) -> Told:
    """Count copies by the books of the engine: one more a stored hash, one less a removed one."""
    stored = removed = cleared = 0
    copies: Counter[tuple[Any, Any]] = Counter()
    for _, payload in messages:
        for event in msgspec.msgpack.decode(payload)[1]:
            hashes = [(event.get("group_idx"), value) for value in event.get("block_hashes", ())]
            match event["type"]:
                case "BlockStored":
                    copies.update(hashes)
                    stored += len(hashes)
                case "BlockRemoved":
                    copies.subtract(hashes)
                    removed += len(hashes)
                case "AllBlocksCleared":
                    copies.clear()
                    cleared += 1
                case other:
                    raise RunError(f"an event of an unknown kind: {other}")
    held = sum(count > 0 for count in copies.values())
    return Told(len(messages), stored, removed, cleared, held, copies.total())
