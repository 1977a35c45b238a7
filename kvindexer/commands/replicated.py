"""The demo of several replicas: a load balancer, services, and the Redis that they share.

    clients ──► balancer ──► serve, serve, serve ──► Redis

A replica that ends, whoever ended it, is started again: that is what there is to see.
"""

from __future__ import annotations

from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Group

from kvindexer.commands.child import Child, kvindexer
from kvindexer.commands.client import WayIn, call
from kvindexer.commands.deployment import HOST, POLL_TIMEOUT_S, SERVE, USUAL_PORT, Rates, free_port
from kvindexer.commands.failure import CommandError
from kvindexer.commands.tables import BAD, GOOD, cell, table
from kvindexer.testing import Backend, Balancer
from kvindexer.testing.redis_server import guard, server_binary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_COLUMNS: Final = ("replica", "pid", "ready", "sources", "blocks", "queries/s", "unwritten", "store")
_WORDS: Final = ("replica", "ready", "sources", "store")
_DRAIN_S: Final = 1.0
"""The balancer asks five times a second."""


class _Replica:
    """One of several services; one that has ended is started again."""

    def __init__(self, number: int, store: str) -> None:
        port = free_port()
        self.name = f"replica-{number}"
        self.backend = Backend(HOST, port)
        self.url = f"http://{HOST}:{port}"
        self.rates = Rates()
        settings = ("--set", f"replica={self.name}", "--set", f"drain_s={_DRAIN_S}")
        self.child = Child(self.name, kvindexer(*SERVE, "--port", str(port), "--store", store, *settings))


class Replicated:
    """Replicas, the Redis that they share, and the balancer in front of them."""

    def __init__(self, count: int, port: int | None, folder: Path, way: WayIn) -> None:
        self._way = way
        try:
            server = server_binary()
        except RuntimeError as error:
            raise CommandError("replicas need a Redis or Valkey", str(error)) from None
        redis_port = free_port()
        self._store = f"redis://{HOST}:{redis_port}"
        self._replicas: list[_Replica] = []
        memory_only = ("--dir", str(folder), "--save", "", "--appendonly", "no")
        with ExitStack() as owned:
            command = (*guard(), server, "--bind", HOST, "--port", str(redis_port), *memory_only)
            self._redis = owned.enter_context(Child(server, command))
            for number in range(1, count + 1):
                self._replicas.append(_Replica(number, self._store))
                owned.enter_context(self._replicas[-1].child)
            self._balancer = owned.enter_context(
                Balancer([one.backend for one in self._replicas], port=free_port(port, USUAL_PORT))
            )
            self._owned = owned.pop_all()
        self.url = self._balancer.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def check(self) -> None:
        """See `Deployment.check`; a replica that has ended is started again."""
        self._redis.check()
        for one in self._replicas:
            one.child.revive()

    def ready(self) -> bool:
        """See `Deployment.ready`."""
        return len(self._balancer.ready) == len(self._replicas)

    def explanation(self) -> Sequence[str]:
        """See `Deployment.explanation`."""
        return (
            f"A load balancer listens on {self.url}, with {len(self._replicas)} replicas behind it.",
            "Each engine was registered with one of them; the others know it from Redis:",
            f"kvindexer inspect --store {self._store}",
            "A replica that is ended (kill its pid, or kill -9) is started again, warm.",
        )

    def overview(self) -> Group:
        """See `Deployment.overview`."""
        made = table(_COLUMNS, words=_WORDS)
        for one in self._replicas:
            row = self._row(one)
            *cells, store = (row.get(name) for name in _COLUMNS)
            made.add_row(*map(cell, cells), cell(store, GOOD if store == "ok" else BAD))
        return Group(made)

    def _row(self, one: _Replica) -> dict[str, Any]:
        row = {
            "replica": one.url.removeprefix("http://"),
            "pid": one.child.pid,
            "ready": one.backend in self._balancer.ready,
        }
        try:
            health = call(one.url, "/health", timeout_s=POLL_TIMEOUT_S, way=self._way)
            answer = call(one.url, "/v1/sources", timeout_s=POLL_TIMEOUT_S, way=self._way)
        except CommandError:
            return row | {"store": "no answer"}
        rates = one.rates.between(monotonic(), answer["totals"])
        problems = health["store"]["problems"]
        return row | {
            "sources": f"{health['sources']['live']} live of {len(answer['sources'])}",
            "blocks": answer["totals"]["blocks"],
            "queries/s": rates["queries"],
            "unwritten": sum(map(_unwritten, answer["sources"])),
            "store": problems[0]["reason"] if problems else "ok",
        }


def _unwritten(source: Mapping[str, Any]) -> int:
    """Messages that were applied and are not in Redis, as far as this replica has seen."""
    written = -1 if source["stored"] is None or source["stored"]["seq"] is None else source["stored"]["seq"]
    return max(0, (-1 if source["seq"] is None else source["seq"]) - written)
