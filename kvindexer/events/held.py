"""Live frames that wait: for a replay to fill the hole before them, or to prove that they are of the same life.

Invariant: never more than the bounds; what does not fit is refused, and the replay that is under way or the next one
has it.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush

from xxhash import xxh3_128_digest


class HeldFrames:
    """Frames by seq, with the time of their arrival."""

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._frames: OrderedDict[int, tuple[bytes, float]] = OrderedDict()
        """As they arrived."""
        self._order: list[int] = []
        """A heap of every seq in `_frames`, and perhaps of some that were there."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, seq: int) -> bool:
        return seq in self._frames

    def add(self, seq: int, payload: bytes, now: float) -> bool:
        """Hold a frame, instead of an earlier one of the same seq; False if there is no room."""
        known = seq in self._frames
        if known:
            self.take(seq)
        if len(self._frames) >= self._max_frames or self._bytes + len(payload) > self._max_bytes:
            return False
        self._frames[seq] = (payload, now)
        if not known:
            heappush(self._order, seq)
        self._bytes += len(payload)
        return True

    def take(self, seq: int) -> bytes:
        """Hand a frame over."""
        payload, _ = self._frames.pop(seq)
        self._bytes -= len(payload)
        return payload

    def digest(self, seq: int) -> bytes | None:
        """Digest of the frame held for this seq, if there is one."""
        found = self._frames.get(seq)
        return None if found is None else xxh3_128_digest(found[0])

    def lowest(self) -> int | None:
        """The first seq that is held."""
        while self._order and self._order[0] not in self._frames:
            heappop(self._order)
        return self._order[0] if self._order else None

    def oldest_at(self) -> float | None:
        """When the frame that waits longest arrived."""
        return next((received for _, received in self._frames.values()), None)

    def clear(self) -> None:
        """Forget all."""
        self._frames.clear()
        self._order.clear()
        self._bytes = 0
