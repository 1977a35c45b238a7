"""The stream machine against a model of an engine and of a network that loses, repeats, cuts and restarts.

The model publishes payloads that name their life and number.  What the machine applied since its last withdrawal
is its view; the history of the engine's present life is the truth.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvindexer.events.states import Apply, Ask, Drop, State, Withdraw
from kvindexer.events.stream import Stream, StreamSettings

BUFFER_STEPS = 12
Message = tuple[int, bytes]


class Engine:
    """Lives, each with its own numbering, and the ring buffer of the present one."""

    def __init__(self) -> None:
        self.life = 0
        self.history: list[bytes] = []
        self.buffer: deque[Message] = deque(maxlen=BUFFER_STEPS)

    def publish(self) -> Message:
        message = (len(self.history), b"%d:%d" % (self.life, len(self.history)))
        self.history.append(message[1])
        self.buffer.append(message)
        return message

    def restart(self) -> None:
        self.life += 1
        self.history = []
        self.buffer.clear()


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
        self.asked: int | None = None
        self.asks = 0
        self._do(self.stream.start(self.now))

    def _do(self, actions: list[Apply | Ask | Withdraw | Drop]) -> None:
        for action in actions:
            match action:
                case Apply(_, payload):
                    self.view.append(payload)
                case Withdraw():
                    self.view = []
                case Ask(start):
                    assert self.replayable
                    self.asked, self.asks = start, self.asks + 1
                case Drop():
                    pass

    # What can happen

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            message = self.engine.publish()
            if self.connected:
                self.wire.append(message)

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
            self.wire.clear()
            self._do(self.stream.disconnected(self.now))

    @rule(burst=st.integers(0, 20))
    def restart(self, burst: int) -> None:
        """The engine dies and may have published more than its last life did before anybody hears it."""
        self.disconnect()
        self.engine.restart()
        for _ in range(burst):
            self.engine.publish()

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 8))
    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            seq, payload = self.wire.popleft()
            self._do(self.stream.frame(seq, payload, self.now))

    @precondition(lambda self: self.wire)
    @rule(place=st.integers(0, 100))
    def lose(self, place: int) -> None:
        """A slow subscriber: the publisher drops a message without a word."""
        del self.wire[place % len(self.wire)]

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
        self.asked = None
        self._do(self.stream.replay_failed("no answer", self.now))

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
        assert not self.stream.sound or len({life for life, _ in seen}) <= 1
        if self.stream.sound and seen:
            assert seen[-1][0] == self.engine.life, "a dead life's blocks are never called sound"
        assert self.stream.epoch <= self.engine.life + 1, "no life is made up"

    def teardown(self) -> None:
        """P2 and P3: traffic stops, the engine is reachable, a few probe intervals pass."""
        if not hasattr(self, "view"):
            return
        self.connect()
        while self.wire:
            self.deliver(8)
        for _ in range(40):
            if self.asked is not None:
                self._answer(set(), None, ends=True)
            self.now += 6.0
            self._do(self.stream.tick(self.now))
        assert self.stream.state is State.LIVE
        assert self.stream.lag_s(self.now) == 0.0
        exact = self.view == self.engine.history
        if self.stream.sound and self.stream.complete:
            assert exact, (self.view, self.engine.history)
        elif len(self.engine.history) <= BUFFER_STEPS:
            assert exact, (self.view, self.engine.history)
            assert self.stream.sound
            assert self.stream.complete
        if self.view:
            assert self.view[-1] == self.engine.history[-1], "the newest message is always in"


class NoReplayMachine(StreamMachine):
    """A publisher without a replay socket: what is lost at the very end can't be noticed, everything else is."""

    replayable = False

    def teardown(self) -> None:
        """P2: one more message comes through; flags that are still up are true."""
        if not hasattr(self, "view"):
            return
        self.connect()
        self.publish(1)
        while self.wire:
            self.deliver(8)
        assert self.stream.state is State.LIVE
        if self.stream.sound and self.stream.complete:
            assert self.view == self.engine.history
        assert self.view[-1] == self.engine.history[-1]


TestStream = StreamMachine.TestCase
TestNoReplay = NoReplayMachine.TestCase
TestStream.settings = TestNoReplay.settings = hypothesis_settings(
    max_examples=500, stateful_step_count=40, deadline=None, derandomize=True
)
