"""docs/metrics.md and what a running service exposes are the same: names, types, labels, words of labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client.metrics_core import Metric

from api_server import serving
from kvindexer.api.fleet import FindingFigures, StoreFigures, StoreProblem
from kvindexer.events.finding import FindingProblem
from kvindexer.testing import FakeEngine
from servers import Server
from watched import Watched, eventually

PAGE: Final = Path(__file__).parent.parent / "docs" / "metrics.md"
MODEL: Final = "a-model-of-a-caller"
INSTANCE: Final = "a-pod-of-a-caller"
ALWAYS_FEW: Final = 40
"""More values of one label than this are no fixed words."""


class Documented(NamedTuple):
    """A row of the table."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def documented() -> list[Documented]:
    rows = re.findall(r"^\| `(kvindexer_\w+)` \| (\w+) \|([^|]*)\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return [Documented(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows]


def row_of(family: Metric) -> Documented:
    """What the table should say of a metric of a running service."""
    labels = tuple(name for name in (family.samples[0].labels if family.samples else ()) if name != "le")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return Documented(name, family.type, labels, family.documentation)


def test_the_page_lists_every_metric_of_the_code_as_it_is_and_in_its_order() -> None:
    with serving() as api:
        api.add("pod-a")
        api.metrics.skipped({"x": 1})
        api.metrics.withdrawn("x", 1)
        api.metrics.answered("/query", 200, 0.1)
        api.metrics.text("tokenized")
        api.fleet.figures = StoreFigures(shards={"in_step": 1})
        api.fleet.troubles = [StoreProblem("evicts", "", "")]
        found = FindingProblem("duplicate", "", "", "")
        api.fleet.found = FindingFigures(errors={"cut": 1}, contact_s=1.0, problems=[found])
        in_code = [row_of(family) for family in api.metrics.collect()]
    assert documented() == in_code


def test_a_running_service_exposes_exactly_what_the_page_lists(own_redis_server: Server, tmp_path: Path) -> None:
    """Scraped over HTTP from a process with an engine, a store and traffic; names of callers are nowhere."""
    with Watched(tmp_path, store=own_redis_server.url) as service, FakeEngine() as engine:
        _traffic(service, engine)
        families = service.scrape()
        text = service.client.get("/metrics").text
    rows = {row.name: row for row in documented()}
    exposed = {row.name: row for row in map(row_of, families)}
    assert set(exposed) == set(rows)
    for name, row in exposed.items():
        assert row.kind == rows[name].kind, name
        assert sorted(row.labels) in (sorted(rows[name].labels), []), name
    assert {name for name, row in exposed.items() if not row.labels and rows[name].labels} <= {
        "kvindexer_discovery_errors_total",
        "kvindexer_discovery_problems",
        "kvindexer_entries_withdrawn_total",
        "kvindexer_skipped_total",
        "kvindexer_store_problems",
    }, "of all others the traffic has brought samples"
    assert MODEL not in text
    assert INSTANCE not in text
    for family in families:
        for label in rows[row_of(family).name].labels:
            assert len({sample.labels[label] for sample in family.samples}) <= ALWAYS_FEW, family.name


def _traffic(service: Watched, engine: FakeEngine) -> None:
    service.follow(engine, INSTANCE, MODEL)
    prompt = list(range(engine.shape.block_size * 4))
    engine.run_request(prompt)
    asked = {"model": MODEL, "tokens": prompt}
    eventually("the blocks are found", lambda: service.post("/v1/match", asked)["matches"] != [])
    service.post("/query", {"model": MODEL, "token_ids": prompt})
    service.post("/v1/routed", {**asked, "instance": INSTANCE})
    service.post("/v1/feedback", {"instance": INSTANCE, "predicted_tokens": 9, "cached_tokens": 9})
    assert service.client.post("/v1/match", json={"model": MODEL, "prompt": "a text"}).status_code == 422
