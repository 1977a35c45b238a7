"""The ZMQ side of a fake engine: a publishing socket, a ring buffer, and a replay socket that answers from it.

    callers --closures--> queue --+
    wake-up socket ---------------+--> one thread: PUB, ROUTER, ring buffer
    replay requests --------------+

Invariant: the thread alone touches the sockets and the buffer, in the order in which callers asked. It sleeps until
there is something to do. The publishing socket is an XPUB, which is a PUB on the wire, so that a test can wait for
its subscribers instead of sleeping.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import zmq

from kvindexer.testing.faults import Faults

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

SEQ_BYTES: Final = 8
END_MARKER: Final = b"\xff" * SEQ_BYTES
REQUEST_FRAMES: Final = 3
PUB_HWM: Final = 100_000
KEPT_REQUESTS: Final = 1_000
REBIND_ATTEMPTS: Final = 500
REBIND_PAUSE_S: Final = 0.01
CLOSE_LINGER_MS: Final = 300
JOIN_TIMEOUT_S: Final = 5.0


class Publisher:
    """Publishes numbered payloads and replays them.

    Bound on construction (port 0 lets the system choose; `endpoint` and `replay_endpoint` then tell). With
    `connect` the publishing socket dials a subscriber that binds, as vLLM does for endpoints without a wildcard.
    With `curve_secret_key` both sockets speak CURVE, to everybody who knows the public key.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        *,
        topic: str = "",
        buffer_steps: int = 10_000,
        replay_has_topic: bool = True,
        replay_hwm: int = 0,
        connect: bool = False,
        curve_secret_key: bytes | None = None,
    ) -> None:
        self._curve_secret_key = curve_secret_key
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.faults = Faults()
        self.topic = topic.encode()
        self.replay_requests: deque[int] = deque(maxlen=KEPT_REQUESTS)
        self.malformed_requests = 0
        self._replay_has_topic = replay_has_topic
        self._replay_hwm = replay_hwm
        self._connect = connect
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._subscribers = 0
        self._subscribers_changed = threading.Condition()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stop = threading.Event()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._context = zmq.Context()
        self._submit_lock = threading.Lock()
        self._wake, self._woken = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake.sndhwm = self._woken.rcvhwm = 0
        self._wake.bind("inproc://wake")
        self._woken.connect("inproc://wake")
        self._pub: zmq.Socket[bytes] | None = None
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self._open()
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name=f"publisher {self.endpoint}", daemon=True)
        self._thread.start()

    def publish(self, seq: int, payload: bytes) -> None:
        """Hand over one message; returns before it is sent."""
        self._submit(lambda: self._send(seq, payload))

    def rebind(self, *, down_s: float = 0.0) -> None:
        """Die and come back on the same ports: subscribers are cut off, the buffer is empty."""
        self._wait(lambda: self._reopen(down_s))

    def flush(self) -> None:
        """Wait until everything handed over so far has been given to the sockets."""
        self._wait(lambda: None)

    def wait_for_subscribers(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until at least that many subscriptions are in place; TimeoutError if they do not come."""
        with self._subscribers_changed:
            if not self._subscribers_changed.wait_for(lambda: self._subscribers >= count, timeout_s):
                raise TimeoutError(f"{self.endpoint}: {self._subscribers} of {count} subscribers in {timeout_s} s")

    def close(self) -> None:
        """Send what was handed over, close the sockets, end the thread. May be called twice."""
        self._closing.set()
        with self._submit_lock:
            if not self._stop.is_set():
                self._commands.put(self._stop.set)
                self._wake.send(b"")
        self._thread.join(JOIN_TIMEOUT_S)
        if self._failure is not None:
            raise RuntimeError(f"{self.endpoint}: the publisher thread failed") from self._failure

    def _submit(self, command: Callable[[], None]) -> None:
        with self._submit_lock:
            if self._stop.is_set():
                raise RuntimeError(f"{self.endpoint}: the publisher is closed") from self._failure
            self._commands.put(command)
            self._wake.send(b"")

    def _wait(self, command: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # noqa: BLE001 -- goes to the caller, who waits for it
                done.set_exception(error)
            else:
                done.set_result(None)

        self._submit(run)
        done.result()

    # -- everything below runs in the thread, but for the first _open ------------------------------------------------

    def _open(self) -> None:
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.sndhwm = PUB_HWM
        self._pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._secure(self._pub)
        if self._connect:
            self._pub.connect(self.endpoint)
        else:
            self.endpoint = _bind(self._pub, self.endpoint)
        if self.replay_endpoint is not None:
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.sndhwm = self._replay_hwm
            self._secure(self._replay)
            self.replay_endpoint = _bind(self._replay, self.replay_endpoint)

    def _secure(self, socket: zmq.Socket[bytes]) -> None:
        if self._curve_secret_key is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._curve_secret_key)

    def _close(self, linger_ms: int) -> None:
        for socket in (self._pub, self._replay):
            if socket is not None:
                socket.close(linger=linger_ms)
        self._pub = self._replay = None
        self._count_subscribers(-self._subscribers)

    def _reopen(self, down_s: float) -> None:
        self._close(linger_ms=0)
        self._buffer.clear()
        self._closing.wait(down_s)
        for attempt in range(REBIND_ATTEMPTS):
            try:
                self._open()
            except zmq.ZMQError as error:
                # the old listener is closed by another thread of libzmq, a moment later
                self._close(linger_ms=0)
                if error.errno != zmq.EADDRINUSE or attempt == REBIND_ATTEMPTS - 1:
                    raise
                self._closing.wait(REBIND_PAUSE_S)
            else:
                return

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._serve_once()
        except BaseException as error:  # noqa: BLE001 -- raised to the next caller
            self._failure = error
        finally:
            with self._submit_lock:
                self._stop.set()
            self._obey()  # what was handed over before that; nothing comes after
            self._close(linger_ms=CLOSE_LINGER_MS)
            self._wake.close(linger=0)
            self._woken.close(linger=0)
            self._context.term()

    def _serve_once(self) -> None:
        poller = zmq.Poller()
        for socket in (self._woken, self._pub, self._replay):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll())
        if self._pub in ready:
            self._read_subscription()
        while self._woken.poll(0):
            self._woken.recv()
        self._obey()  # before any answer: who asks after publish() returned must find the message in the buffer
        if self._replay in ready:
            self._answer()

    def _obey(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _read_subscription(self) -> None:
        if self._pub is not None:
            message = self._pub.recv()
            self._count_subscribers(1 if message[:1] == b"\x01" else -1)

    def _count_subscribers(self, change: int) -> None:
        with self._subscribers_changed:
            self._subscribers += change
            self._subscribers_changed.notify_all()

    def _send(self, seq: int, payload: bytes) -> None:
        faults = self.faults
        if seq not in faults.drop_and_forget_seqs:
            self._buffer.append((seq, payload))
        lost = seq in faults.drop_seqs | faults.drop_and_forget_seqs
        for _ in range(0 if lost else 2 if seq in faults.duplicate_seqs else 1):
            if self._pub is not None:
                self._pub.send_multipart([self.topic, seq.to_bytes(SEQ_BYTES, "big"), payload])

    def _answer(self) -> None:
        if self._replay is None:
            return
        request = self._replay.recv_multipart()
        if len(request) != REQUEST_FRAMES or request[1] or len(request[2]) != SEQ_BYTES:
            self.malformed_requests += 1
            log.warning("replay request dropped: expected identity, empty, 8-byte seq, got %d frames", len(request))
            return
        start = int.from_bytes(request[2], "big")
        self.replay_requests.append(start)
        self._closing.wait(self.faults.replay_delay_s)
        for frames in self._reply(start):
            self._replay.send_multipart([request[0], b"", *frames])

    def _reply(self, start: int) -> list[list[bytes]]:
        faults = self.faults
        topic, no_topic = ([self.topic], [b""]) if self._replay_has_topic else ([], [])
        if faults.replay_silent:
            return []
        if faults.replay_garbage:
            return [[b"?"], [*topic, b"no seq", b"?"], [*topic, start.to_bytes(SEQ_BYTES, "big"), b"\xc1\xc1"]]
        chosen = (
            [*topic, seq.to_bytes(SEQ_BYTES, "big"), payload]
            for seq, payload in self._buffer
            if seq >= start and seq not in faults.replay_skip_seqs
        )
        replies = list(islice(chosen, faults.replay_stop_after))
        if faults.replay_stop_after is None and not faults.replay_no_end:
            replies.append([*no_topic, END_MARKER, b""])
        return replies


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind, and return where subscribers of this machine reach it."""
    socket.bind(endpoint)
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    return bound.replace("//0.0.0.0:", "//127.0.0.1:")
