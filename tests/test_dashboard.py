"""The dashboard: made of its script, and every query of it asks for what a running service exposes."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest

from promql import references
from test_alerts import OF_TARGETS
from test_metrics_reference import documented
from watched import Watched

ROOT: Final = Path(__file__).parent.parent
FILE: Final = ROOT / "deploy/helm/kvindexer/files/dashboard.json"
DASHBOARD: Final[dict[str, Any]] = json.loads(FILE.read_text())
PANELS: Final[list[dict[str, Any]]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS: Final = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
UNITS: Final = {"none", "s", "ops", "reqps", "bytes", "percentunit"}


def queries() -> Iterator[tuple[str, str, str]]:
    """Panel, expression as Prometheus would get it, legend."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"]


def test_the_file_is_what_the_script_makes() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "dashboard"))["rendered"]()
    assert FILE.read_text() == made, "run scripts/dashboard"


def test_there_is_a_row_for_each_part_of_the_service() -> None:
    assert ROWS[0] == "Fleet"
    assert {"Streams", "Tiers", "Hit ratio", "Latency", "Redis", "Accuracy", "Discovery"} <= set(ROWS)


def test_the_datasource_is_a_choice_of_whoever_looks() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    used = {name for _, expression, _ in queries() for name in re.findall(r"\$(\w+)", expression)}
    assert used == {"job", "instance"}
    assert all('job=~"$job", instance=~"$instance"' in expression for _, expression, _ in queries())


def test_panels_have_their_own_place_and_number() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations(panels, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
    above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    return not (beside or above)


@pytest.mark.parametrize(("title", "expression", "legend"), [*queries()])
def test_a_query_looks_at_labels_that_its_metrics_have(title: str, expression: str, legend: str) -> None:
    rows = {row.name: row for row in documented()}
    found = references(expression)
    assert found, title
    known: set[str] = set()
    for metric, labels in found:
        row = rows.get(metric) or rows.get(metric.removesuffix("_bucket"))
        le = {"le"} if metric.endswith("_bucket") else set()
        of_metric = {*(row.labels if row is not None else ()), *le, *OF_TARGETS}
        assert row is not None or metric.startswith("process_"), metric
        assert labels <= of_metric, metric
        outer = re.search(r" by \(([\w, ]+)\)", expression)  # the first is the outermost
        grouped = set(outer[1].split(", ")) if outer else set()
        known |= grouped if grouped or re.match(r"(sum|min|max|count) \(", expression) else of_metric
    assert set(re.findall(r"{{(\w+)}}", legend)) <= known


def test_every_metric_of_the_queries_is_exposed_and_every_metric_is_shown(tmp_path: Path) -> None:
    """By a service that has just started, too: a panel without data means that nothing has happened yet."""
    with Watched(tmp_path) as service:
        text = service.client.get("/metrics").text
    exposed = {
        name + ("_bucket" if kind == "histogram" else "")
        for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    }
    asked = {reference.metric for _, expression, _ in queries() for reference in references(expression)}
    assert asked <= exposed
    ours = {name for name in exposed if name.startswith("kvindexer_")}
    assert ours - asked == set()
