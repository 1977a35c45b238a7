"""A publisher process: several engines, one PUB socket each, and a fleet of such processes.

The child is driven by JSON lines on stdin and answers each by one JSON line:

    (start)                                -> {"endpoints": [...]}
    {"do": "await"}                        -> {}              every socket has a subscriber
    {"do": "load", "spool": path}          -> {"messages": n}
    {"do": "send", "spool": path, "start": t, "rate": blocks a second, 0 = all at once}
                                           -> {"end": t}
    {"do": "step", "spool": path}          -> {"at": t}       the next message of the spool, sent at that time
    {"do": "count"}                        -> {"sent": n, "asked": n, "from_zero": n, "replayed": n}

With replays, each engine has a second socket that answers from its last 10,000 messages, as vLLM's does; `count` says
how many messages were sent, how many replays were asked for, how many of them from message 0, and how many messages
they brought.

Times are `time.monotonic`, one clock for all processes of a machine.  The sockets are XPUB: on the wire the same as
PUB, but they tell when a subscription has arrived, so that no message is published too early.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any, Final, Self

import zmq

from benchmarks.messages import Spooled, read_spool

HIGH_WATER_MARK: Final = 100_000
"""vLLM's default."""
PATIENCE_MS: Final = 20_000
PROCESSES: Final = 2
BUFFER_STEPS: Final = 10_000
"""vLLM's default."""
TOPIC: Final = b"kv-events"
END: Final = b"\xff" * 8


class Replays:
    """Answers replays in a thread of its own, so that nobody who publishes has to wait for it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], engines: range) -> None:
        self.sent = {engine: deque[tuple[int, bytes]](maxlen=BUFFER_STEPS) for engine in engines}
        self.asked = self.from_zero = self.replayed = 0
        self.endpoints: list[str] = []
        self._sockets: dict[Any, int] = {}
        for engine in engines:
            socket = context.socket(zmq.ROUTER)
            socket.sndhwm = 0
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.endpoints.append(f"tcp://127.0.0.1:{port}")
            self._sockets[socket] = engine
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                self._answer(socket)

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        peer, _, start = socket.recv_multipart()
        first = int.from_bytes(start, "big")
        self.asked += 1
        self.from_zero += first == 0
        for seq, payload in list(self.sent[self._sockets[socket]]):
            if seq >= first:
                self.replayed += 1
                socket.send_multipart([peer, b"", TOPIC, seq.to_bytes(8, "big"), payload])
        socket.send_multipart([peer, b"", TOPIC, END, b""])


class Engines:
    """The sockets of one publisher process."""

    def __init__(self, engines: range, *, replayable: bool) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._replays = Replays(context, engines) if replayable else None
        self._engines = engines
        self._sockets = {engine: context.socket(zmq.XPUB) for engine in engines}
        self._seq = dict.fromkeys(engines, 0)
        self._spools: dict[str, deque[Spooled]] = defaultdict(deque)
        self.endpoints: list[str] = []
        for socket in self._sockets.values():
            socket.sndhwm = HIGH_WATER_MARK
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.endpoints.append(f"tcp://127.0.0.1:{port}")

    @property
    def replay_endpoints(self) -> list[str]:
        """Where replays are asked for, if they are."""
        return self._replays.endpoints if self._replays is not None else []

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order."""
        match order:
            case {"do": "await"}:
                return self._await()
            case {"do": "load", "spool": str(path)}:
                self._spools[path].extend(read_spool(Path(path), self._engines))
                return {"messages": len(self._spools[path])}
            case {"do": "send", "spool": str(path), "start": float(start), "rate": int(rate)}:
                return self._send(self._spools.pop(path, deque()), start, rate)
            case {"do": "step", "spool": str(path)}:
                return {"at": self._publish(self._spools[path].popleft())}
            case {"do": "count"}:
                return self._count()
            case _:
                raise ValueError(order)

    def _await(self) -> dict[str, Any]:
        for engine, socket in self._sockets.items():
            if not socket.poll(PATIENCE_MS):
                return {"error": f"nobody subscribed to engine {engine} within {PATIENCE_MS / 1000:.0f} s"}
            socket.recv()
        return {}

    def _publish(self, record: Spooled) -> float:
        seq = self._seq[record.engine]
        self._seq[record.engine] = seq + 1
        if self._replays is not None:
            self._replays.sent[record.engine].append((seq, record.payload))
        at = time.monotonic()
        frames = [TOPIC, seq.to_bytes(8, "big"), record.payload]
        self._sockets[record.engine].send_multipart(frames)
        return at

    def _count(self) -> dict[str, Any]:
        counts = {"sent": sum(self._seq.values())}
        if (it := self._replays) is not None:
            counts |= {"asked": it.asked, "from_zero": it.from_zero, "replayed": it.replayed}
        return counts

    def _send(self, records: deque[Spooled], start: float, rate: int) -> dict[str, Any]:
        for record in records:
            due = start + (record.before / rate if rate else 0.0)
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            self._publish(record)
        return {"end": time.monotonic()}


class Fleet:
    """All engines of one contender: a few publisher processes, fresh sequence numbers."""

    def __init__(self, engines: int, *, replayable: bool = False) -> None:
        share = -(-engines // PROCESSES)
        self._shares = [range(i, min(i + share, engines)) for i in range(0, engines, share)]
        self._children = [self._start(engines_of, replayable=replayable) for engines_of in self._shares]
        replies = [self._reply(child) for child in self._children]
        self.endpoints: list[str] = [endpoint for reply in replies for endpoint in reply["endpoints"]]
        self.replay_endpoints: list[str] = [endpoint for reply in replies for endpoint in reply["replays"]]

    @staticmethod
    def _start(engines: range, *, replayable: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.publish", str(engines.start), str(engines.stop)]
        command += ["replays"] * replayable
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    @staticmethod
    def _reply(child: subprocess.Popen[str]) -> dict[str, Any]:
        line = child.stdout.readline() if child.stdout else ""
        reply: dict[str, Any] = json.loads(line) if line else {"error": "a publisher process has died"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    @staticmethod
    def _tell(child: subprocess.Popen[str], order: dict[str, Any]) -> None:
        if child.stdin:
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()

    def _all(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        for child in self._children:
            self._tell(child, order)
        return [self._reply(child) for child in self._children]

    def await_subscribers(self) -> None:
        """Return when the service listens to every engine."""
        self._all({"do": "await"})

    def load(self, spool: Path) -> None:
        """Read a spool into the publishers' memory."""
        self._all({"do": "load", "spool": str(spool)})

    def begin(self, spool: Path, rate: int) -> float:
        """Start to publish a loaded spool; returns the time of its first message."""
        start = time.monotonic() + 0.02
        for child in self._children:
            self._tell(child, {"do": "send", "spool": str(spool), "start": start, "rate": rate})
        return start

    def finish(self) -> float:
        """Wait until everything begun is sent; returns the time of the last message."""
        return max(float(self._reply(child)["end"]) for child in self._children)

    def step(self, spool: Path, engine: int) -> None:
        """Publish the engine's publisher's next message of the spool; `stepped` gives the time."""
        self._tell(self._child_of(engine), {"do": "step", "spool": str(spool)})

    def stepped(self, engine: int) -> float:
        """When the message of the last `step` was sent."""
        return float(self._reply(self._child_of(engine))["at"])

    def count(self) -> Counter[str]:
        """What was sent, asked for and replayed so far."""
        total: Counter[str] = Counter()
        for counts in self._all({"do": "count"}):
            total.update(counts)
        return total

    def _child_of(self, engine: int) -> subprocess.Popen[str]:
        return next(c for c, share in zip(self._children, self._shares, strict=True) if engine in share)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.wait()


def main() -> None:
    """Be a publisher process."""
    engines = Engines(range(int(sys.argv[1]), int(sys.argv[2])), replayable="replays" in sys.argv)
    print(json.dumps({"endpoints": engines.endpoints, "replays": engines.replay_endpoints}), flush=True)
    for line in sys.stdin:
        print(json.dumps(engines.do(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
