"""Fixtures that more than one module of the tests uses."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from servers import Cluster, Server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell starts what runs in the background so, and processes that tests send Ctrl-C to would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _session_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def redis_server(_session_server: Server) -> Server:
    """An empty server; for tests that leave it running and as it was configured."""
    _session_server.ask("FLUSHALL")
    return _session_server


@pytest.fixture
def own_redis_server() -> Iterator[Server]:
    """A server that a test may stop, kill, pause and configure."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def _session_cluster() -> Iterator[Cluster]:
    with Cluster(replicas=False) as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(_session_cluster: Cluster) -> Cluster:
    """Three empty primaries; for tests that leave them running, each with its slots."""
    _session_cluster.flush()
    return _session_cluster
