"""The fault proxy between a plain client and a plain echo server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvindexer.testing import FaultProxy, LinkFaults

PATIENCE_S = 30.0
HOST = "127.0.0.1"


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says everything back, then closes."""

    async def serve() -> None:
        server = await asyncio.start_server(answer, HOST, 0)
        port.append(server.sockets[0].getsockname()[1])
        started.set()
        async with server:
            await stopped.wait()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    port: list[int] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(PATIENCE_S)
    yield port[0]
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[FaultProxy]:
    with FaultProxy(HOST, echo) as between:
        yield between


def dial(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=PATIENCE_S)


def receive(client: socket.socket, size: int) -> bytes:
    """As many bytes, or fewer if the stream ends."""
    received = bytearray()
    while len(received) < size and (data := client.recv(size - len(received))):
        received += data
    return bytes(received)


def is_reset(client: socket.socket) -> bool:
    """The connection ends with a reset, not with an orderly end."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return False


def until(predicate: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    for _ in range(round(PATIENCE_S / 0.01)):
        if predicate():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen")


def test_without_faults_everything_passes_and_ends_in_order(proxy: FaultProxy) -> None:
    """More than all buffers together, so that the reader's pace is the writer's; then an end from one side only."""
    sent = os.urandom(20 * 2**20)
    with dial(proxy) as client:

        def write() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        assert receive(client, len(sent) + 1) == sent
        writer.join()
    until(lambda: not proxy.open_connections)
    assert proxy.accepted == 1


def test_latency_is_added_in_each_direction(proxy: FaultProxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"quick")
        assert receive(client, 5) == b"quick"
        proxy.faults = LinkFaults(latency_s=0.05)
        sent_at = time.monotonic()
        client.sendall(b"late")
        assert receive(client, 4) == b"late"
        assert time.monotonic() - sent_at >= 0.1


def test_slices_lose_nothing(proxy: FaultProxy) -> None:
    proxy.faults = LinkFaults(slice_bytes=3)
    sent = os.urandom(10_000)
    with dial(proxy) as client:
        client.sendall(sent)
        assert receive(client, len(sent)) == sent


def test_stalled_bytes_come_late_and_whole(proxy: FaultProxy) -> None:
    with dial(proxy) as client:
        proxy.faults = LinkFaults(stall=True)
        client.sendall(b"patience")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(PATIENCE_S)
        proxy.faults = LinkFaults()
        assert receive(client, 8) == b"patience"


def test_in_a_blackhole_bytes_vanish_and_a_torn_stream_is_never_carried_on(proxy: FaultProxy) -> None:
    with dial(proxy) as torn, dial(proxy) as untouched:
        for client in (torn, untouched):
            client.sendall(b"x")
            assert receive(client, 1) == b"x"
        proxy.faults = LinkFaults(blackhole=True)
        torn.sendall(b"lost")
        until(lambda: proxy.vanished_bytes == 4)
        assert proxy.open_connections == 2
        proxy.faults = LinkFaults()
        torn.sendall(b"after it")
        assert is_reset(torn)
        untouched.sendall(b"whole")
        assert receive(untouched, 5) == b"whole"


def test_the_end_of_a_stream_vanishes_in_a_blackhole_too(proxy: FaultProxy) -> None:
    client = dial(proxy)
    client.sendall(b"x")
    assert receive(client, 1) == b"x"
    proxy.faults = LinkFaults(blackhole=True)
    client.close()
    time.sleep(0.1)
    assert proxy.open_connections == 1
    proxy.faults = LinkFaults()
    until(lambda: not proxy.open_connections)


def test_reset_strikes_open_and_new_connections(proxy: FaultProxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        proxy.faults = LinkFaults(reset=True)
        assert is_reset(client)
    with contextlib.suppress(ConnectionError), dial(proxy) as client:  # perhaps before connect() is back
        assert is_reset(client)
    proxy.faults = LinkFaults()
    with dial(proxy) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"


@pytest.mark.parametrize("limit", [0, 1, 1_500])
def test_the_byte_limit_closes_behind_exactly_so_many_bytes(proxy: FaultProxy, limit: int) -> None:
    """1,000 bytes there count, so do those that come back."""
    proxy.faults = LinkFaults(byte_limit=limit)
    with dial(proxy) as client:
        client.sendall(bytes(1_000))
        back = bytearray()
        with contextlib.suppress(ConnectionError):
            while data := client.recv(10_000):
                back += data
        assert len(back) == max(0, limit - 1_000)
    until(lambda: not proxy.open_connections)


def test_down_refuses_and_up_again_is_the_same_port(proxy: FaultProxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        proxy.faults = LinkFaults(down=True)
        assert is_reset(client)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
    proxy.faults = LinkFaults()
    with dial(proxy) as client:
        client.sendall(b"y")
        assert receive(client, 1) == b"y"


def test_cut_ends_what_is_open_and_nothing_else(proxy: FaultProxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        proxy.cut()
        assert proxy.open_connections == 0
        assert is_reset(client)
    with dial(proxy) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"


def test_an_upstream_that_is_not_there_looks_like_a_reset() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        with FaultProxy(HOST, unused.getsockname()[1]) as proxy:
            with contextlib.suppress(ConnectionError), dial(proxy) as client:  # perhaps before connect() is back
                assert is_reset(client)
            until(lambda: proxy.accepted == 1 and not proxy.open_connections)


def test_close_leaves_nothing_behind(echo: int) -> None:
    """Threads, descriptors, and no ResourceWarning, whatever the connections are at."""
    threads = threading.active_count()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, takes no paths
    for faults in (LinkFaults(), LinkFaults(stall=True), LinkFaults(blackhole=True), LinkFaults(latency_s=60)):
        with FaultProxy(HOST, echo, faults) as proxy:
            clients = [dial(proxy) for _ in range(5)]
            for client in clients:
                client.sendall(b"x")
            until(lambda proxy=proxy: proxy.open_connections == 5)  # type: ignore[misc]
        for client in clients:
            client.close()
        proxy.close()
        with pytest.raises(RuntimeError, match="closed"):
            proxy.cut()
    gc.collect()
    assert threading.active_count() == threads
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)  # noqa: PTH208 - the server closes its side later


def test_faults_can_be_set_from_a_running_loop(proxy: FaultProxy) -> None:
    async def scenario() -> None:
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        proxy.faults = LinkFaults(slice_bytes=1)
        writer.write(b"sliced")
        assert await reader.readexactly(6) == b"sliced"
        proxy.cut()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    asyncio.run(scenario())
