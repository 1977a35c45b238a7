"""Requests per second over several connections: `wrk` when the machine has it, threads of our own otherwise."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.client import Connection, request_of

if TYPE_CHECKING:
    from collections.abc import Sequence

CONNECTIONS: Final = 8


class Load(NamedTuple):
    """What was asked and answered."""

    requests: int
    seconds: float
    wrong: int


def client_name() -> str:
    """Name the client, for the report."""
    return "wrk" if shutil.which("wrk") else "own client"


def drive(port: int, route: str, bodies: Sequence[bytes], lengths: Sequence[int], seconds: int) -> Load:
    """Keep all connections busy; an answer of another length than that of the checked one is wrong."""
    if wrk := shutil.which("wrk"):
        return _wrk(wrk, f"http://127.0.0.1:{port}{route}", bodies, lengths, seconds)
    return _threads(port, [request_of(route, body) for body in bodies], lengths, seconds)


def _wrk(wrk: str, url: str, bodies: Sequence[bytes], lengths: Sequence[int], seconds: int) -> Load:
    script = Path(__file__).with_name("throughput.lua")
    with tempfile.TemporaryDirectory() as folder:
        bodies_file, lengths_file = Path(folder, "bodies"), Path(folder, "lengths")
        bodies_file.write_bytes(b"\n".join(bodies))
        lengths_file.write_text("\n".join(map(str, lengths)))
        n = str(CONNECTIONS)
        command = [wrk, "-t", n, "-c", n, "-d", str(seconds), "-s", str(script), url, "--"]
        done = subprocess.run(
            [*command, str(bodies_file), str(lengths_file)], capture_output=True, text=True, check=True
        )
    requests, micros, wrong = (int(x) for x in done.stdout.rpartition("RESULT ")[2].split()[:3])
    return Load(requests, micros / 1e6, wrong)


def _threads(port: int, requests: Sequence[bytes], lengths: Sequence[int], seconds: int) -> Load:
    counts = [0] * CONNECTIONS
    wrong = [0] * CONNECTIONS
    end = time.monotonic() + seconds

    def work(worker: int) -> None:
        at = worker
        with Connection(port) as connection:
            while time.monotonic() < end:
                at = (at + 1) % len(requests)
                wrong[worker] += len(connection.ask(requests[at])) != lengths[at]
                counts[worker] += 1

    start = time.monotonic()
    workers = [threading.Thread(target=work, args=(i,), name=f"client-{i}") for i in range(CONNECTIONS)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    return Load(sum(counts), time.monotonic() - start, sum(wrong))
