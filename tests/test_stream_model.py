"""The stream machine against a model of an engine and of a network that loses, repeats, cuts and restarts.

The engine is a real block pool, whose every message is known with what the pool held after it.  What the machine
applied since its last withdrawal is its view; counting the view's events gives the copies that an index would claim.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvindexer.events.states import Apply, Ask, Drop, State, Withdraw
from kvindexer.events.stream import Stream, StreamSettings
from kvindexer.testing import AllBlocksCleared, BlockPool, BlockStored, Event

BUFFER_STEPS = 12
POOL_BLOCKS = 7
Message = tuple[int, bytes]
Copies = Mapping[tuple[int, bytes], int]
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=2)
"""Of two token ids: prompts share prefixes, and twins that run together leave two copies of a block."""


class Engine:
    """Lives, each with its own numbering, and the ring buffer of the present one."""

    def __init__(self) -> None:
        self.life = 0
        self.said: dict[bytes, list[Event]] = {}
        self.truth: dict[bytes, Copies] = {}
        """What the pool held after each message."""
        self._begin()

    def _begin(self) -> None:
        self.pool = BlockPool(POOL_BLOCKS, 2, hash_seed=self.life)
        self.history: list[bytes] = []
        self.buffer: deque[Message] = deque(maxlen=BUFFER_STEPS)

    def run(self, prompts: list[list[int]]) -> list[Message]:
        """Some requests at once; what is published on their account."""
        for tokens in prompts:
            self.pool.submit(tokens)
        messages = []
        while self.pool.busy:
            if events := self.pool.step():
                messages.append(self._publish(events))
        return messages

    def _publish(self, events: list[Event]) -> Message:
        message = (len(self.history), b"%d:%d" % (self.life, len(self.history)))
        self.said[message[1]], self.truth[message[1]] = events, self.pool.held()
        self.history.append(message[1])
        self.buffer.append(message)
        return message

    def restart(self) -> None:
        self.life += 1
        self._begin()


class StreamMachine(RuleBasedStateMachine):
    """P1 order, P2 no silent falsehood, P3 convergence."""

    replayable = True

    @initialize()
    def begin(self) -> None:
        self.engine = Engine()
        self.stream = Stream(StreamSettings(replayable=self.replayable, held_max_frames=6))
        self.now = 0.0
        self.wire: deque[Message] = deque()
        self.connected = False
        self.view: list[bytes] = []
        self.copies: Counter[tuple[int, bytes]] = Counter()
        self.asked: int | None = None
        self.asks = 0
        self.certain: int | None = None
        """The newest message of this life at which both flags were up."""
        self.lost = self.failed = False
        """Since then: did a live message not come through, did a replay not bring all of the buffer."""
        self.verdicts: Counter[int] = Counter()
        """How often callers found the claims of a life wrong, by the number that the machine has given it."""
        self._do(self.stream.start(self.now))

    def _do(self, actions: list[Apply | Ask | Withdraw | Drop]) -> None:
        for action in actions:
            match action:
                case Apply(seq, payload):
                    self.view.append(payload)
                    if self._count(self.engine.said[payload]):
                        self.stream.cleared(seq)
                case Withdraw():
                    self.view = []
                    self.copies.clear()
                case Ask(start):
                    assert self.replayable
                    self.asked, self.asks = start, self.asks + 1
                case Drop(reason):
                    self.lost |= reason in {"held_full", "disconnected"}

    def _count(self, events: list[Event]) -> bool:
        """As an index counts; whether the cache was empty at some point."""
        cleared = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.copies.clear()
                cleared = True
                continue
            for block_hash in event.block_hashes:
                block = (event.group_idx, block_hash)
                if isinstance(event, BlockStored):
                    self.copies[block] += 1
                elif self.copies[block] > 1:
                    self.copies[block] -= 1
                else:
                    del self.copies[block]
        return cleared

    # What can happen

    @rule(prompts=PROMPTS)
    def publish(self, prompts: list[list[int]]) -> None:
        messages = self.engine.run(prompts)
        if self.connected:
            self.wire += messages
        else:
            self.lost |= bool(messages)

    @rule()
    def reset(self) -> None:
        """Told with the next message."""
        self.engine.pool.reset()

    @rule()
    def connect(self) -> None:
        if not self.connected:
            self.connected = True
            self._do(self.stream.connected(self.now))

    @rule()
    def disconnect(self) -> None:
        """Whatever is under way is lost."""
        if self.connected:
            self.connected = False
            self.lost |= bool(self.wire)
            self.wire.clear()
            self._do(self.stream.disconnected(self.now))

    @rule(burst=st.lists(PROMPTS, max_size=12))
    def restart(self, burst: list[list[list[int]]]) -> None:
        """The engine dies and may have published more than its last life did before anybody hears it."""
        self.disconnect()
        self.engine.restart()
        self.certain = None
        for prompts in burst:
            self.engine.run(prompts)

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 8))
    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            seq, payload = self.wire.popleft()
            self._do(self.stream.frame(seq, payload, self.now))

    @precondition(lambda self: self.stream.catching_up)
    @rule(frames=st.integers(1, 8))
    def catch_up(self, frames: int) -> None:
        """Everything else may come before it."""
        for _ in range(frames):
            self._do(self.stream.catch_up(self.now))

    @precondition(lambda self: self.wire)
    @rule(place=st.integers(0, 100))
    def lose(self, place: int) -> None:
        """A slow subscriber: the publisher drops a message without a word."""
        del self.wire[place % len(self.wire)]
        self.lost = True

    @precondition(lambda self: self.wire)
    @rule()
    def repeat(self) -> None:
        self.wire.appendleft(self.wire[0])

    @precondition(lambda self: self.asked is not None)
    @rule(missing=st.sets(st.integers(0, 30), max_size=2), ends=st.booleans(), until=st.integers(1, 20))
    def answer_badly(self, missing: set[int], ends: bool, until: int) -> None:  # noqa: FBT001 - drawn by Hypothesis
        """A replay with inner gaps, that may stop half way, and whose end marker may be lost."""
        self._answer(missing, until, ends=ends)

    @precondition(lambda self: self.asked is not None)
    @rule()
    def answer(self) -> None:
        self._answer(set(), None, ends=True)

    def _answer(self, missing: set[int], until: int | None, *, ends: bool) -> None:
        start, mine = self.asked, self.asks
        assert start is not None
        self.failed |= bool(missing) or until is not None or not ends
        messages = [message for message in self.engine.buffer if message[0] >= start]
        for seq, payload in messages[:until]:
            if seq in missing and seq != messages[0][0]:
                continue  # a ROUTER drops what comes behind its high-water mark, never the first
            self._do(self.stream.replay_frame(seq, payload, self.now))
            if self.asks != mine:
                return  # the machine has asked anew, the shell has hung up on this one
        self.asked = None
        self._do(self.stream.replay_end(self.now) if ends else self.stream.replay_failed("no end", self.now))

    @precondition(lambda self: self.asked is not None)
    @rule()
    def never_answer(self) -> None:
        self.asked, self.failed = None, True
        self._do(self.stream.replay_failed("no answer", self.now))

    @rule()
    def find_wrong(self) -> None:
        """Callers say that the engine does not have what its events claim; here they are mistaken."""
        self.verdicts[self.stream.epoch] += 1
        self.stream.found_wrong("callers say so", self.now)
        assert not self.stream.sound

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 20.0, 400.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._do(self.stream.tick(self.now))

    # What must hold

    @invariant()
    def order(self) -> None:
        """P1: what was applied since the last withdrawal is of one life, in order, each once."""
        if not hasattr(self, "view"):
            return
        seen = [tuple(map(int, payload.split(b":"))) for payload in self.view]
        assert seen == sorted(set(seen))
        if self.stream.sound and seen:
            assert seen[-1][0] == self.engine.life, "a dead life's blocks are never called sound"
        assert self.stream.epoch <= self.engine.life + 1, "no life is made up"

    @invariant()
    def truth(self) -> None:
        """P2, at every step: the copies are to what the pool held at the newest applied message as the flags say."""
        if not hasattr(self, "view") or not self.view:
            return
        held = self.engine.truth[self.view[-1]]
        if self.stream.sound:
            assert all(n <= held.get(block, 0) for block, n in self.copies.items()), (self.copies, held)
        if self.stream.complete:
            assert all(n <= self.copies[block] for block, n in held.items()), (self.copies, held)
        if self.stream.sound and self.stream.complete:
            newest = int(self.view[-1].split(b":")[1])
            self.certain, self.failed = newest, False
            self.lost = any(seq > newest for seq, _ in {*self.engine.buffer}.difference(self.wire))

    def teardown(self) -> None:
        """P2 and P3: traffic stops, the engine is reachable, a few probe intervals pass."""
        if not hasattr(self, "view"):
            return
        self.connect()
        while self.wire:
            self.deliver(8)
        repairable = self._repairable()
        for _ in range(40):
            if self.asked is not None:
                self._answer(set(), None, ends=True)
            while self.stream.catching_up:
                self.catch_up(1)
            self.now += 6.0
            self._do(self.stream.tick(self.now))
            self.truth()
        assert self.stream.state is State.LIVE
        assert self.stream.lag_s(self.now) == 0.0
        if repairable and self._believed():
            assert (self.stream.sound, self.stream.complete) == (True, True), self.stream.why
        if self.stream.sound and self.stream.complete:
            assert self.copies == self._newest_truth(), self.view
        if self.view:
            assert self.view[-1] == self.engine.history[-1], "the newest message is always in"

    def _newest_truth(self) -> Copies:
        """A reset that no message has told of yet is not known to anybody."""
        return self.engine.truth[self.engine.history[-1]] if self.engine.history else {}

    def _repairable(self) -> bool:
        """Nothing is lost for good: the buffer has all of this life, or all since the flags were up.

        In the second case live events have to wait for the repair: after a replay in vain they don't, and what is
        lost before them stays lost.
        """
        if len(self.engine.history) <= BUFFER_STEPS:
            return True
        if self.certain is None or self.certain < self.engine.buffer[0][0]:
            return False
        return not (self.lost and self.failed)

    def _believed(self) -> bool:
        """Claims that were found wrong are proven anew by a replay of the whole life, if there is one, once."""
        verdicts = self.verdicts[self.stream.epoch]
        return not verdicts or (verdicts == 1 and len(self.engine.history) <= BUFFER_STEPS)


class NoReplayMachine(StreamMachine):
    """A publisher without a replay socket: what is lost at the very end can't be noticed, everything else is."""

    replayable = False

    def teardown(self) -> None:
        """P2: one more message comes through; flags that are still up are true."""
        if not hasattr(self, "view"):
            return
        self.connect()
        before = len(self.engine.history)
        while len(self.engine.history) == before:
            self.publish([[before] * 5])
        while self.wire:
            self.deliver(8)
        assert self.stream.state is State.LIVE
        if self.stream.sound and self.stream.complete:
            assert self.copies == self._newest_truth()
        assert self.view[-1] == self.engine.history[-1]


TestStream = StreamMachine.TestCase
TestNoReplay = NoReplayMachine.TestCase
TestStream.settings = TestNoReplay.settings = hypothesis_settings(
    max_examples=500, stateful_step_count=40, deadline=None, derandomize=True
)
