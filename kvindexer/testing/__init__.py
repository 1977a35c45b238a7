"""A fake inference engine to test an index against, in the open: cache, wire formats, publisher, faults, traffic.

Nothing here imports the rest of kvindexer. The fake is an independent judge: `FakeEngine.held()` and
`FakeEngine.cached_tokens()` are the truth, its events are what an index has to learn it from.

    with FakeEngine(dialect=Vllm((0, 32))) as engine:
        ...subscribe to engine.endpoint...
        engine.wait_for_subscribers()
        engine.run_request(range(64), max_tokens=8)
        assert index == engine.held()
"""

from __future__ import annotations

from kvindexer.testing.balancer import Backend, Balancer
from kvindexer.testing.block_pool import BlockPool
from kvindexer.testing.dialects import Dialect, HashForm, Traits, Vllm
from kvindexer.testing.engine import FakeEngine, PoolShape
from kvindexer.testing.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from kvindexer.testing.faults import Faults
from kvindexer.testing.fleet import FleetCounters, SimulatedFleet, StickyRouter
from kvindexer.testing.hashing import MultimodalItem
from kvindexer.testing.other_dialects import LlmdFs, MooncakeStore, Sglang
from kvindexer.testing.proxy import FaultProxy, LinkFaults
from kvindexer.testing.publisher import Publisher
from kvindexer.testing.recording import Player, RecordedFrame, play, read_recording
from kvindexer.testing.request import Request, Result
from kvindexer.testing.traffic import ChatShape, ChatTraffic, TraceTraffic, Traffic, TrafficRequest, mooncake_trace

__all__ = [
    "AllBlocksCleared",
    "Backend",
    "Balancer",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "ChatShape",
    "ChatTraffic",
    "Dialect",
    "Event",
    "FakeEngine",
    "FaultProxy",
    "Faults",
    "FleetCounters",
    "HashForm",
    "LinkFaults",
    "LlmdFs",
    "MooncakeStore",
    "MultimodalItem",
    "Player",
    "PoolShape",
    "Publisher",
    "RecordedFrame",
    "Request",
    "Result",
    "Sglang",
    "SimulatedFleet",
    "StickyRouter",
    "TraceTraffic",
    "Traffic",
    "TrafficRequest",
    "Traits",
    "Vllm",
    "mooncake_trace",
    "play",
    "read_recording",
]
