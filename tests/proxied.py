"""A fake engine behind two fault proxies, one before each of its sockets, and traffic that evicts."""

from __future__ import annotations

import random
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from kvindexer.events.fleet import LiveFleet
from kvindexer.events.status import SourceReport
from kvindexer.testing import FakeEngine, FaultProxy, LinkFaults, PoolShape
from kvindexer.types import Tier
from live import until

SMALL = PoolShape(num_blocks=40, block_size=4)


class ProxiedEngine(FakeEngine):
    """An engine whose endpoints are those of its proxies: what dials them comes through the broken network."""

    def __init__(self, **options: Any) -> None:
        with ExitStack() as stack:
            super().__init__(**{"pool": SMALL, **options})
            stack.callback(super().stop)
            self.events = stack.enter_context(_before(super().endpoint))
            replays = super().replay_endpoint
            self.replays = None if replays is None else stack.enter_context(_before(replays))
            self._proxies = stack.pop_all()

    @property
    def endpoint(self) -> str:
        """Where the subscriber dials."""
        return self.events.endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Where the subscriber asks for replay."""
        return None if self.replays is None else self.replays.endpoint

    @property
    def network(self) -> LinkFaults:
        """What both proxies do; assign to change it."""
        return self.events.faults

    @network.setter
    def network(self, faults: LinkFaults) -> None:
        for proxy in (self.events, self.replays):
            if proxy is not None:
                proxy.faults = faults

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._proxies.close()


def _before(endpoint: str) -> FaultProxy:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return FaultProxy(host, int(port))


def traffic(engine: FakeEngine, requests: int, seed: int = 0) -> None:
    """Prompts that share prefixes, in a cache that is too small for them."""
    dice = random.Random(seed)
    shared = [[dice.randrange(100) for _ in range(12)] for _ in range(3)]
    for _ in range(requests):
        tokens = dice.choice(shared) + [dice.randrange(100) for _ in range(dice.randrange(1, 30))]
        engine.run_request(tokens, max_tokens=dice.choice((1, 6)))
    engine.publisher.flush()


def held_at(fleet: LiveFleet, source: str) -> dict[tuple[int, int], int]:
    """What the index says the GPU of a source holds: (group, hash) -> copies."""
    copies = fleet.index.copies(source)
    return {(group, value): n for (_, group, tier, _, value), n in copies.items() if tier is Tier.GPU}


def report(fleet: LiveFleet, engine: FakeEngine) -> SourceReport:
    """What the fleet says of the engine's source."""
    return next(report for report in fleet.reports() if report.source == engine.endpoint)


async def flags(fleet: LiveFleet, engine: FakeEngine, *, sound: bool, complete: bool) -> None:
    """Wait until the source is live with just these flags."""

    def seen() -> tuple[str, bool, bool]:
        now = report(fleet, engine)
        return now.state, now.sound, now.complete

    await until(f"live, sound={sound}, complete={complete}", lambda: seen() == ("live", sound, complete))
