"""A service in a process of its own, as an operator meets it: HTTP, metrics, the log; and engines it follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Final, Self

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from api_server import NO_CERTIFICATES
from kvindexer.testing import FakeEngine
from served import Served

PATIENCE_S: Final = 30.0
QUICK: Final = {
    "probe_interval_s": "0.3",
    "replay_timeout_s": "0.5",
    "replay_retry_min_s": "0.05",
    "replay_retry_max_s": "0.5",
    "sync_deadline_s": "5",
    "drain_s": "0",
    "shutdown_grace_s": "1",
}


class Watched:
    """One service; it ends with its `with`."""

    def __init__(self, folder: Path, *arguments: str, name: str = "a", **settings: str) -> None:
        values = {**QUICK, **settings}
        flags = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        self.process = Served(folder, name, *arguments, *flags)
        self.client: httpx.Client

    def __enter__(self) -> Self:
        try:
            self.process.start()
        except BaseException:
            self.process.close()
            raise
        self.client = httpx.Client(base_url=self.process.url, timeout=30, trust_env=False, verify=NO_CERTIFICATES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.process.close()

    def follow(self, engine: FakeEngine, instance: str = "pod-a", model: str = "m", **fields: Any) -> None:
        """Register an engine, and wait until the service has subscribed."""
        registration = {
            "instance_id": instance,
            "model": model,
            "endpoint": engine.endpoint,
            "replay_endpoint": engine.replay_endpoint,
            "block_size": engine.shape.block_size,
            **fields,
        }
        given = {name: value for name, value in registration.items() if value is not None}
        self.post("/register", given)
        engine.wait_for_subscribers()

    def post(self, path: str, body: Any, **options: Any) -> Any:
        """The answer to a body; it must be a good one."""
        answer = self.client.post(path, json=body, **options)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def scrape(self) -> list[Metric]:
        """What Prometheus would see now, without the metrics of the process itself."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return [family for family in families if family.name.startswith("kvindexer_")]

    def value(self, name: str, **labels: str) -> float:
        """A sample by its full name; 0 if it is not there (yet)."""
        samples = [sample for family in self.scrape() for sample in family.samples]
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )


def eventually(what: str, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait for something that must come; no test fails for being slow."""
    end = monotonic() + patience_s
    while monotonic() < end:
        if condition():
            return
        sleep(0.02)
    raise AssertionError(f"did not happen in {patience_s:g} s: {what}")
