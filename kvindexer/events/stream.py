"""One source's stream: order, gaps, replay, lives.  A state machine without I/O.

Inputs are methods: live frames, replayed frames, the end or failure of a replay, connected, disconnected, tick.
Each returns the actions that follow, in order, as data; the ZMQ shell (`events.subscriber`) only moves bytes.

    live frame ──► next in order? ── yes ─────────────────────────────► Apply
                        │ no
                        ├─ a hole before it: hold it, Ask(last seq) ──► replay fills the hole, `catch_up` applies it
                        ├─ seen before, same bytes ───────────────────► Drop(duplicate)
                        └─ seen before, other bytes: a new life ──────► Withdraw, Ask(0)

A replay is always asked from the last applied seq *inclusive*: its first reply proves whether the publisher still
lives the same life, since payloads carry a time stamp and so never repeat.

    first reply                                      meaning                       what follows
    last seq, same digest                            same life                     apply what comes behind it
    last seq, other digest; end marker only          new life                      Withdraw, Ask(0)
    above last seq, connected all the while          same life, overtaken          wait for the live frames between
    the same again, and none of them came            same life, a hole for good    go on, not sound, not complete
    above last seq, after a disconnect               unproven                      go on, not sound, not complete
    none in time                                     unknown                       go on, flags off, ask again later

While a life is in doubt (the last row) it is asked for from where the doubt began: what has come since may be of
another life, and proves nothing.

What was held during a replay follows it one `catch_up` at a time: thousands of frames must not keep a query waiting.

Invariants: a payload is applied at most once a life, in the order of its seq; a loss that was noticed is either
repaired or takes the flags off; a source never goes dark, whatever its replay socket does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_128_digest

from kvindexer.events.flags import Flags
from kvindexer.events.held import HeldFrames
from kvindexer.events.states import TRANSITIONS, Action, Apply, Ask, Drop, Purpose, Signal, State, Withdraw
from kvindexer.types import Epoch, Seq

_ALL: Final = 2
"""`Flags.level` of a life of which nothing is missing."""
_RECENT_DIGESTS: Final = 256
_MOST_PARTS: Final = 8
"""A replay that keeps breaking off is asked for the rest at once so many times, while live frames wait behind it."""


@dataclass(slots=True)
class _Replay:
    purpose: Purpose
    start: int
    digest: bytes | None
    """Of the message it starts from, if that was applied."""
    connection: int
    """Which connection of the live socket it was asked on: it proves nothing of later ones."""
    asked_at: float
    """Or a little before that: the last time that is known."""
    answered: bool = False
    abandoned: bool = False
    from_zero: bool = False
    """It has brought the first message of the life, or one that says that the cache is empty."""
    applied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """Times in seconds, sizes in bytes; see `Settings` for what each is for."""

    replayable: bool = True
    dialled: bool = True
    """Whether the transport tells that this very publisher is connected, which is a sign of life."""
    held_max_frames: int = 10_000
    held_max_bytes: int = 64 * 2**20
    probe_interval_s: float = 5.0
    stale_after_s: float = 15.0
    gone_after_s: float = 300.0
    retry_min_s: float = 0.5
    retry_max_s: float = 30.0


class Stream:
    """The machine of one source.  Times are of one monotonic clock, in seconds."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self.state = State.SYNCING
        self.why = "waiting for the first message"
        self.epoch = Epoch(1)
        self.last_seq: int | None = None
        """Newest seq applied in this life."""
        self.birth = b""
        """Digest of this life's first message; empty if it was not seen."""
        self._first = 0
        """The first message that was applied of this life."""
        self.gaps = 0
        self.unfilled = 0
        """Holes that were passed over, since no replay could fill them."""
        self.replays = 0
        self.verified_at: float | None = None
        self.proven_at: float | None = None
        """When the question was asked whose answer verified the life: it is the engine's life since then."""
        self.heard_at: float | None = None
        """Last sign of life: a frame, an answer, a connection."""
        self.event_at: float | None = None
        """Last live frame."""
        self._flags = Flags()
        """Of this life; `sound` and `complete` add what the connection says."""
        self._rebuilt: Epoch | None = None
        """The life that was rebuilt because its claims were found wrong; a second rebuild would be no better."""
        self._connected = False
        self._connections = 0
        self._disconnected_since_last = False
        self._live_seq: int | None = None
        self._live_digest = b""
        self._digests: dict[int, bytes] = {}
        self._held = HeldFrames(settings.held_max_frames, settings.held_max_bytes)
        self._overflowed = False
        self.catching_up = False
        """A replay is over and frames that came meanwhile are still held: `catch_up` is to be called."""
        self._patient = True
        """Whether a hole that is found while catching up is asked for."""
        self._replay: _Replay | None = None
        self._retry_s = settings.retry_min_s
        self._parts = 0
        self._ticked_at = 0.0
        self._ask_at: float | None = None
        self._asked_hole: tuple[int, int] | None = None
        self._overtaken: int | None = None
        """What was expected when a replay began behind it: once may be haste, twice without progress is a loss."""

    # What an answer says of the source

    @property
    def sound(self) -> bool:
        """Nothing is claimed that may be gone."""
        return self._flags.sound and not (self._flags.uncertain or self._in_question)

    @property
    def complete(self) -> bool:
        """Nothing that is held may be missing."""
        return self._flags.complete and not self._in_question

    @property
    def _in_question(self) -> bool:
        """Something is lost, or may be until a replay has proven the opposite."""
        cut_off = self._disconnected_since_last and (self._settings.replayable or not self._connected)
        return self._flags.in_doubt or cut_off or self.gap_open

    @property
    def gap_open(self) -> bool:
        """A hole is known and its replay not through yet."""
        lowest = self._held.lowest()
        return lowest is not None and self.last_seq is not None and lowest > self._expected

    @property
    def next_seq(self) -> int:
        """The seq behind the last applied one."""
        return self._expected

    def applied_digest(self, seq: int) -> bytes | None:
        """Digest of an applied message of this life, if it was one of the last ones."""
        return self._digests.get(seq)

    @property
    def coverage(self) -> tuple[int, int]:
        """How much of this life was applied: `Flags.level`, and the first seq that matters.

        A connection that is down takes the flags off, but nothing from what was applied before.
        """
        level = self._flags.level
        return level, 0 if level == _ALL else self._first

    @property
    def settled(self) -> bool:
        """Not in the midst of taking in a life from its start."""
        return self.synced and (self._replay is None or self._replay.purpose is Purpose.CHECK)

    def lag_s(self, now: float) -> float:
        """Age of the oldest frame that was received and not applied."""
        oldest = self._held.oldest_at()
        return 0.0 if oldest is None else now - oldest

    @property
    def synced(self) -> bool:
        """Caught up with, and heard: a source that is only known to be away may still hold `/ready` up."""
        return self.state is State.LIVE

    # Inputs

    def warming(self) -> None:
        """Blocks of some checkpoint are being loaded: nothing that is held is certain before `resume` and a proof."""
        self._disconnected_since_last = True
        self.why = "being warmed"

    def resume(self, epoch: Epoch, next_seq: int, digest: bytes, birth: bytes, coverage: tuple[int, int]) -> None:
        """Go on behind a checkpoint whose blocks are in the index; call before `start`.

        The life is in doubt until a replay from the checkpoint has proven that it is the engine's present one.
        """
        level, self._first = coverage
        self.epoch, self.birth = epoch, birth
        self._flags.restored(level)
        if not level:
            self._ask_at = 0.0
        if next_seq:
            self.last_seq = next_seq - 1
            self._digests[self.last_seq] = digest
            # whatever we are sent after dialling was published later: a lower seq is of another life
            self._live_seq, self._live_digest = self.last_seq, digest
            self._disconnected_since_last = True
        self.why = "resumed behind a checkpoint"

    def start(self, now: float) -> list[Action]:
        """The shell has subscribed; the first replay is asked for as soon as there is a connection."""
        self.heard_at = now
        return []

    def frame(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A live message."""
        self.heard_at = self.event_at = now
        actions: list[Action] = []
        if self.state is State.GONE:
            actions += self._begin_anew(Signal.HEARD)
        elif self.state is State.STALE:
            self._move(Signal.HEARD, "heard again")
        digest = xxh3_128_digest(payload)
        newest, self._live_seq = self._live_seq, seq
        newest_digest, self._live_digest = self._live_digest, digest
        went_back = newest is not None and seq <= newest
        if went_back or (self.last_seq is not None and seq <= self.last_seq):
            known = newest_digest if seq == newest else self._digest_of(seq)
            if known == digest:
                if newest is not None and newest > seq:
                    self._live_seq, self._live_digest = newest, newest_digest
                return [*actions, Drop("duplicate")]
            if known is None and not went_back:
                return [*actions, Drop("overlap")]
            actions += self._new_life("its seq went back")
            self._live_seq = seq
            if seq and self._settings.replayable:
                actions += self._ask(Purpose.SYNC, 0)
        if self._replay is not None or self.catching_up:
            return actions + self._hold(seq, payload, digest, now)
        return actions + self._in_order(seq, payload, digest, now)

    def _digest_of(self, seq: int) -> bytes | None:
        return self._held.digest(seq) or self._digests.get(seq)

    def _in_order(self, seq: int, payload: bytes, digest: bytes, now: float) -> list[Action]:
        if seq != self._expected:
            self.gaps += self.last_seq is not None
            if self._settings.replayable:
                return self._hold(seq, payload, digest, now) + self._check()
            self._joined_or_lost(seq)
        elif self.last_seq is None:
            self._flags.complete = True
        self._move(Signal.SYNCED, self._why_live())
        return [self._apply(seq, payload, digest)]

    @property
    def _expected(self) -> int:
        return 0 if self.last_seq is None else self.last_seq + 1

    def _joined_or_lost(self, seq: int) -> None:
        """Messages before this one will not come any more."""
        if self.last_seq is None:
            self._flags.joined(seq)
            self.why = f"joined at seq {seq}"
        else:
            self.unfilled += 1
            self._flags.lost_before = seq
            self._flags_off(f"{seq - self.last_seq - 1} messages lost before seq {seq}")

    def replay_frame(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A message of the replay that was asked for."""
        self.heard_at = now
        replay = self._replay
        if replay is None or replay.abandoned:
            return [Drop("unasked_replay")]
        if seq < replay.start:
            return [Drop("unasked_replay")]
        digest = xxh3_128_digest(payload)
        actions: list[Action] = []
        if not replay.answered:
            replay.answered = True
            actions = self._first_reply(replay, seq, digest)
            if replay.abandoned or self._replay is not replay:
                return actions
        if self.last_seq is not None and seq <= self.last_seq:
            return [*actions, Drop("overlap")]
        if self.last_seq is None or seq == self.last_seq + 1:
            replay.applied += 1
            return [*actions, self._apply(seq, payload, digest)]
        return actions + self._hold(seq, payload, digest, now)

    def replay_end(self, now: float) -> list[Action]:
        """The end marker of the replay."""
        self.heard_at = now
        replay = self._replay
        if replay is None:
            return [Drop("unasked_replay")]
        self._replay = None
        self.replays += 1
        self._retry_s = self._settings.retry_min_s
        self._parts = 0
        if not replay.answered and self.last_seq is not None:
            return self._new_life("the replay knows nothing of its last message") + self._ask(Purpose.SYNC, 0)
        if replay.abandoned:
            self._ask_at = self._ask_at or now + self._settings.probe_interval_s
            return self._begin_to_catch_up(now)
        self.verified_at = now
        self.proven_at = replay.asked_at
        self._flags.doubted = None
        up_to_date = self._connected and replay.connection == self._connections
        self._disconnected_since_last = self._disconnected_since_last and not up_to_date
        if replay.purpose is not Purpose.CHECK:
            self._flags.replayed(whole=replay.from_zero or not replay.answered)
        if self._connected and not up_to_date:
            return self._check()
        return self._begin_to_catch_up(now)

    def replay_failed(self, reason: str, now: float) -> list[Action]:
        """No answer in time, garbage, or too much of it: ask for the rest, or go on live and ask again later."""
        replay = self._replay
        if replay is None:
            return []
        self._replay = None
        self.why = f"replay failed: {reason}"
        if replay.from_zero:
            self._flags.replayed(whole=True)
        proven = replay.answered and not replay.abandoned
        if proven or self._flags.doubted is None or self._flags.doubted[0] < 0:
            newest = self.last_seq
            self._flags.doubted = (-1, b"") if newest is None else (newest, self._digests[newest])
        if replay.applied and self._parts < _MOST_PARTS:
            self._parts += 1
            return self._check()
        self._parts = 0
        self._ask_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, self._settings.retry_max_s)
        return self._begin_to_catch_up(now, patient=False) if self._held or self._connected else []

    def catch_up(self, now: float) -> list[Action]:
        """The next held frame, if there was time for one; at a hole ask again if that may bring something new."""
        seq = self._held.lowest() if self.catching_up else None
        if seq is None:
            return self._caught_up() if self.catching_up else []
        if self.last_seq is not None and seq <= self.last_seq:
            if self._digests.get(seq) not in (None, self._held.digest(seq)):
                return self._new_life("a held message is another one now") + self._check()
            self._held.take(seq)
            return [Drop("overlap"), *self._caught_up()]
        if seq > self._expected:
            if self._patient and self._progress(seq):
                return self._check()
            self.gaps += self.last_seq is not None
            self._joined_or_lost(seq)
            self._ask_at = now + self._retry_s
        elif self.last_seq is None:
            self._flags.complete = True
        return [self._apply_held(seq), *self._caught_up()]

    def connected(self, now: float) -> list[Action]:
        """The transport is up (again)."""
        self.heard_at = now
        self._connected = True
        self._connections += 1
        if self.state is State.GONE:
            return self._begin_anew(Signal.HEARD)
        if self.state is State.STALE:
            self._move(Signal.HEARD, "connected again")
        if self._settings.replayable:
            return self._check() if self._replay is None else []
        if self._disconnected_since_last and self.last_seq is not None:
            self._flags_off("reconnected, no replay endpoint to compare with")
        return []

    def disconnected(self, now: float) -> list[Action]:
        """The transport is down: what comes next may be another life."""
        del now  # the time of the last sign of life stays what it was
        self._connected = False
        self._disconnected_since_last = True
        self.why = "disconnected"
        if not self._settings.replayable:
            return []
        # what is held may be of a life that is over; if it is not, the next replay has it
        dropped = [Drop("disconnected")] * len(self._held)
        self._held.clear()
        self.catching_up = False
        return list(dropped)

    def tick(self, now: float) -> list[Action]:
        """Time has passed; call about once a second."""
        self._ticked_at = now
        if self._connected and self._settings.dialled:
            self.heard_at = now
        silent_s = now - (self.heard_at if self.heard_at is not None else now)
        if silent_s >= self._settings.gone_after_s and self.state is State.STALE:
            self._move(Signal.LONG_SILENCE, f"silent for {silent_s:.0f} s")
            self._forget()
            return [Withdraw("gone", everything=True)]
        if silent_s >= self._settings.stale_after_s and self.state in {State.SYNCING, State.LIVE}:
            self._move(Signal.SILENCE, f"silent for {silent_s:.0f} s")
        busy = self._replay is not None or self.catching_up
        if busy or not self._settings.replayable or self.state is State.GONE:
            return []
        if self._ask_at is not None:
            if now < self._ask_at:
                return []
            self._ask_at = None
            return self._ask(Purpose.REBUILD, 0) if self._flags.holes and self.last_seq is not None else self._check()
        proof = max(self.verified_at or 0.0, self.event_at or 0.0)
        if self._connected and now - proof >= self._settings.probe_interval_s:
            return self._check()
        return []

    def damaged(self, why: str) -> None:
        """A payload could not be read, or entries were dropped: what it said is lost."""
        self._flags.damaged = True
        self.why = why

    def uncertain(self, why: str) -> None:
        """Some entries may be gone, nothing is missing."""
        self._flags.uncertain = True
        self.why = why

    def found_wrong(self, why: str, now: float) -> None:
        """The engine did not have what its events claim: rebuild from 0 where the replay buffer reaches that far.

        If it does not, or if claims of the same life are wrong again after that, the source is not sound any more.
        """
        if self._rebuilt == self.epoch:
            self.uncertain(why)
            return
        self._rebuilt = self.epoch
        self._flags_off(why)
        self._ask_at = now

    def cleared(self, seq: int) -> None:
        """The engine's cache was empty at this message: whatever was lost before does not matter any more."""
        if self.last_seq is None or not self._flags.lost_before <= seq <= self.last_seq:
            return  # a list of actions is carried out after it was made: something was lost behind it, or all is over
        self._flags.cleared()
        if self._replay is not None:
            self._replay.from_zero = True
        self.why = self._why_live()

    # Steps

    def _move(self, signal: Signal, why: str) -> None:
        following = TRANSITIONS.get((self.state, signal))
        if following is not None:
            self.state = following
            self.why = why

    def _why_live(self) -> str:
        if self.sound and self.complete:
            return "live"
        return self.why

    def _flags_off(self, why: str) -> None:
        self._flags.lost()
        self.why = why

    def _check(self) -> list[Action]:
        doubted = self._flags.doubted
        if doubted is not None and doubted[0] >= 0:
            return self._ask(Purpose.CHECK, *doubted)
        if self.last_seq is None:
            return self._ask(Purpose.SYNC, 0)
        return self._ask(Purpose.CHECK, self.last_seq, self._digests[self.last_seq])

    def _ask(self, purpose: Purpose, start: int, digest: bytes | None = None) -> list[Action]:
        self.catching_up = False
        self._replay = _Replay(purpose, start, digest, self._connections, max(self.heard_at or 0.0, self._ticked_at))
        return [Ask(Seq(start))]

    def _apply(self, seq: int, payload: bytes, digest: bytes) -> Apply:
        if self.last_seq is None:
            self._first = seq
        if seq == 0:
            self.birth = digest
        self.last_seq = seq
        self._digests[seq] = digest
        if len(self._digests) > _RECENT_DIGESTS:
            del self._digests[next(iter(self._digests))]
        return Apply(Seq(seq), payload)

    def _hold(self, seq: int, payload: bytes, digest: bytes, now: float) -> list[Action]:
        if self._held.digest(seq) == digest:
            return [Drop("duplicate")]
        if not self._held.add(seq, payload, now):
            self._overflowed = True
            return [Drop("held_full")]
        return []

    def _first_reply(self, replay: _Replay, seq: int, digest: bytes) -> list[Action]:
        match replay.purpose:
            case Purpose.SYNC:
                bridge = self._bridge(seq)
                replay.from_zero = self._expected == seq and (not seq or (bool(bridge) and bridge[0].seq == 0))
                self._flags.complete = False  # until the replay is through
                if not replay.from_zero:
                    self.why = f"joined late: the replay buffer begins at seq {seq}"
                return list(bridge)
            case Purpose.REBUILD if seq == 0 and self.birth not in (b"", digest):
                return self._new_life("its first message is another one now") + self._ask(Purpose.SYNC, 0)
            case Purpose.REBUILD if seq == 0:
                replay.from_zero = True
                self.last_seq = None
                self._digests.clear()
                self._flags.rebuilding()
                return [Withdraw("rebuild", everything=False)]
            case Purpose.REBUILD:
                replay.abandoned = True
                self._flags.holes = False  # for good: nobody has what is missing
            case Purpose.CHECK if seq != replay.start:
                return self._begins_behind(replay, seq)
            case Purpose.CHECK if digest != replay.digest:
                return self._new_life("its last message is another one now") + self._ask(Purpose.SYNC, 0)
            case Purpose.CHECK:
                pass
        return []

    def _begins_behind(self, replay: _Replay, seq: int) -> list[Action]:
        """The replay buffer no longer has the message that was asked for."""
        if not self._disconnected_since_last:
            bridged = self._bridge(seq)
            if self._expected >= seq:
                return list(bridged)
            if self._held or self._overtaken != self._expected:
                # the live frames between may be on their way still, or say where the hole ends
                self._overtaken = self._expected
                replay.abandoned = True
                return []
        away = ", after a disconnect" if self._disconnected_since_last else ""
        self._flags.lost_for_good(seq)
        self.why = f"the replay buffer begins behind the last message{away}"
        self.gaps += 1
        self.unfilled += 1
        self.last_seq = max(seq - 1, self._expected - 1)
        return []

    def _bridge(self, seq: int) -> list[Apply]:
        """Apply the held frames directly before `seq`, if they leave no hole: the buffer no longer has them."""
        start = seq
        while start - 1 in self._held:
            start -= 1
        if self.last_seq is not None and start > self._expected:
            return []
        return [self._apply_held(held) for held in range(max(start, self._expected), seq)]

    def _begin_to_catch_up(self, now: float, *, patient: bool = True) -> list[Action]:
        """The replay is over: what was held is next, and the first of it at once, for mostly there is no more."""
        self.catching_up, self._patient = True, patient
        return self.catch_up(now)

    def _caught_up(self) -> list[Action]:
        """If nothing is held any more: live again, or asking for what found no room."""
        if self._held:
            return []
        self.catching_up = False
        if self._overflowed and self._patient:
            self._overflowed = False
            return self._check()
        self._move(Signal.SYNCED, self._why_live())
        return []

    def _progress(self, seq: int) -> bool:
        """Whether another replay may fill the hole before `seq`: each hole is asked for at most twice."""
        hole = (self._expected, seq)
        again = self._asked_hole == hole
        self._asked_hole = hole
        return not again

    def _apply_held(self, seq: int) -> Apply:
        payload = self._held.take(seq)
        return self._apply(seq, payload, xxh3_128_digest(payload))

    def _forget(self) -> None:
        self.last_seq = self._live_seq = None
        self.birth = b""
        self._digests.clear()
        self._held.clear()
        self._replay = self._ask_at = self._overtaken = None
        self.catching_up = False
        self._parts = 0
        self._flags = Flags()
        self._disconnected_since_last = not self._connected

    def _new_life(self, why: str) -> list[Action]:
        self._forget()
        self.epoch = Epoch(self.epoch + 1)
        self._move(Signal.NEW_LIFE, why)
        return [Withdraw("new_life", everything=False)]

    def _begin_anew(self, signal: Signal) -> list[Action]:
        self._move(signal, "heard again after it was gone")
        self._forget()
        return self._ask(Purpose.SYNC, 0) if self._settings.replayable else []
