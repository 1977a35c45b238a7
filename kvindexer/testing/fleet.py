"""A simulated fleet: some fake engines on loopback ports and one thread that sends them traffic.

Invariant: `stop()` ends the thread and every engine within a second or so, whatever they are doing; what went wrong
in the thread is raised there, not lost. The engines' truth stays readable until then, and after.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Self
from zlib import crc32

from kvindexer.testing.engine import FakeEngine, PoolShape
from kvindexer.testing.traffic import ChatTraffic

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from kvindexer.testing.dialects import Dialect
    from kvindexer.testing.traffic import Traffic, TrafficRequest

    Router = Callable[[TrafficRequest, int], int]
    """Picks an engine, 0 .. n - 1, for a request."""

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 5.0


class FleetCounters(NamedTuple):
    """What a fleet has done so far."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class StickyRouter:
    """Sends a session always to the same engine, except for a share of requests that go anywhere."""

    def __init__(self, seed: int = 0, random_share: float = 0.3) -> None:
        self._random = random.Random(seed)
        self._random_share = random_share

    def __call__(self, request: TrafficRequest, engines: int) -> int:
        """Pick an engine."""
        if self._random.random() < self._random_share:
            return self._random.randrange(engines)
        return crc32(request.session.encode()) % engines


class SimulatedFleet:
    """Fake engines under traffic. With `first_port`, engine i publishes on that + i and replays above all those."""

    def __init__(
        self,
        engines: int,
        *,
        model: str = "simulated",
        pool: PoolShape | None = None,
        dialect: Dialect | None = None,
        requests_per_s: float | None = 20.0,
        traffic: Traffic | None = None,
        router: Router | None = None,
        first_port: int = 0,
        replay: bool = True,
        seed: int = 0,
    ) -> None:
        if engines < 1:
            raise ValueError(f"engines: expected at least 1, got {engines}")
        if requests_per_s is not None and requests_per_s <= 0:
            raise ValueError(f"requests_per_s: expected a positive number or None for no limit, got {requests_per_s}")
        self.model = model
        self.engines: list[FakeEngine] = []
        self._pause_s = 0.0 if requests_per_s is None else 1 / requests_per_s
        self.traffic = traffic or ChatTraffic(seed)
        self._router = router or StickyRouter(seed)
        self._counts: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="fleet traffic", daemon=True)
        try:
            for i in range(engines):
                self.engines.append(
                    FakeEngine(
                        pool=pool,
                        dialect=dialect,
                        hash_seed=f"{seed}/{i}",
                        endpoint=f"tcp://{HOST}:{first_port and first_port + i}",
                        replay_endpoint=f"tcp://{HOST}:{first_port and first_port + engines + i}" if replay else None,
                        topic=f"kv@{self.instance(i)}@{model}",
                    )
                )
        except Exception:
            self.stop()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def instance(self, engine: int) -> str:
        """Return the name under which an engine is routed to."""
        return f"engine-{engine}"

    def specs(self) -> list[dict[str, str | int | None]]:
        """Say for every engine what an index has to be told to follow it."""
        return [
            {
                "instance": self.instance(i),
                "model": self.model,
                "block_size": engine.shape.block_size,
                "endpoint": engine.endpoint,
                "replay_endpoint": engine.replay_endpoint,
                "rank": engine.rank,
                "type": engine.dialect.traits.type,
            }
            for i, engine in enumerate(self.engines)
        ]

    @property
    def counters(self) -> FleetCounters:
        """What the fleet has done so far."""
        return FleetCounters(*(self._counts[name] for name in FleetCounters._fields))

    @property
    def running(self) -> bool:
        """Whether traffic flows."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin sending traffic."""
        self._thread.start()

    def stop(self) -> None:
        """End traffic and engines; raises what went wrong meanwhile. May be called twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        for engine in self.engines:
            engine.stop()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def send(self, request: TrafficRequest) -> int:
        """Route and run one request; return the engine that ran it."""
        chosen = self._router(request, len(self.engines))
        result = self.engines[chosen].run_request(
            request.tokens, max_tokens=request.max_tokens, salt=request.salt, lora=request.lora
        )
        self.traffic.answered(request, result.output_tokens)
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(request.tokens)
        self._counts["cached_tokens"] += result.cached_tokens
        self._counts["output_tokens"] += len(result.output_tokens)
        return chosen

    def _run(self) -> None:
        due = monotonic()
        try:
            while not self._stopping.wait(max(0.0, due - monotonic())):
                self.send(self.traffic.next_request())
                due = max(due, monotonic() - 1.0) + self._pause_s
        except Exception as error:  # noqa: BLE001 -- raised by stop()
            self._failure = error
