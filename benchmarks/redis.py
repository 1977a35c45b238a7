"""The Redis of the store section: a real server, as the tests start it, and what it says of itself."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final, Self

from redis import Redis as Client

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from servers import HOST, Server

POLL_S: Final = 0.02
PATIENCE_S: Final = 60.0


def give_way(pid: int, *, yes: bool = True) -> None:
    """Let everybody else go first where there are not enough cores, at any moment; or be like everybody again.

    The largest niceness does not do: it still takes a core for milliseconds once it has one.
    """
    policy = os.SCHED_IDLE if yes else os.SCHED_OTHER
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


class Redis:
    """One server without persistence, asked over a connection of its own."""

    def __init__(self) -> None:
        self.server = Server()
        self.url = self.server.url
        self._client: Client = Client(host=HOST, port=self.server.port, socket_timeout=PATIENCE_S)

    @property
    def version(self) -> str:
        """Name and version."""
        said = self._client.info("server")
        name = said.get("server_name", "redis")
        return f"{str(name).capitalize()} {said[f'{name}_version']}"

    def memory(self) -> int:
        """Bytes in use, once nothing is left to be freed in the background."""
        deadline = time.monotonic() + PATIENCE_S
        while self._client.info("memory")["lazyfree_pending_objects"] and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return int(self._client.info("memory")["used_memory"])

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        said = self._client.info("cpu")
        return float(said["used_cpu_user"]) + float(said["used_cpu_sys"])

    def shards(self) -> list[bytes]:
        """The meta hashes of the sources (docs/redis.md)."""
        return [key for key in self._client.scan_iter(count=10_000) if key.endswith(b":meta")]

    def total(self, shards: list[bytes], field: str) -> int:
        """A number of the meta hashes, summed up: `next` or `entries`."""
        pipeline = self._client.pipeline(transaction=False)
        for shard in shards:
            pipeline.hget(shard, field)
        return sum(int(value or 0) for value in pipeline.execute())

    def reach(self, messages: int, sources: int) -> float:
        """Wait until everything that so many sources have sent is there; returns when that was."""
        deadline = time.monotonic() + PATIENCE_S
        shards: list[bytes] = []
        while (held := self.total(shards, "next")) != messages:
            if time.monotonic() > deadline:
                message = f"Redis does not get in step: it has {held} of {messages} messages"
                raise TimeoutError(message)
            time.sleep(POLL_S)
            shards = shards if len(shards) == sources else self.shards()
        return time.monotonic()

    def give_way(self, *, yes: bool = True) -> None:
        """Take no core away from anybody, as if it had its own; or do."""
        give_way(int(self._client.info("server")["process_id"]), yes=yes)

    def flush(self) -> None:
        """Forget everything."""
        self._client.flushall()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self.server.close()
