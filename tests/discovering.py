"""A fleet that finds its sources, in the loop of a test, and pods with real fake engines."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kube_api import KubeApi
from kvindexer.events.discovery.cluster import open_cluster
from kvindexer.events.discovery.finder import KubernetesFinder
from kvindexer.events.fleet import LiveFleet
from kvindexer.events.listing import PATH
from kvindexer.index.engine import PyIndex
from kvindexer.settings import Settings
from kvindexer.testing import FakeEngine, PoolShape
from live import QUICK, Uncounted

SMALL = PoolShape(num_blocks=40, block_size=4)
MODEL = {"kvindexer.io/model": "m", "kvindexer.io/event-port": "5557"}
"""Annotations that make every question to an engine needless."""


def free_port() -> int:
    """A port that nobody uses now, on any address of the loopback."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def finding(
    scenario: Callable[[LiveFleet], Awaitable[None]],
    api: KubeApi | None,
    folder: Path,
    **settings: Any,
) -> None:
    """Run a scenario against a fleet with a finder of its own; without `api`, `folder` is a service account."""
    kubeconfig = "" if api is None else str(api.kubeconfig(folder))

    async def run() -> None:
        values = {"discovery_retry_max_s": 0.4, "discovery_timeout_s": 5.0, "sync_deadline_s": 600.0}
        chosen = Settings(discovery="kubernetes", discovery_kubeconfig=kubeconfig, **{**QUICK, **values, **settings})
        finder = KubernetesFinder(chosen, open_cluster(chosen, folder))
        fleet = LiveFleet(
            chosen,
            lambda least_trusted: PyIndex(None, chosen.media, least_trusted),
            Uncounted(),
            finder=finder,
        )
        async with fleet.running():
            await scenario(fleet)

    asyncio.run(run())


def expected(api: KubeApi, port: int = 5557) -> dict[str, str]:
    """The sources that there should be, endpoint -> life, of pods as `MODEL` annotates them."""
    found = {}
    for one in api.objects("pods"):
        state = one["status"]["containerStatuses"][0]
        metadata = one["metadata"]
        runs = one["status"]["phase"] == "Running" and one["status"]["podIP"] and "running" in state["state"]
        if runs and "deletionTimestamp" not in metadata and "llm-d.ai/inference-serving" in metadata["labels"]:
            endpoint = f"tcp://{one['status']['podIP']}:{port}"
            found[endpoint] = f"{metadata['uid']}/{state['containerID'].rpartition('/')[2]}"
    return found


def followed(fleet: LiveFleet) -> dict[str, str]:
    """The sources that there are: endpoint -> life."""
    return {spec.endpoint: spec.life for spec in fleet.sources().values()}


def reasons(fleet: LiveFleet) -> list[str]:
    """Words of what is wrong."""
    return sorted(problem.reason for problem in fleet.finding().problems)


class EngineHttp(ThreadingHTTPServer):
    """An engine's HTTP server: its models, and its list of publishers if it has one."""

    daemon_threads = True
    models: Any = None
    listed: Any = None
    status = 200
    asked = 0


class _Answers(BaseHTTPRequestHandler):
    server: EngineHttp

    def do_GET(self) -> None:
        self.server.asked += 1
        content = {"/v1/models": self.server.models, PATH: self.server.listed}.get(self.path)
        self.send_response(self.server.status if content is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode() if content is not None else b"")

    def log_message(self, *_: Any) -> None:
        pass


def models(*names: str) -> dict[str, Any]:
    """The answer of /v1/models: the first is the model, the others are adapters of it."""
    data = [{"id": name, "object": "model", "parent": names[0] if name != names[0] else None} for name in names]
    return {"object": "list", "data": data}


@contextmanager
def engine_http(address: str, port: int) -> Iterator[EngineHttp]:
    """An engine's HTTP server."""
    with EngineHttp((address, port), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class EnginePod:
    """A fake engine at a pod's address; it can be started again there, as another life."""

    def __init__(self, address: str, event_port: int, replay_port: int) -> None:
        self.address = address
        self._places = (f"tcp://{address}:{event_port}", f"tcp://{address}:{replay_port}")
        self.engine = self._started(0)
        self._lives = 0

    def _started(self, seed: int) -> FakeEngine:
        return FakeEngine(pool=SMALL, endpoint=self._places[0], replay_endpoint=self._places[1], hash_seed=seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.stop()

    def restart(self) -> FakeEngine:
        """End the engine, and start another one at the same place."""
        self.engine.stop()
        self._lives += 1
        self.engine = self._started(self._lives)
        return self.engine
