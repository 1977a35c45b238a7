"""A publisher process: several engines, one PUB socket each, and a fleet of such processes.

The child is driven by JSON lines on stdin and answers each by one JSON line:

    (start)                                -> {"endpoints": [...]}
    {"do": "await"}                        -> {}              every socket has a subscriber
    {"do": "load", "spool": path}          -> {"messages": n}
    {"do": "send", "spool": path, "start": t, "rate": blocks a second, 0 = all at once}
                                           -> {"end": t}
    {"do": "step", "spool": path}          -> {"at": t}       the next message of the spool, sent at that time

Times are `time.monotonic`, one clock for all processes of a machine.  The sockets are XPUB: on the wire the same as
PUB, but they tell when a subscription has arrived, so that no message is published too early.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, Final, Self

import zmq

from benchmarks.messages import Spooled, read_spool

HIGH_WATER_MARK: Final = 100_000
"""vLLM's default."""
PATIENCE_MS: Final = 20_000
PROCESSES: Final = 2


class Engines:
    """The sockets of one publisher process."""

    def __init__(self, engines: range) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._engines = engines
        self._sockets = {engine: context.socket(zmq.XPUB) for engine in engines}
        self._seq = dict.fromkeys(engines, 0)
        self._spools: dict[str, deque[Spooled]] = defaultdict(deque)
        self.endpoints: list[str] = []
        for socket in self._sockets.values():
            socket.sndhwm = HIGH_WATER_MARK
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.endpoints.append(f"tcp://127.0.0.1:{port}")

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
        at = time.monotonic()
        frames = [b"kv-events", seq.to_bytes(8, "big"), record.payload]
        self._sockets[record.engine].send_multipart(frames)
        return at

    def _send(self, records: deque[Spooled], start: float, rate: int) -> dict[str, Any]:
        for record in records:
            due = start + (record.before / rate if rate else 0.0)
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            self._publish(record)
        return {"end": time.monotonic()}


class Fleet:
    """All engines of one contender: a few publisher processes, fresh sequence numbers."""

    def __init__(self, engines: int) -> None:
        share = -(-engines // PROCESSES)
        self._shares = [range(i, min(i + share, engines)) for i in range(0, engines, share)]
        self._children = [self._start(engines_of) for engines_of in self._shares]
        self.endpoints = [endpoint for child in self._children for endpoint in self._reply(child)["endpoints"]]

    @staticmethod
    def _start(engines: range) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.publish", str(engines.start), str(engines.stop)]
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
    engines = Engines(range(int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps({"endpoints": engines.endpoints}), flush=True)
    for line in sys.stdin:
        print(json.dumps(engines.do(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
