"""The fake engine on real sockets, seen by raw ZMQ clients."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgpack  # type: ignore[import-untyped]
import pytest
import zmq

from kvindexer.testing import (
    FakeEngine,
    Faults,
    LlmdFs,
    Player,
    PoolShape,
    Sglang,
    SimulatedFleet,
    TrafficRequest,
    Vllm,
    play,
    read_recording,
)
from kvindexer.testing.recording import restamp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECORDINGS = Path(__file__).parent / "recordings"
PATIENCE_MS = 10_000
SILENCE_MS = 150
END = b"\xff" * 8


class Client:
    """A SUB and a DEALER without any cleverness."""

    def __init__(self, endpoint: str, replay_endpoint: str | None, topic: bytes = b"") -> None:
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.subscribe(topic)
        self.sub.rcvtimeo = PATIENCE_MS
        self.sub.reconnect_ivl = 10
        self.sub.connect(endpoint)
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.rcvtimeo = PATIENCE_MS
        self.dealer.rcvhwm = 0
        self.dealer.reconnect_ivl = 10
        if replay_endpoint is not None:
            self.dealer.connect(replay_endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def live(self, count: int) -> list[int]:
        """Receive that many live messages; return their numbers."""
        return [int.from_bytes(self.sub.recv_multipart()[1], "big") for _ in range(count)]

    def silent(self, socket: zmq.Socket[bytes]) -> bool:
        """Tell whether nothing comes for a little while."""
        return not socket.poll(SILENCE_MS)

    def ask(self, start: int, frames: Sequence[bytes] | None = None) -> None:
        """Ask for a replay."""
        self.dealer.send_multipart(frames or [b"", start.to_bytes(8, "big")])

    def replay(self, start: int) -> list[list[bytes]]:
        """Ask for a replay and receive it up to the end marker, which is included."""
        self.ask(start)
        answer = [self.dealer.recv_multipart()]
        while answer[-1][-2] != END:
            answer.append(self.dealer.recv_multipart())
        return answer


def seqs(answer: Sequence[Sequence[bytes]]) -> list[int]:
    return [int.from_bytes(frames[-2], "big") for frames in answer if frames[-2] != END]


def publish(engine: FakeEngine, count: int) -> None:
    """Run requests of one full block each, all different: one message each."""
    for _ in range(count):
        first = 0 if engine.last_seq is None else (engine.last_seq + 1) * 1000
        engine.run_request(range(first, first + engine.shape.block_size))


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(topic="kv@pod", pool=PoolShape(num_blocks=64, block_size=4)) as engine:
        yield engine


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[Client]:
    with Client(engine.endpoint, engine.replay_endpoint) as client:
        engine.wait_for_subscribers()
        yield client


def test_messages_have_three_frames_and_growing_numbers_and_stamps(engine: FakeEngine, client: Client) -> None:
    publish(engine, 3)
    messages = [client.sub.recv_multipart() for _ in range(3)]
    assert [message[:2] for message in messages] == [[b"kv@pod", i.to_bytes(8, "big")] for i in range(3)]
    stamps = [msgpack.unpackb(message[2])[0] for message in messages]
    assert stamps == sorted(set(stamps))
    assert all(isinstance(stamp, float) for stamp in stamps)
    assert engine.last_seq == 2


def test_events_on_the_wire_sum_up_to_what_is_held(engine: FakeEngine, client: Client) -> None:
    for start in range(0, 400, 7):
        engine.run_request(range(start, start + 40), max_tokens=3)
    assert engine.last_seq is not None
    copies: dict[tuple[int, int], int] = {}
    for _ in range(engine.last_seq + 1):
        for event in msgpack.unpackb(client.sub.recv_multipart()[2])[1]:
            change = 1 if event["type"] == "BlockStored" else -1
            for block_hash in event["block_hashes"]:
                key = (event["group_idx"], block_hash)
                copies[key] = copies.get(key, 0) + change
    assert {key: count for key, count in copies.items() if count} == engine.held()


def test_a_step_without_events_sends_nothing(engine: FakeEngine, client: Client) -> None:
    engine.run_request(range(3))
    assert engine.last_seq is None
    assert client.silent(client.sub)


@pytest.mark.parametrize(
    ("dialect", "topic_frames"), [(Vllm((0, 25)), []), (Sglang(), []), (Vllm((0, 26)), [b"kv@pod"])]
)
def test_both_replay_framings(dialect: Any, topic_frames: list[bytes]) -> None:
    with (
        FakeEngine(topic="kv@pod", dialect=dialect) as engine,
        Client(engine.endpoint, engine.replay_endpoint) as client,
    ):
        publish(engine, 4)
        *batches, end = client.replay(2)
        assert [frames[:-1] for frames in batches] == [[b"", *topic_frames, i.to_bytes(8, "big")] for i in (2, 3)]
        assert end == [b"", *([b""] if topic_frames else []), END, b""]
        assert seqs(client.replay(1_000_000)) == []


def test_replayed_payloads_equal_the_live_ones_byte_for_byte(engine: FakeEngine, client: Client) -> None:
    publish(engine, 5)
    live = [client.sub.recv_multipart()[2] for _ in range(5)]
    assert [frames[-1] for frames in client.replay(0)[:-1]] == live


def test_a_req_socket_gets_the_first_batch_only(engine: FakeEngine) -> None:
    publish(engine, 2)
    with zmq.Context() as context, context.socket(zmq.REQ) as request:
        request.linger = 0
        request.rcvtimeo = PATIENCE_MS
        request.connect(str(engine.replay_endpoint))
        request.send(bytes(8))
        assert request.recv_multipart()[:2] == [b"kv@pod", bytes(8)]


@pytest.mark.parametrize("frames", [[b"x"], [b"", b"", bytes(8)], [b"x", bytes(8)], [b"", b"7"]])
def test_a_malformed_replay_request_gets_no_answer(engine: FakeEngine, client: Client, frames: list[bytes]) -> None:
    publish(engine, 2)
    client.ask(0, frames)
    client.ask(1)
    assert int.from_bytes(client.dealer.recv_multipart()[-2], "big") == 1
    assert engine.publisher.malformed_requests == 1
    assert engine.replay_requests == [1]


def test_the_buffer_forgets_the_oldest_batches() -> None:
    with FakeEngine(buffer_steps=3) as engine, Client(engine.endpoint, engine.replay_endpoint) as client:
        publish(engine, 5)
        assert seqs(client.replay(0)) == [2, 3, 4]


def test_dropped_messages_can_be_replayed(engine: FakeEngine, client: Client) -> None:
    engine.faults = Faults(drop_seqs=frozenset({1, 3}))
    publish(engine, 5)
    assert client.live(3) == [0, 2, 4]
    assert seqs(client.replay(0)) == [0, 1, 2, 3, 4]


def test_forgotten_messages_are_gone_for_good(engine: FakeEngine, client: Client) -> None:
    engine.faults = Faults(drop_and_forget_seqs=frozenset({1}))
    publish(engine, 3)
    assert client.live(2) == [0, 2]
    assert seqs(client.replay(0)) == [0, 2]


def test_duplicated_messages_come_twice_live_and_once_in_replay(engine: FakeEngine, client: Client) -> None:
    engine.faults = Faults(duplicate_seqs=frozenset({1}))
    publish(engine, 3)
    assert client.live(4) == [0, 1, 1, 2]
    assert seqs(client.replay(0)) == [0, 1, 2]


def test_silent_replay_never_answers(engine: FakeEngine, client: Client) -> None:
    publish(engine, 2)
    engine.faults = Faults(replay_silent=True)
    client.ask(0)
    assert client.silent(client.dealer)
    engine.faults = Faults()
    assert seqs(client.replay(0)) == [0, 1]
    assert engine.replay_requests == [0, 0]


def test_replay_without_end_marker(engine: FakeEngine, client: Client) -> None:
    publish(engine, 2)
    engine.faults = Faults(replay_no_end=True)
    client.ask(0)
    assert seqs([client.dealer.recv_multipart() for _ in range(2)]) == [0, 1]
    assert client.silent(client.dealer)


def test_replay_that_breaks_off(engine: FakeEngine, client: Client) -> None:
    publish(engine, 4)
    engine.faults = Faults(replay_stop_after=2)
    client.ask(1)
    assert seqs([client.dealer.recv_multipart() for _ in range(2)]) == [1, 2]
    assert client.silent(client.dealer)


def test_replay_with_inner_gaps(engine: FakeEngine, client: Client) -> None:
    publish(engine, 4)
    engine.faults = Faults(replay_skip_seqs=frozenset({1, 2}))
    assert seqs(client.replay(0)) == [0, 3]


def test_replay_that_answers_garbage(engine: FakeEngine, client: Client) -> None:
    publish(engine, 2)
    engine.faults = Faults(replay_garbage=True)
    client.ask(1)
    short, no_seq, no_msgpack = (client.dealer.recv_multipart() for _ in range(3))
    assert len(short) == 2
    assert len(no_seq[-2]) != 8
    with pytest.raises(msgpack.FormatError):
        msgpack.unpackb(no_msgpack[-1])
    assert client.silent(client.dealer)


def test_a_late_replay_holds_up_live_messages(engine: FakeEngine, client: Client) -> None:
    publish(engine, 1)
    assert client.live(1) == [0]
    engine.faults = Faults(replay_delay_s=0.3)
    client.ask(0)
    while not engine.replay_requests:
        time.sleep(0.001)
    publish(engine, 1)
    answer = [client.dealer.recv_multipart() for _ in range(2)]
    assert (seqs(answer), answer[-1][-2]) == ([0], END)  # published meanwhile, yet not in the answer
    assert client.live(1) == [1]


def test_raw_payloads_take_the_next_number_and_are_replayed(engine: FakeEngine, client: Client) -> None:
    publish(engine, 1)
    assert engine.publish_raw(b"\xc1 no msgpack") == 1
    publish(engine, 1)
    assert client.live(3) == [0, 1, 2]
    assert client.replay(1)[0][-1] == b"\xc1 no msgpack"


def test_the_first_number_can_be_another() -> None:
    for engine in (FakeEngine(faults=Faults(first_seq=7)), FakeEngine(dialect=LlmdFs())):
        first = 7 if engine.faults.first_seq else 1
        with engine, Client(engine.endpoint, engine.replay_endpoint) as client:
            assert engine.last_seq is None
            publish(engine, 2)
            assert seqs(client.replay(0)) == [first, first + 1]


def test_restart_cuts_subscribers_off_and_begins_again_on_the_same_ports(engine: FakeEngine, client: Client) -> None:
    publish(engine, 3)
    assert client.live(3) == [0, 1, 2]
    endpoints = engine.endpoint, engine.replay_endpoint
    monitor = client.sub.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    engine.restart()
    assert monitor.poll(PATIENCE_MS)
    client.sub.disable_monitor()
    monitor.close()
    assert (engine.endpoint, engine.replay_endpoint) == endpoints
    assert (engine.held(), engine.last_seq) == ({}, None)
    assert seqs(client.replay(0)) == []
    serve_until_subscribed(engine, client.sub)
    publish(engine, 1)
    assert client.live(1) == [0]


def serve_until_subscribed(engine: FakeEngine, sub: zmq.Socket[bytes]) -> None:
    """Wait until the subscription is in place; a SUB sends it to a new peer only while it is being read."""
    waiter = threading.Thread(target=engine.wait_for_subscribers)
    waiter.start()
    while waiter.is_alive():
        sub.poll(10)


def test_another_life_can_have_other_hashes(engine: FakeEngine) -> None:
    before = engine.block_hashes(range(8))
    engine.restart()
    assert engine.block_hashes(range(8)) == before
    engine.restart(hash_seed="other")
    assert not set(engine.block_hashes(range(8))) & set(before)


def test_reset_is_silent_until_the_next_request(engine: FakeEngine, client: Client) -> None:
    publish(engine, 1)
    assert client.live(1) == [0]
    assert engine.reset()
    assert engine.held() == {}
    assert client.silent(client.sub)
    engine.run_request(range(8))
    assert [event["type"] for event in msgpack.unpackb(client.sub.recv_multipart()[2])[1]] == [
        "AllBlocksCleared",
        "BlockStored",
    ]


def test_twins_running_together_leave_two_copies(engine: FakeEngine) -> None:
    first, second = engine.run_together([range(8), range(8)])
    assert first.output_tokens == second.output_tokens
    assert sorted(engine.held().values()) == [1, 2]


def test_requests_may_come_from_threads_and_coroutines(engine: FakeEngine, client: Client) -> None:
    def work(base: int) -> None:
        for i in range(20):
            engine.run_request(range(base + i * 100, base + i * 100 + 4))

    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(work, base * 10_000) for base in range(1, 4)))
        engine.run_request(range(4))

    asyncio.run(main())
    assert client.live(61) == list(range(61))


def test_a_publisher_may_dial_a_subscriber_that_binds() -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.subscribe(b"")
        sub.rcvtimeo = PATIENCE_MS
        port = sub.bind_to_random_port("tcp://127.0.0.1")
        with FakeEngine(endpoint=f"tcp://127.0.0.1:{port}", connect=True) as engine:
            serve_until_subscribed(engine, sub)
            publish(engine, 1)
            assert sub.recv_multipart()[1] == bytes(8)


def test_a_taken_port_is_an_error_at_once(engine: FakeEngine) -> None:
    with pytest.raises(zmq.ZMQError, match="Address already in use"):
        FakeEngine(endpoint=engine.endpoint)


def test_stop_may_be_called_twice_and_ends_publishing(engine: FakeEngine) -> None:
    engine.stop()
    engine.stop()
    with pytest.raises(RuntimeError, match="the publisher is closed"):
        publish(engine, 1)


# -- fleets -------------------------------------------------------------------------------------------


def test_a_fleet_serves_traffic_on_every_engine_and_stops() -> None:
    fleet = SimulatedFleet(3, requests_per_s=None, seed=1)
    with fleet:
        specs = fleet.specs()
        while any(engine.last_seq is None for engine in fleet.engines):
            time.sleep(0.001)
    fleet.stop()
    assert len({spec["endpoint"] for spec in specs} | {spec["replay_endpoint"] for spec in specs}) == 6
    assert set(specs[0]) == {"instance", "model", "block_size", "endpoint", "replay_endpoint", "rank", "type"}
    assert fleet.counters.requests >= 3
    assert fleet.counters.prompt_tokens > fleet.counters.cached_tokens
    assert all(engine.held() for engine in fleet.engines)


def test_equal_seeds_make_equal_fleets() -> None:
    held = []
    for _ in range(2):
        fleet = SimulatedFleet(2, seed=5)
        for _ in range(30):
            fleet.send(fleet.traffic.next_request())
        held.append([engine.held() for engine in fleet.engines])
        fleet.stop()
    assert held[0] == held[1]


def test_what_goes_wrong_in_the_traffic_thread_is_raised_by_stop() -> None:
    def router(_request: TrafficRequest, _engines: int) -> int:
        raise LookupError("no engine today")

    fleet = SimulatedFleet(1, requests_per_s=None, router=router)
    fleet.start()
    while fleet.running:
        time.sleep(0.001)
    with pytest.raises(LookupError, match="no engine today"):
        fleet.stop()


@pytest.mark.parametrize(("engines", "rate"), [(0, 1.0), (1, 0.0)])
def test_senseless_fleets_are_refused(engines: int, rate: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        SimulatedFleet(engines, requests_per_s=rate)


# -- recordings ---------------------------------------------------------------------------------------


def recorded(recording: str, source: str | None = None) -> list[list[bytes]]:
    rows = [json.loads(line) for line in (RECORDINGS / recording / "frames.jsonl").read_text().splitlines()]
    return [[bytes.fromhex(frame) for frame in row["frames"]] for row in rows if source in (None, row.get("source"))]


def test_a_recording_is_read_as_it_was_written() -> None:
    frames = read_recording(RECORDINGS / "two-pods-0.32")
    assert {frame.source for frame in frames} == {"pod1", "pod2"}
    assert [[f.topic, f.seq.to_bytes(8, "big"), f.payload] for f in frames] == recorded("two-pods-0.32")


def test_a_played_recording_arrives_byte_for_byte_live_and_replayed() -> None:
    with (
        Player(RECORDINGS / "pool-0.33.0", replay_endpoint="tcp://127.0.0.1:0", rate=math.inf) as player,
        Client(player.publishers["engine"].endpoint, player.publishers["engine"].replay_endpoint) as client,
    ):
        player.publishers["engine"].wait_for_subscribers()
        expected = recorded("pool-0.33.0")
        assert player.run() == len(expected)
        assert [client.sub.recv_multipart() for _ in expected] == expected
        assert [frames[1:] for frames in client.replay(0)[:-1]] == expected


def test_a_recorded_restart_is_a_restart() -> None:
    """After seq 13 of the killed pod come the messages of a new life, and the replay knows only those."""
    with Player(RECORDINGS / "two-pods-0.32", replay_endpoint="tcp://127.0.0.1:0", rate=math.inf) as player:
        assert player.run() == len(recorded("two-pods-0.32"))
        lives = {}
        for source, publisher in player.publishers.items():
            with Client(publisher.endpoint, publisher.replay_endpoint) as client:
                lives[source] = seqs(client.replay(0))
        restarted = [source for source in lives if len(recorded("two-pods-0.32", source)) > len(lives[source])]
        assert len(restarted) == 1
        assert all(life == list(range(len(life))) for life in lives.values())


def test_a_loop_is_a_new_life_every_time() -> None:
    with Player(RECORDINGS / "pool-0.9.2", rate=math.inf) as player:
        count = len(recorded("pool-0.9.2"))
        first, second, third = batched(player._schedule(loop=True), count, rounds=3)
    assert [frame.payload for frame, _ in first] == [frames[2] for frames in recorded("pool-0.9.2")]
    assert [frame.seq for frame, _ in third] == [frame.seq for frame, _ in first]
    for one, two, three in zip(first, second, third, strict=True):
        payloads = [frame.payload for frame, _ in (one, two, three)]
        assert len(set(payloads)) == 3
        assert len({payload[10:] for payload in payloads}) == 1


def batched(items: Iterator[Any], size: int, rounds: int) -> list[list[Any]]:
    return [list(islice(items, size)) for _ in range(rounds)]


def test_a_new_stamp_changes_nothing_but_the_stamp() -> None:
    frame = read_recording(RECORDINGS / "pool-0.33.0")[0]
    before, after = (msgpack.unpackb(each.payload) for each in (frame, restamp(frame, 5.0)))
    assert after == [before[0] + 5.0, *before[1:]]


def test_play_can_hold_the_replay_socket_until_told_to_stop() -> None:
    stop = threading.Event()
    stop.set()
    assert play(RECORDINGS / "pool-0.9.2", "tcp://127.0.0.1:0", rate=math.inf, hold=True, stop=stop) == 0
    assert play(RECORDINGS / "pool-0.9.2", "tcp://127.0.0.1:0", rate=math.inf) == len(recorded("pool-0.9.2"))


def test_bad_recordings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source 'pod3', expected one of"):
        Player(RECORDINGS / "two-pods-0.32", source="pod3")
    (tmp_path / "frames.jsonl").write_text('{"t": 0, "frames": ["", "00", ""]}\n')
    with pytest.raises(ValueError, match=r"frames\.jsonl, line 1: expected t and three frames"):
        read_recording(tmp_path)
    (tmp_path / "frames.jsonl").write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_recording(tmp_path)
