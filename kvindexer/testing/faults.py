"""How a fake engine's publisher may misbehave.

Faults are data: swap the whole object at any time (`engine.faults = Faults(...)`). They touch messages on their way
out only, never the pool: what the engine holds stays the truth to be converged to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """One publisher's misbehaviour; the default is none."""

    drop_seqs: frozenset[int] = frozenset()
    """Sent to nobody, but there in the replay."""
    drop_and_forget_seqs: frozenset[int] = frozenset()
    """Sent to nobody and not in the replay either."""
    duplicate_seqs: frozenset[int] = frozenset()
    """Sent twice."""
    replay_silent: bool = False
    """Replay requests get no answer."""
    replay_no_end: bool = False
    """Answers lack the end marker."""
    replay_stop_after: int | None = None
    """An answer breaks off after that many batches, without end marker."""
    replay_skip_seqs: frozenset[int] = frozenset()
    """Answers have holes at these numbers."""
    replay_garbage: bool = False
    """Answers are malformed: too few frames, a seq that is no seq, a payload that is no msgpack; no end marker."""
    replay_delay_s: float = 0.0
    """Answers come late; publishing waits meanwhile, as it does in the real engine."""
    first_seq: int | None = None
    """Number of a life's first message; the dialect's own when None."""
