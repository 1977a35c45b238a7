"""Many cheap publishers in one process and one thread: `python -m publisher_farm COUNT`.

Each has a PUB and a ROUTER socket like an engine's, no cache, and a history of stores that it replays.  It says a
line of JSON when it is up ([[endpoint, replay endpoint], ...]), then one for every line on its standard input:

    publish N    every publisher stores N more blocks, a message each
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

import zmq

from kvindexer.testing import BlockStored, Vllm

BLOCK_SIZE = 4
SPARE_SOCKETS = 64
END = b"\xff" * 8
ANY_PORT = "tcp://127.0.0.1:0"


def digest(publisher: int, seq: int) -> bytes:
    """The hash of the block that a publisher's message stores, as long as vLLM's."""
    return b"%032d" % (publisher * 1_000_000 + seq + 1)


def use_all_descriptors() -> int:
    """Raise the limit of open files to what the system allows; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class CheapPublisher:
    """One PUB, one ROUTER, one list."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], number: int) -> None:
        self._number = number
        self._history: list[bytes] = []
        self._pub, self._router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for socket in (self._pub, self._router):
            socket.bind(ANY_PORT)
        self.endpoints = [
            socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") for socket in (self._pub, self._router)
        ]
        asyncio.get_running_loop().add_reader(self._router.FD, self.answer)

    def store(self) -> None:
        """Publish one more block."""
        seq = len(self._history)
        event = BlockStored(
            block_hashes=(digest(self._number, seq),),
            parent_block_hash=digest(self._number, seq - 1) if seq else None,
            token_ids=(self._number, seq, 0, 0),
            block_size=BLOCK_SIZE,
            base_block_idx=seq,
        )
        payload = Vllm().encode([event], time.time(), 0)
        self._history.append(payload)
        self._pub.send_multipart([b"", seq.to_bytes(8, "big"), payload])

    def answer(self) -> None:
        """Replay to whoever asks."""
        while int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            client, _, start = self._router.recv_multipart()
            for seq in range(int.from_bytes(start, "big"), len(self._history)):
                self._router.send_multipart([client, b"", b"", seq.to_bytes(8, "big"), self._history[seq]])
            self._router.send_multipart([client, b"", b"", END, b""])


def say(value: object) -> None:
    """One line for whoever started us."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main(count: int) -> None:
    """Run until the end of the input."""
    use_all_descriptors()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * count + SPARE_SOCKETS)
    publishers = [CheapPublisher(context, number) for number in range(count)]
    say([publisher.endpoints for publisher in publishers])
    while line := await asyncio.to_thread(sys.stdin.readline):
        for _ in range(int(line.split()[1])):
            for publisher in publishers:
                publisher.store()
        for publisher in publishers:
            publisher.answer()  # what came in while we were sending: a descriptor does not tell twice
        say("published")
    context.destroy(linger=0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
