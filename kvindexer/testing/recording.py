"""Recorded streams of real engines: read them, and play them over real sockets.

A recording is a folder with `frames.jsonl`, one message a line: `{"t": seconds, "frames": [topic, seq, payload]}` in
hex, with `source` or `port` where several publishers speak. Invariant: payloads go out byte for byte as recorded,
under their recorded numbers; only from the second round of a loop on are time stamps moved, because in a new life
no message equals an old one. Where the numbers fall back, the engine had restarted, and so does the player.
"""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from kvindexer.testing.engine import ANY_LOOPBACK_PORT
from kvindexer.testing.publisher import SEQ_BYTES, Publisher

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

FRAMES_FILE: Final = "frames.jsonl"
ONLY_SOURCE: Final = "engine"
STAMP: Final = struct.Struct(">BBd")
ARRAYS: Final = frozenset({0x92, 0x93})
FLOAT64: Final = 0xCB


@dataclass(frozen=True, slots=True)
class RecordedFrame:
    """One message as it came off the wire; `t` is when."""

    source: str
    t: float
    topic: bytes
    seq: int
    payload: bytes


def read_recording(folder: str | Path) -> list[RecordedFrame]:
    """Read a recording's messages in the order of their arrival."""
    path = Path(folder) / FRAMES_FILE
    frames = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                frames.append(_frame(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected t and three frames (topic, 8-byte seq, payload) in hex,"
                    f" found {error!r}"
                ) from error
    if not frames:
        raise ValueError(f"{path}: expected at least one message, the file is empty")
    return frames


class Player:
    """Publishers that speak a recording, one per source; the second source is one port above the first, and so on.

    `rate` is in messages a second, None the recorded pace, `math.inf` as fast as it goes.
    """

    def __init__(
        self,
        folder: str | Path,
        endpoint: str = ANY_LOOPBACK_PORT,
        *,
        replay_endpoint: str | None = None,
        source: str | None = None,
        rate: float | None = None,
        replay_has_topic: bool = True,
    ) -> None:
        if rate is not None and rate <= 0:
            raise ValueError(f"rate: expected a positive number or None for the recorded pace, got {rate}")
        recorded = read_recording(folder)
        self._frames = [frame for frame in recorded if source in (None, frame.source)]
        if not self._frames:
            raise ValueError(f"{folder}: no source {source!r}, expected one of {sources(recorded)}")
        self._rate = rate
        self.stopping = threading.Event()
        self.publishers: dict[str, Publisher] = {}
        first_of_each = {frame.source: frame for frame in reversed(self._frames)}
        try:
            for i, (name, first) in enumerate(sorted(first_of_each.items())):
                self.publishers[name] = Publisher(
                    _above(endpoint, i),
                    replay_endpoint and _above(replay_endpoint, i),
                    topic=first.topic.decode(),
                    buffer_steps=len(self._frames),
                    replay_has_topic=replay_has_topic,
                )
        except Exception:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *, loop: bool = False) -> int:
        """Publish the recording, over and over with `loop`, until the end or `stopping`; return how many messages."""
        newest: dict[str, int] = {}
        published = 0
        for frame, pause_s in self._schedule(loop=loop):
            if self.stopping.wait(pause_s):
                break
            publisher = self.publishers[frame.source]
            if frame.seq <= newest.get(frame.source, -1):
                publisher.rebind()
            newest[frame.source] = frame.seq
            publisher.publish(frame.seq, frame.payload)
            published += 1
        for publisher in self.publishers.values():
            publisher.flush()
        return published

    def close(self) -> None:
        """Close all sockets. May be called twice."""
        self.stopping.set()
        for publisher in self.publishers.values():
            publisher.close()

    def _schedule(self, *, loop: bool) -> Iterator[tuple[RecordedFrame, float]]:
        rounds = 0
        while loop or rounds == 0:
            length_s = self._frames[-1].t - self._frames[0].t + 1.0
            before = self._frames[0].t
            for frame in self._frames:
                pause_s = max(0.0, frame.t - before) if self._rate is None else 1 / self._rate
                before = frame.t
                yield (restamp(frame, rounds * length_s) if rounds else frame), pause_s
            rounds += 1


def play(
    folder: str | Path,
    endpoint: str,
    *,
    replay_endpoint: str | None = None,
    source: str | None = None,
    rate: float | None = None,
    loop: bool = False,
    hold: bool = False,
    stop: threading.Event | None = None,
) -> int:
    """Play a recording and return how many messages were published.

    With `hold` the replay socket goes on answering after the end, until `stop` is set.
    """
    with Player(folder, endpoint, replay_endpoint=replay_endpoint, source=source, rate=rate) as player:
        if stop is not None:
            player.stopping = stop
        published = player.run(loop=loop)
        if hold:
            player.stopping.wait()
        return published


def restamp(frame: RecordedFrame, later_s: float) -> RecordedFrame:
    """Return the message as if it had been sent later: only the payload's time stamp differs."""
    head, kind, stamp = STAMP.unpack_from(frame.payload)
    if head not in ARRAYS or kind != FLOAT64:
        raise ValueError(
            f"seq {frame.seq} of {frame.source}: expected an array that begins with a float64 time stamp"
        )
    return replace(frame, payload=STAMP.pack(head, kind, stamp + later_s) + frame.payload[STAMP.size :])


def sources(frames: Iterable[RecordedFrame]) -> list[str]:
    """Name a recording's publishers, sorted."""
    return sorted({frame.source for frame in frames})


def _frame(line: Any) -> RecordedFrame:
    topic, seq, payload = (bytes.fromhex(frame) for frame in line["frames"])
    if len(seq) != SEQ_BYTES:
        raise ValueError(f"a seq of {len(seq)} bytes")
    source = str(line.get("source", line.get("port", ONLY_SOURCE)))
    return RecordedFrame(source, float(line["t"]), topic, int.from_bytes(seq, "big"), payload)


def _above(endpoint: str, ports: int) -> str:
    """Return the endpoint that many ports up; a port that the system chooses stays so."""
    address, _, port = endpoint.rpartition(":")
    return endpoint if port == "0" or ports == 0 else f"{address}:{int(port) + ports}"
