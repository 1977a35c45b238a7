"""What one replica knows of one shard, and what it should do about it.  Decisions only, no I/O.

Every replica follows every source and could write every shard.  To write none twice they take turns, and to write
nothing wrong they compare: whose life of the engine is it, who has seen more of it, who is ahead?

    what Redis holds                                  what follows
    nothing                                           Rewrite
    our epoch, not ahead of us, as good as ours       Flush what has changed since; Rewrite if that is not known
    our epoch, ahead of us                            Wait: we lag
    our epoch, with too many entries for its buckets  Grow
    our epoch, less covered than ours                 Rewrite
    our epoch, better covered than ours               Load it; if nobody writes it any more: Rewrite it as it is here
    the epoch that we have seen end                   Rewrite as the next epoch
    a later epoch, its last message is on our stream  adopt the epoch, then as above
    a later epoch, and not our life                   Wait for the engine's proof, then Rewrite as the next epoch
    an earlier epoch than ours                        Rewrite: Redis has lost writes

A life is told by its first message where both sides have seen it, otherwise by the last message that Redis has.
Payloads carry a time stamp, so two lives never share a message.  A Rewrite is a compare-and-set on the epoch that
was seen: of two replicas that find out the same thing one comes first, and the other adopts what it wrote.

Invariant: what is written as (epoch, next) is what a replica held when it had applied exactly the messages before
`next` of that life; a better covered shard is never overwritten by a less covered one while anybody writes it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Final, NamedTuple, Protocol

from kvindexer.store.layout import Checkpoint, Coverage, Found, Meta, more_buckets, overfull

MAX_FLUSH_RECORDS: Final = 16_384
"""Records that one script may write: some 50 ms of a server; what is more is staged piece by piece."""
EAGER_RECORDS: Final = 2_048
"""Changed records from which on a flush does not wait for more."""
_STAGNANT_TURNS: Final = 5
"""Take-over times without any progress after which nobody seems to write a shard any more."""
_LOAD_PAUSE_S: Final = 60.0
_MESSAGE_BYTES: Final = 256
"""About what the journal keeps of a message beside its hashes."""


class Local(Protocol):
    """What a shard asks of its source's stream; see `events.stream.Stream`."""

    @property
    def next_seq(self) -> int:
        """The seq behind the last applied message."""

    @property
    def birth(self) -> bytes:
        """Digest of the life's first message; empty if it was not seen."""

    @property
    def coverage(self) -> tuple[int, int]:
        """Level and first seq, see `Coverage`."""

    @property
    def settled(self) -> bool:
        """Not in the midst of taking in a life from its start."""

    @property
    def proven_at(self) -> float | None:
        """When the engine was asked that said last that this is its present life, with nothing lost."""


class Wait(NamedTuple):
    """Nothing to do, and why."""

    why: str


class Flush(NamedTuple):
    """Write what has changed since `base` as it is now; see `Shard.changed_since`."""

    base: int


class Rewrite(NamedTuple):
    """Write everything anew."""

    expected: int | None
    """The epoch that must still be there; None: no content."""
    epoch: int
    accept_less: bool
    why: str


class Grow(NamedTuple):
    """Move what Redis holds, as it is, into more buckets."""

    meta: Meta
    """What Redis holds."""
    buckets: int


class Load(NamedTuple):
    """Take over what Redis has, and go on from its checkpoint."""

    why: str


Step = Wait | Flush | Rewrite | Grow | Load

IN_STEP: Final = Wait("in step")
"""Redis holds all that we hold."""


class _Kin:
    """Whether Redis' checkpoint lies on our stream."""

    SAME = "same"
    OTHER = "other"
    AHEAD = "ahead"
    UNKNOWN = "unknown"


_DOUBTS: Final = {
    _Kin.AHEAD: "Redis is ahead",
    _Kin.OTHER: "Redis has another life; the engine must say which is over",
    _Kin.UNKNOWN: "it is not known whether Redis has the same life",
}


class _Batch(NamedTuple):
    digest: bytes
    touched: array[int]
    at: float


class Shard:
    """One replica's view of one shard.  Times are of one monotonic clock, in seconds."""

    def __init__(
        self,
        local: Local,
        *,
        registration: int = 0,
        flush_interval_s: float = 0.5,
        takeover_s: float = 3.0,
        max_pending_bytes: int = 2**20,
        proof_patience_s: float = 0.0,
    ) -> None:
        self._local = local
        self.registration = registration
        self.flush_interval_s = flush_interval_s
        self._takeover_s = takeover_s
        self._proof_patience_s = proof_patience_s
        """Within which the engine, if it is there, has said which life it lives: it was asked several times."""
        self.max_pending_bytes = max_pending_bytes
        self.epoch: int | None = None
        """The agreed number of the life we follow; None as long as it is not known."""
        self._over = 0
        """An epoch that we have seen end."""
        self.base = 0
        """All changes since this seq was next are in the journal."""
        self._base_digest = b""
        self._journal: OrderedDict[int, _Batch] = OrderedDict()
        """next -> what came before it"""
        self._amended: set[int] = set()
        """Records that changed without a message of this source."""
        self.pending_bytes = 0
        self.pending_records = 0
        self._amended_at = 0.0
        self._trouble_at: float | None = None
        self.remote: Found | None = None
        self._remote_since = 0.0
        self._written_at = 0.0
        self._loaded_at: float | None = None
        self.divergent = False
        """Redis was found to hold something else than memory at the same checkpoint."""
        self.turn = 0
        """How many replicas come before us in writing this shard."""

    # What happens here

    def applied(self, seq: int, digest: bytes, touched: array[int], now: float) -> None:
        """A message went into the index."""
        self._journal[seq + 1] = _Batch(digest, touched, now)
        self.pending_records += len(touched)
        self.pending_bytes += _MESSAGE_BYTES + 8 * len(touched)
        while self.pending_bytes > self.max_pending_bytes and self._journal:
            self._forget_oldest()

    def amended(self, touched: Iterable[int], now: float) -> None:
        """Records of this source changed through a message of another one."""
        self._amended_at = self._amended_at if self._amended else now
        self._amended.update(touched)

    def new_life(self) -> None:
        """The engine was proven to live another life; what died with the old one is withdrawn."""
        self._over = max(self._over, self.epoch or 0)
        self.epoch = None
        self._start_over()

    def rebuilt(self) -> None:
        """The same life is taken in again from its first message."""
        self._start_over()

    def left(self) -> None:
        """The source is gone from this replica's answers: a local view, which Redis never hears of."""
        self.epoch = None
        self._start_over()

    def loaded(self, checkpoint: Checkpoint, now: float) -> None:
        """What Redis held at this checkpoint is in the index."""
        self._start_over()
        self.epoch = checkpoint.epoch
        self.base, self._base_digest = checkpoint.next, checkpoint.digest
        self._loaded_at = now

    def load_tried(self, now: float) -> None:
        """A load was decided on: the next one has to wait, whatever comes of this one."""
        self._loaded_at = now

    def _start_over(self) -> None:
        self._journal.clear()
        self._amended.clear()
        self.base, self._base_digest = 0, b""
        self.pending_bytes = self.pending_records = 0
        self._trouble_at = None

    # What Redis says

    def read(self, found: Found, now: float, asked_at: float | None = None) -> None:
        """The meta hash, as it was at some time since `asked_at`; what was asked for before our last write is old."""
        before = self.remote
        if before is not None and asked_at is not None and asked_at < self._written_at:
            return
        self.remote = found
        if before is None or _position(before) != _position(found):
            self._remote_since = now
        meta = found.meta
        if meta is not None and meta.checkpoint.epoch == self.epoch and self._kin(meta.checkpoint) is _Kin.SAME:
            self._trim(meta.checkpoint.next)

    def stored(self, meta: Meta, now: float, *, anew: bool = False) -> None:
        """What we wrote is in Redis; `anew`: all of it, so that nothing can differ."""
        self.epoch = meta.checkpoint.epoch
        self.remote = Found(meta, None)
        self._remote_since = self._written_at = now
        self._trouble_at = None
        self.divergent = self.divergent and not anew
        self._trim(meta.checkpoint.next)

    def _trim(self, upto: int) -> None:
        """What is in Redis needs no journal any more."""
        while self._journal and next(iter(self._journal)) <= upto:
            self._forget_oldest()
        self.base = max(self.base, upto)

    def _forget_oldest(self) -> None:
        self.base, batch = self._journal.popitem(last=False)
        self._base_digest = batch.digest
        self.pending_records -= len(batch.touched)
        self.pending_bytes -= _MESSAGE_BYTES + 8 * len(batch.touched)

    # What to do

    @property
    def dirty_at(self) -> float | None:
        """When the oldest change happened that Redis has not got, as far as is known."""
        times = [batch.at for batch in islice(self._journal.values(), 1)]
        return min([*times, self._amended_at] if self._amended else times, default=None)

    @property
    def eager(self) -> bool:
        """Whether it is our turn and so much has changed that a flush is worth it at once."""
        return self.turn == 0 and self.pending_records >= EAGER_RECORDS

    def checkpoint(self, epoch: int) -> Checkpoint:
        """Where the index is now."""
        upto = self._local.next_seq
        return Checkpoint(epoch, upto, self._digest_before(upto) or b"", self._local.birth, self._coverage())

    def changed_since(self, base: int) -> list[array[int]]:
        """The hashes whose records may differ from what they were when `base` was next; some several times."""
        parts = [array("Q", self._amended)]
        for upto, batch in reversed(self._journal.items()):
            if upto <= base:
                break
            parts.append(batch.touched)
        return parts

    def take_amendments(self) -> set[int]:
        """Records that changed without a message of this source: for the caller to write, or to hand back."""
        taken, self._amended = self._amended, set()
        return taken

    def decide(self, now: float) -> Step:
        """What to do now."""
        if self.remote is None:
            return Wait("Redis has not been read")
        if not self._local.settled:
            return Wait("the source is being taken in")
        if self.remote.removed is not None and self.remote.removed >= self.registration:
            return Wait("the source was unregistered")
        meta = self.remote.meta
        if meta is None:
            if not self._local.next_seq:
                return Wait("nothing to write")
            return self._rewrite(None, self.epoch or self._over + 1, "Redis has no copy", now)
        return self._compare(meta, now)

    def _compare(self, meta: Meta, now: float) -> Step:
        theirs = meta.checkpoint
        if self.epoch is not None and self.epoch > theirs.epoch:
            return self._rewrite(theirs.epoch, self.epoch, "Redis has an earlier life", now)
        if self.epoch is None and theirs.epoch <= self._over:
            return self._rewrite(theirs.epoch, self._over + 1, "a new life", now)
        kin = self._kin(theirs)
        if kin is _Kin.SAME or (kin is _Kin.UNKNOWN and self.epoch == theirs.epoch):
            if self.epoch != theirs.epoch:
                self.epoch = theirs.epoch
                self._trim(theirs.next)
            return self._go_on(meta, now)
        proven = self._up_to_date and kin is not _Kin.UNKNOWN
        waited = self._stagnant(now) and now - self._remote_since >= self._proof_patience_s
        if not proven and (kin is _Kin.AHEAD or not waited):
            return Wait(_DOUBTS[kin])
        return self._rewrite(theirs.epoch, theirs.epoch + 1, "Redis has a life that is over", now)

    def _go_on(self, meta: Meta, now: float) -> Step:
        """The same life: whoever has more of it goes first."""
        theirs, mine = meta.checkpoint, self._coverage()
        if theirs.coverage.better_than(mine):
            return self._behind_better(theirs, mine, now)
        if self._local.next_seq < theirs.next:
            return Wait(_DOUBTS[_Kin.AHEAD])
        due = self._due(now)
        for condition, why in (
            (mine.better_than(theirs.coverage), "less is known in Redis than here"),
            (self.divergent, "Redis differs from memory"),
            (theirs.next < self.base, "Redis is too far behind"),
            (due and self.pending_records > MAX_FLUSH_RECORDS, "much has changed"),
        ):
            if condition:
                return self._rewrite(theirs.epoch, theirs.epoch, why, now)
        if overfull(meta.entries, meta.buckets):
            return self._in_turn(Grow(meta, more_buckets(meta.entries, meta.buckets)), "more buckets are needed", now)
        if self._local.next_seq == theirs.next and not self._amended:
            self._trouble_at = None
            return IN_STEP
        return Flush(theirs.next) if due else Wait("more may come")

    def _behind_better(self, theirs: Checkpoint, mine: Coverage, now: float) -> Step:
        """Redis has more of the truth than we: take it over, if somebody keeps it up or we can go on from it."""
        rested = self._loaded_at is None or now - self._loaded_at >= _LOAD_PAUSE_S
        reachable = mine.level > 0 and theirs.next >= mine.first
        if rested and (reachable or (mine.level == 0 and not self._stagnant(now))):
            return Load("more is known in Redis than here")
        if (self._local.next_seq > theirs.next or self.divergent) and self._stagnant(now):
            return self._rewrite(theirs.epoch, theirs.epoch, "nobody who knows more writes it", now, accept_less=True)
        return Wait("more is known in Redis than here")

    def _rewrite(self, expected: int | None, epoch: int, why: str, now: float, *, accept_less: bool = False) -> Step:
        return self._in_turn(Rewrite(expected, epoch, accept_less, why), why, now)

    def _in_turn(self, step: Step, why: str, now: float) -> Step:
        """What anybody could do, once: whose turn is later waits longer."""
        self._trouble_at = self._trouble_at if self._trouble_at is not None else now
        if now - self._trouble_at < self.turn * self._takeover_s:
            return Wait(f"another replica's turn: {why}")
        return step

    def _due(self, now: float) -> bool:
        waited_s = 0.0 if self.dirty_at is None else now - self.dirty_at
        return self.eager or waited_s >= self.flush_interval_s + self.turn * self._takeover_s

    @property
    def _up_to_date(self) -> bool:
        """Whether the engine was asked after we saw what Redis holds, and proved our life: then it has nothing newer.

        When the answer came says nothing: it may have been under way for long, and the engine restarted meanwhile.
        """
        return self._local.proven_at is not None and self._local.proven_at > self._remote_since

    def _stagnant(self, now: float) -> bool:
        """Whether nobody has written the shard for long."""
        return now - self._remote_since >= _STAGNANT_TURNS * self._takeover_s

    def _coverage(self) -> Coverage:
        return Coverage(*self._local.coverage)

    def _digest_before(self, upto: int) -> bytes | None:
        if upto == self.base:
            return self._base_digest
        batch = self._journal.get(upto)
        return None if batch is None else batch.digest

    def _kin(self, theirs: Checkpoint) -> str:
        birth = self._local.birth
        if birth and theirs.birth:
            if birth != theirs.birth:
                return _Kin.OTHER
            return _Kin.AHEAD if theirs.next > self._local.next_seq else _Kin.SAME
        if theirs.next > self._local.next_seq:
            return _Kin.AHEAD
        digest = self._digest_before(theirs.next)
        if digest is None or (not digest and theirs.digest):
            return _Kin.UNKNOWN
        return _Kin.SAME if digest == theirs.digest else _Kin.OTHER


def _position(found: Found) -> tuple[object, ...]:
    meta = found.meta
    return (found.removed,) if meta is None else (found.removed, *meta.checkpoint[:3], meta.generation)
