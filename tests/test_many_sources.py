"""P5, P7: a thousand sources in one process, and one that floods."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from children import Child
from kvindexer.events.descriptors import DESCRIPTORS_A_SOURCE
from kvindexer.events.fleet import LiveFleet
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec
from live import agrees, connected, spec_of, until, with_fleet
from proxied import SMALL, flags, report, traffic
from publisher_farm import BLOCK_SIZE, digest, use_all_descriptors

pytestmark = pytest.mark.proof

SOURCES = 1_000
SPARE_DESCRIPTORS = 500
IDLE_S = 10.0
DEFAULT_TIMES = {
    "probe_interval_s": 5.0,
    "replay_timeout_s": 5.0,
    "replay_retry_min_s": 0.5,
    "replay_retry_max_s": 30,
}


class Farm(Child):
    """The publishers, in a process of their own: what they cost is not ours."""

    def __init__(self, count: int) -> None:
        super().__init__("publisher_farm", str(count))
        self.published = 0
        self.specs = [
            SourceSpec(instance=f"pod-{i}", model="m", block_size=BLOCK_SIZE, endpoint=endpoint, replay=replay)
            for i, (endpoint, replay) in enumerate(self.said)
        ]

    def publish(self, blocks: int) -> None:
        """Every publisher stores so many more blocks."""
        self.ask(f"publish {blocks}")
        self.published += blocks

    def held(self, number: int) -> dict[int, int]:
        """What the index must say of one of them: (hash as vLLM's integers have it) -> copies."""
        return {int.from_bytes(digest(number, seq)[-8:], "big"): 1 for seq in range(self.published)}


@contextmanager
def all_descriptors() -> Iterator[int]:
    """As many open files as the system allows, for a while."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield use_all_descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def threads() -> int:
    """All threads of the process, libzmq's too."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - counts, takes no paths


def descriptors() -> int:
    """All open files of the process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, takes no paths


async def all_right(fleet: LiveFleet, farm: Farm) -> None:
    """Wait until every source is live, sound and complete, and holds just its own blocks."""
    for number, spec in enumerate(farm.specs):
        expected = farm.held(number)
        await until(
            f"source {number} is right: {fleet.status(spec.instance)}",
            lambda spec=spec, expected=expected: (  # type: ignore[misc]
                {name[-1]: n for name, n in fleet.index.copies(spec.endpoint).items()} == expected
                and fleet.status(spec.instance)[:3] == ("live", True, True)
            ),
        )


def test_a_thousand_sources_in_one_process() -> None:
    """All become live and right, in a handful of threads; what they cost is printed."""
    with (
        all_descriptors() as allowed,
        Farm(min(SOURCES, (allowed - SPARE_DESCRIPTORS) // DESCRIPTORS_A_SOURCE)) as farm,
    ):
        farm.publish(3)
        threads_before, descriptors_before = threads(), descriptors()

        async def scenario(fleet: LiveFleet) -> None:
            at = time.monotonic(), time.process_time()
            for spec in farm.specs:
                assert fleet.register(spec)
            registered = time.monotonic()
            await all_right(fleet, farm)
            synced = time.monotonic(), time.process_time()
            more_threads, more_descriptors = threads() - threads_before, descriptors() - descriptors_before
            assert more_threads <= 6
            assert more_descriptors <= DESCRIPTORS_A_SOURCE * len(farm.specs)
            await asyncio.to_thread(farm.publish, 2)
            await all_right(fleet, farm)
            idle_from = time.process_time()
            await asyncio.sleep(IDLE_S)
            idle = (time.process_time() - idle_from) * 60 / IDLE_S
            await all_right(fleet, farm)
            assert all(report.gaps == 0 and report.epoch == 1 for report in fleet.reports())
            print(  # noqa: T201 - a figure, not a verdict
                f"\n{len(farm.specs)} sources: registered in {registered - at[0]:.1f} s, all live in"
                f" {synced[0] - at[0]:.1f} s ({synced[1] - at[1]:.1f} s of CPU), {more_threads} threads,"
                f" {more_descriptors} descriptors; an idle minute costs {idle:.2f} s of CPU"
            )
            for spec in farm.specs:
                assert fleet.unregister(spec.instance)
            await until("descriptors are given back", lambda: descriptors() < descriptors_before + 50)

        with_fleet(scenario, **DEFAULT_TIMES)


def test_a_flood_does_not_starve_the_others() -> None:
    """P5: while one source sends as fast as it can, another one's events keep coming in; both end up exact."""
    stop = threading.Event()
    with FakeEngine(pool=SMALL) as loud, FakeEngine(pool=SMALL, hash_seed=1) as quiet:

        def flood() -> None:
            seed = 0
            while not stop.is_set():
                traffic(loud, 5, seed)
                for _ in range(200):
                    loud.publish_events([])
                seed += 1

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(loud, "pod-loud"))
            fleet.register(spec_of(quiet, "pod-quiet"))
            await connected(loud)
            await connected(quiet)
            await flags(fleet, quiet, sound=True, complete=True)
            flooding = asyncio.create_task(asyncio.to_thread(flood), name="flood")
            try:
                for seed in range(10):
                    before = report(fleet, loud).batches
                    await until("the flood goes on", lambda before=before: report(fleet, loud).batches > before + 200)  # type: ignore[misc]
                    await asyncio.to_thread(traffic, quiet, 2, seed)
                    await agrees(fleet, quiet)
                    assert fleet.status("pod-quiet")[:3] == ("live", True, True)
            finally:
                stop.set()
                await flooding
            await agrees(fleet, loud)
            await flags(fleet, loud, sound=True, complete=True)
            assert report(fleet, quiet).gaps == 0

        with_fleet(scenario)
