"""A fake engine: a block pool that publishes its events as a real engine does.

    run_request -> BlockPool.step() -> Dialect.encode() -> Publisher

Invariant: every batch of events gets the next sequence number and a time stamp above the one before; `held()` is
what a perfect listener knows after the last batch. Calls are synchronous, quick, and may come from any thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvindexer.testing.block_pool import DEFAULT_STEP_TOKENS, BlockPool
from kvindexer.testing.dialects import Vllm
from kvindexer.testing.events import CPU, GPU
from kvindexer.testing.publisher import Publisher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from kvindexer.testing.dialects import Dialect, WireHash
    from kvindexer.testing.events import Event
    from kvindexer.testing.faults import Faults
    from kvindexer.testing.hashing import MultimodalItem
    from kvindexer.testing.request import Request, Result

ANY_LOOPBACK_PORT = "tcp://127.0.0.1:0"
MIN_TS_STEP_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class PoolShape:
    """The size of an engine's cache."""

    num_blocks: int = 512
    block_size: int = 16
    cpu_blocks: int = 0
    max_step_tokens: int = DEFAULT_STEP_TOKENS


class FakeEngine:
    """One engine process (or one data-parallel rank of one): cache, publisher, replay.

    `endpoint` and `replay_endpoint` are bound; port 0 lets the system choose. With `connect` the publisher dials
    `endpoint` instead. `replay_hwm` is the replay socket's high-water mark: 0 is none, vLLM below 0.33 has 1000 and
    silently drops what a slow reader leaves behind that. `curve_secret_key` makes both sockets speak CURVE.
    """

    def __init__(
        self,
        *,
        pool: PoolShape | None = None,
        dialect: Dialect | None = None,
        hash_seed: int | str = 0,
        endpoint: str = ANY_LOOPBACK_PORT,
        replay_endpoint: str | None = ANY_LOOPBACK_PORT,
        topic: str = "",
        rank: int | None = 0,
        buffer_steps: int = 10_000,
        replay_hwm: int = 0,
        connect: bool = False,
        curve_secret_key: bytes | None = None,
        faults: Faults | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shape = pool or PoolShape()
        self.dialect = dialect or Vllm()
        self.rank = rank
        self._hash_seed = hash_seed
        self._clock = clock
        self._last_ts = 0.0
        self._lock = threading.RLock()
        self._pool = self._new_pool()
        self.publisher = Publisher(
            endpoint,
            replay_endpoint,
            topic=topic,
            buffer_steps=buffer_steps,
            replay_has_topic=self.dialect.traits.replay_has_topic,
            replay_hwm=replay_hwm,
            connect=connect,
            curve_secret_key=curve_secret_key,
        )
        if faults is not None:
            self.faults = faults
        self._next_seq = self._first_seq()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Where subscribers connect."""
        return self.publisher.endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Where replay is asked for."""
        return self.publisher.replay_endpoint

    @property
    def replay_requests(self) -> list[int]:
        """The sequence numbers that replay was lately asked from, oldest first."""
        return list(self.publisher.replay_requests)

    @property
    def faults(self) -> Faults:
        """How the publisher misbehaves; assign to change it, from the next message on."""
        return self.publisher.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self.publisher.faults = faults

    @property
    def last_seq(self) -> int | None:
        """Number of the newest message of this life."""
        with self._lock:
            return self._next_seq - 1 if self._next_seq > self._first_seq() else None

    def run_request(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 1,
        salt: str | None = None,
        lora: str | None = None,
        multimodal: Iterable[MultimodalItem] = (),
        session_id: str | None = None,
    ) -> Result:
        """Run one request to its end, alone, publishing a batch for every step that has events."""
        with self._lock:
            request = self._pool.submit(
                tokens, max_tokens=max_tokens, salt=salt, lora=lora, multimodal=multimodal, session_id=session_id
            )
            self._drain()
            return request.result

    def run_together(self, prompts: Iterable[Sequence[int]], *, max_tokens: int = 1) -> list[Result]:
        """Run several requests concurrently; twins among them leave duplicate copies."""
        with self._lock:
            requests: list[Request] = [self._pool.submit(tokens, max_tokens=max_tokens) for tokens in prompts]
            self._drain()
            return [request.result for request in requests]

    def publish_raw(self, payload: bytes) -> int:
        """Publish any bytes under the next sequence number; return it."""
        with self._lock:
            seq = self._next_seq
            self._next_seq += 1
            self.publisher.publish(seq, payload)
            return seq

    def publish_events(self, events: Sequence[Event]) -> int:
        """Publish events that the pool knows nothing of, in this engine's dialect."""
        with self._lock:
            self._last_ts = max(self._clock(), self._last_ts + MIN_TS_STEP_S)
            return self.publish_raw(self.dialect.encode(events, self._last_ts, self.rank))

    def reset(self, *, cpu: bool = False) -> bool:
        """Reset the prefix cache; as in vLLM, nothing is sent before the next request's first step."""
        with self._lock:
            return self._pool.reset(cpu=cpu)

    def restart(self, *, hash_seed: int | str | None = None, down_s: float = 0.0) -> None:
        """Die without a word and come back empty on the same ports, numbering from the start.

        A `hash_seed` gives the new life other hashes, as vLLM up to 0.28 does by default.
        """
        with self._lock:
            self.publisher.rebind(down_s=down_s)
            if hash_seed is not None:
                self._hash_seed = hash_seed
            self._pool = self._new_pool()
            self._next_seq = self._first_seq()

    def wait_for_subscribers(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until that many subscriptions are in place, so that none of what follows is lost."""
        self.publisher.wait_for_subscribers(count, timeout_s)

    def stop(self) -> None:
        """Close sockets and thread. May be called twice."""
        self.publisher.close()

    def held(self) -> dict[tuple[int, WireHash], int]:
        """Return what the GPU holds: (group, hash as on the wire) -> copies."""
        with self._lock:
            held = self._pool.held().items()
            return {(group, self.dialect.wire_hash(digest, GPU)): copies for (group, digest), copies in held}

    def cpu_held(self) -> set[tuple[int, WireHash]]:
        """Return what the CPU tier holds: (group, hash as on the wire)."""
        with self._lock:
            return {(group, self.dialect.wire_hash(digest, CPU)) for group, digest in self._pool.cpu_held()}

    def cached_tokens(self, tokens: Sequence[int], *, salt: str | None = None, lora: str | None = None) -> int:
        """Return what the engine would report as cached if this prompt came now, alone."""
        with self._lock:
            return self._pool.cached_tokens(tokens, salt, lora)

    def block_hashes(
        self, tokens: Sequence[int], *, salt: str | None = None, lora: str | None = None
    ) -> list[WireHash]:
        """Return the hashes of a prompt's full blocks, as GPU events spell them."""
        with self._lock:
            return [self.dialect.wire_hash(digest, GPU) for digest in self._pool.digests(tokens, salt, lora)]

    def _drain(self) -> None:
        while self._pool.busy:
            if events := self._pool.step():
                self.publish_events(events)

    def _first_seq(self) -> int:
        chosen = self.faults.first_seq
        return self.dialect.traits.first_seq if chosen is None else chosen

    def _new_pool(self) -> BlockPool:
        traits = self.dialect.traits
        return BlockPool(
            self.shape.num_blocks,
            self.shape.block_size,
            hash_seed=self._hash_seed,
            cpu_blocks=self.shape.cpu_blocks,
            max_step_tokens=self.shape.max_step_tokens,
            set_like=traits.set_like,
            reuse_empty_first=traits.reuse_empty_first,
        )
