"""Random histories of pods, pools and faults: when the API server is well again, the sources are exactly the pods.

What the sources should be is worked out anew from what the API server holds, not from what was done to it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovering import MODEL, expected, finding, followed, reasons
from kube_api import KubeApi, pod, restarted
from kvindexer.events.discovery import finder, watching
from kvindexer.events.fleet import LiveFleet
from live import until

pytestmark = pytest.mark.proof

SEEDS = range(30)
STEPS = 120
NAMES = [f"p{n}" for n in range(8)]
ADDRESSES = [f"127.77.7.{n}" for n in range(1, 7)]
"""Fewer than names: addresses change hands."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(finder, "EVERY_S", 0.05)


class History:
    """What happens to a cluster, one thing after the other."""

    def __init__(self, api: KubeApi, seed: int) -> None:
        self.api = api
        self.dice = random.Random(seed)
        self.is_down = False

    def step(self) -> None:
        """One thing."""
        self.dice.choice([self._change, self._change, self._change, self._fault])()

    def _change(self) -> None:
        name = self.dice.choice(NAMES)
        known = next((one for one in self.api.objects("pods") if one["metadata"]["name"] == name), None)
        if known is None:
            self._create(name)
            return
        match self.dice.randrange(6):
            case 0 | 1:
                self.api.delete("pods", name)
            case 2:
                self.api.delete("pods", name)
                self._create(name)
            case 3:
                self.api.put("pods", restarted(known, running=self.dice.random() < 0.7))
            case 4:
                deleting = {**known["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
                self.api.put("pods", {**known, "metadata": deleting})
            case 5:
                labels = {} if known["metadata"]["labels"] else {"llm-d.ai/inference-serving": "true"}
                self.api.put("pods", {**known, "metadata": {**known["metadata"], "labels": labels}})

    def _create(self, name: str) -> None:
        taken = {one["status"]["podIP"] for one in self.api.objects("pods")}
        free = [address for address in ADDRESSES if address not in taken]
        address = self.dice.choice([*free, None])
        self.api.put(
            "pods", pod(name, address, annotations=MODEL, phase=self.dice.choice(["Running"] * 4 + ["Pending"]))
        )

    def _fault(self) -> None:
        api = self.api
        network = [api.cut, api.end_watches, api.expire_watches, api.compact, api.bookmark, self._up_or_down]
        self.dice.choice([*network, self._refuse, api.statuses.clear, self._babble, self._other_410])()

    def _up_or_down(self) -> None:
        (self.api.up if self.is_down else self.api.down)()
        self.is_down = not self.is_down

    def _refuse(self) -> None:
        self.api.statuses[self.dice.choice(["", "list", "watch"])] = self.dice.choice([401, 403, 410, 429, 500, 503])

    def _babble(self) -> None:
        self.api.garbage = self.dice.choice([None, b"", b'{"items": [{"metadata": 1}], "metadata": {}}'])

    def _other_410(self) -> None:
        self.api.gone_as_event = not self.api.gone_as_event

    def recover(self) -> None:
        """All is well again."""
        self.api.statuses.clear()
        self.api.garbage = None
        if self.is_down:
            self.api.up()
            self.is_down = False


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as running:
        yield running


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_the_sources_are_the_pods_in_the_end(seed: int, api: KubeApi, tmp_path: Path) -> None:
    history = History(api, seed)

    async def scenario(fleet: LiveFleet) -> None:
        for _ in range(4):
            for _ in range(STEPS // 4):
                history.step()
                await asyncio.sleep(history.dice.choice([0, 0, 0.002, 0.02]))
            history.recover()
            await until("the sources are the pods", lambda: followed(fleet) == expected(api))
            await until("nothing is wrong", lambda: set(reasons(fleet)) <= {"no_pods"})
            assert fleet.finding().followed == len(expected(api))

    finding(scenario, api, tmp_path, discovery_retry_max_s=0.1, discovery_timeout_s=1.0)
