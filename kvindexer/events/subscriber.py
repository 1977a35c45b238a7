"""The ZMQ shell around the streams: all sources, their replays and the clock, on one event loop.

DialledSource    SUB + monitor of a publisher that we dial             (events.dialled)
BoundEndpoint    SUB that publishers dial in to, by topic and rank      (events.bound)
Follower         machine and replays of one source, either way          (events.follower)
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Final

import zmq

from kvindexer.errors import RequestError
from kvindexer.events.bound import BoundEndpoint, BoundSource
from kvindexer.events.curve import Curve
from kvindexer.events.dialled import DialledSource
from kvindexer.events.follower import Follower, Sink
from kvindexer.events.pump import Pumps
from kvindexer.events.replay import Replays
from kvindexer.events.sockets import SubscriberSettings, Wiring
from kvindexer.events.stream import Stream
from kvindexer.types import SourceSpec

_log = logging.getLogger(__name__)

TICK_S: Final = 1.0
_SOCKETS_A_SOURCE: Final = 4
"""SUB, its monitor's two ends, and the DEALER of a replay, kept open between probes."""
_KEPT_SHARE: Final = 8
"""One replay is kept open for so many descriptors that are allowed: at two each, a quarter of them at most."""
_SPARE_SOCKETS: Final = 64


class Subscriber:
    """All subscriptions of the process, on the running event loop."""

    def __init__(self, settings: SubscriberSettings, sink: Sink, curve: Curve | None = None) -> None:
        curve = curve or Curve()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets = _SOCKETS_A_SOURCE * settings.max_sources + settings.max_concurrent_replays + _SPARE_SOCKETS
        context.set(zmq.MAX_SOCKETS, sockets)
        self._wiring = Wiring(context, settings, Pumps(asyncio.get_running_loop(), settings.slice_s), sink, curve)
        self._replays = Replays(
            context,
            self._wiring.pumps,
            max_concurrent=settings.max_concurrent_replays,
            max_bytes=settings.replay_max_bytes,
            max_message_bytes=settings.max_message_bytes,
            max_kept=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _KEPT_SHARE,
            timeout_s=settings.replay_timeout_s,
            curve=curve,
        )
        self._secured: dict[str, tuple[str, ...]] = {}
        """By source: its endpoints that have a key."""
        self._bound: dict[str, BoundEndpoint] = {}
        self._sources: dict[str, DialledSource | BoundSource] = {}
        self._ticker = asyncio.create_task(self._tick(), name="kvindexer-tick")

    def bind(self, endpoint: str) -> None:
        """Listen for publishers that dial in.  Raises RequestError if the endpoint can't be bound."""
        self._bound[endpoint] = BoundEndpoint(self._wiring, endpoint)

    def add(self, source: str, spec: SourceSpec, stream: Stream) -> None:
        """Follow a source.  Raises RequestError if its endpoint can't be dialled at all."""
        follower = Follower(source, spec.replay, stream, self._wiring.sink, self._replays)
        bound = self._bound.get(spec.endpoint)
        if spec.curve_server_key is not None:
            self._expect(source, spec, spec.curve_server_key, dialled=bound is None)
        try:
            self._sources[source] = (
                DialledSource(self._wiring, spec.endpoint, spec.topic, follower)
                if bound is None
                else bound.add(spec.topic, spec.rank, follower)
            )
        except RequestError:
            self._unexpect(source)
            raise

    def _expect(self, source: str, spec: SourceSpec, server_key: str, *, dialled: bool) -> None:
        if not dialled:
            raise RequestError(
                "curve_not_there",
                f"publishers that dial in to {spec.endpoint} prove nothing by a key",
                "leave curve_server_key away, or have the engine bind and dial it from here",
            )
        self._secured[source] = tuple(endpoint for endpoint in (spec.endpoint, spec.replay) if endpoint)
        for endpoint in self._secured[source]:
            self._wiring.curve.expect(endpoint, server_key)

    def remove(self, source: str) -> None:
        """Hang up on a source; its late frames are never seen."""
        known = self._sources.pop(source, None)
        if known is not None:
            known.close()
        self._unexpect(source)

    def _unexpect(self, source: str) -> None:
        for endpoint in self._secured.pop(source, ()):
            self._wiring.curve.forget(endpoint)

    def refusal(self, source: str) -> str:
        """Why a source can't be connected to, if CURVE says so."""
        known = self._sources.get(source)
        return "" if known is None else known.refusal

    @property
    def busy(self) -> bool:
        """Whether any source's received messages wait for their turn."""
        return self._wiring.pumps.busy

    def backlog_s(self, source: str, now: float) -> float:
        """How long this source's received messages have been waiting for their turn."""
        known = self._sources.get(source)
        since = None if known is None else self._wiring.pumps.waiting_since(known.receiver)
        return 0.0 if since is None else now - since

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._replays.tick(now)
            for source, known in list(self._sources.items()):
                try:
                    known.tick(now)
                except Exception:  # noqa: BLE001 - one bad source must not stop the others; it is logged
                    _log.exception("source %s: a tick failed", source)

    async def close(self) -> None:
        """Hang up on everybody."""
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        for source in list(self._sources):
            self.remove(source)
        for bound in self._bound.values():
            bound.close()
        self._replays.close()
        self._wiring.context.term()
