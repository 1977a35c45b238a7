"""What operators and probes ask: health, readiness, sources, metrics, the OpenAPI document.  Traps 27 and 28."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api_server import LIVE, Api, batch, error, serving, stored
from kvindexer.api.counting import LATENCY_BOUNDS_S
from kvindexer.api.fleet import StoreFigures, StoreProblem
from kvindexer.api.metrics import MAX_LABELS, Metrics
from kvindexer.index.seam import Change

PROMPT = list(range(40))


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def samples(api: Api) -> dict[str, float]:
    """Metric with its labels -> value."""
    found = {}
    for family in text_string_to_metric_families(api.client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


NOTHING_IS_LOOKED_FOR = {
    "kind": "none",
    "informed": True,
    "pods": 0,
    "followed": 0,
    "waiting": 0,
    "contact_s": None,
    "problems": [],
}

# GET /health, /ready


def test_health_without_sources_is_ok(api: Api) -> None:
    assert api.client.get("/health").json() == {
        "status": "ok",
        "ready": True,
        "sources": {"syncing": 0, "live": 0, "stale": 0, "gone": 0},
        "unsound": 0,
        "incomplete": 0,
        "problems": [],
        "store": {"kind": "memory", "reachable": True, "replicas": 1, "problems": []},
        "access": [],
        "discovery": NOTHING_IS_LOOKED_FOR,
    }


@pytest.mark.parametrize("change", [{"state": "stale"}, {"state": "gone"}, {"state": "syncing"}, {"sound": False}])
def test_trap_28_health_is_degraded_when_a_source_is_not_live_or_not_sound(api: Api, change: dict[str, Any]) -> None:
    """And it is answered with 200: restarting this process would not help."""
    api.add("good")
    bad = api.add("bad")
    assert api.client.get("/health").json()["status"] == "ok"
    api.fleet.statuses["bad"] = LIVE._replace(**change)
    response = api.client.get("/health")
    health = response.json()
    assert (response.status_code, health["status"]) == (200, "degraded")
    (problem,) = health["problems"]
    assert (problem["source"], problem["instance"]) == (bad, "bad")
    assert health["sources"]["live"] == (2 if "sound" in change else 1)
    api.fleet.statuses["bad"] = LIVE
    assert api.client.get("/health").json()["status"] == "ok"


def test_an_incomplete_source_is_shown_and_degrades_nothing(api: Api) -> None:
    """Every late join is incomplete; what it says is true."""
    api.add("late")
    api.fleet.statuses["late"] = LIVE._replace(complete=False)
    health = api.client.get("/health").json()
    assert (health["status"], health["incomplete"], health["problems"]) == ("ok", 1, [])


def test_health_names_a_bounded_number_of_sources(api: Api) -> None:
    for number in range(30):
        api.add(f"pod-{number}")
        api.fleet.statuses[f"pod-{number}"] = LIVE._replace(state="gone")
    health = api.client.get("/health").json()
    assert (health["sources"]["gone"], len(health["problems"])) == (30, 20)


def test_trap_28_trouble_with_the_store_degrades_health_and_nothing_else(api: Api) -> None:
    api.add("good")
    api.fleet.figures = StoreFigures("redis", reachable=False, replicas=3)
    api.fleet.troubles = [StoreProblem("evicts", "it may drop our keys", "set noeviction")] * 30
    response = api.client.get("/health")
    health = response.json()
    assert (response.status_code, health["status"], health["problems"]) == (200, "degraded", [])
    assert (health["store"]["kind"], health["store"]["reachable"], health["store"]["replicas"]) == ("redis", False, 3)
    assert (
        health["store"]["problems"]
        == [{"reason": "evicts", "message": "it may drop our keys", "hint": "set noeviction"}] * 20
    )
    assert api.client.get("/ready").status_code == 200


def test_trap_28_a_cold_replica_is_not_ready_and_a_new_pod_makes_none_unready(api: Api) -> None:
    api.fleet.ready = False
    response = api.client.get("/ready")
    assert (response.status_code, response.json()) == (503, {"ready": False})
    assert api.client.get("/health").json()["ready"] is False
    api.fleet.ready = True
    api.add("new")
    api.fleet.statuses["new"] = LIVE._replace(state="syncing", complete=False)
    response = api.client.get("/ready")
    assert (response.status_code, response.json()) == (200, {"ready": True})


def test_trap_28_a_dead_sources_rows_say_so(api: Api) -> None:
    api.store(api.add("dead"), PROMPT)
    api.fleet.statuses["dead"] = LIVE._replace(
        state="gone", sound=False, complete=False, lag_ms=3.5, verified_ms=None
    )
    (row,) = api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"]
    assert {name: row[name] for name in ("state", "sound", "complete", "lag_ms", "verified_ms")} == {
        "state": "gone",
        "sound": False,
        "complete": False,
        "lag_ms": 3.5,
        "verified_ms": None,
    }


# GET /v1/sources


def test_sources_show_everything_worth_knowing(api: Api) -> None:
    source = api.add("pod-a", replay="tcp://pod-a:5558", rank=2, tenant="acme", aliases=("10.0.0.1:80", "a"))
    api.store(source, PROMPT)
    api.fleet.counters[source] = {"batches": 5, "gaps": 1, "replays": 2, "poison": 3}
    api.post("/v1/match", {"model": "m", "tenant": "acme", "tokens": PROMPT})
    assert api.client.get("/v1/sources").json() == {
        "sources": [
            {
                "instance": "pod-a",
                "source": "tcp://pod-a:5557",
                "endpoint": "tcp://pod-a:5557",
                "replay": "tcp://pod-a:5558",
                "model": "m",
                "type": "vllm",
                "rank": 2,
                "tenant": "acme",
                "block_size": 4,
                "block_sizes": [4],
                "aliases": ["10.0.0.1:80", "a"],
                "state": "live",
                "why": "",
                "sound": True,
                "complete": True,
                "epoch": 1,
                "seq": None,
                "lag_ms": 0.0,
                "last_event_s": None,
                "batches": 5,
                "gaps": 1,
                "replays": 2,
                "blocks": {"gpu": 10, "cpu": 0, "disk": 0, "remote": 0},
                "orphans": 0,
                "poison": 3,
                "stored": None,
                "feedback": {
                    "exact": 0,
                    "over": 0,
                    "under": 0,
                    "predicted_tokens": 0,
                    "cached_tokens": 0,
                    "doubts": 0,
                },
            }
        ],
        "totals": {"events": 1, "queries": 1, "blocks": 10},
        "discovery": NOTHING_IS_LOOKED_FOR,
    }


def test_trap_27_sources_can_be_narrowed_and_never_show_salts_or_tokens(api: Api) -> None:
    api.store(api.add("a", tenant="acme", additional_salt="pepper"), [987654321] * 4)
    api.add("b", model="other")
    for params, expected in (
        ({"tenant": "acme"}, ["a"]),
        ({"tenant": "default"}, ["b"]),
        ({"model": "other"}, ["b"]),
        ({"instance": "a"}, ["a"]),
        ({"tenant": "x"}, []),
        ({}, ["a", "b"]),
    ):
        listed = api.client.get("/v1/sources", params=params).json()["sources"]
        assert [entry["instance"] for entry in listed] == expected
    for path in ("/v1/sources", "/workers", "/health", "/metrics"):
        text = api.client.get(path).text
        assert "pepper" not in text
        assert "987654321" not in text


def test_trap_27_metrics_have_no_names_of_callers(api: Api) -> None:
    api.store(api.add("pod-a", model="secret-model", tenant="acme"), PROMPT)
    api.client.post("/v1/match", json={"model": "secret-model", "tenant": "acme", "tokens": PROMPT})
    api.client.get("/secret-model")
    text = api.client.get("/metrics").text
    assert not re.search("secret-model|acme|pod-a", text)
    assert 'route="other"' in text


# GET /metrics


def test_metrics_count_ingest_queries_and_requests(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    unknown = {"type": "BlockRemoved", "block_hashes": [5], "medium": "GPU", "group_idx": 0}
    api.metrics.applied(api.index.apply(source, batch(unknown, {**stored(PROMPT[:8], first=9), "medium": "CPU"})))
    api.metrics.withdrawn("new_life", 7)
    api.fleet.counters[source] = {"gaps": 2, "replays": 1, "poison": 4}
    api.fleet.statuses["pod-a"] = LIVE._replace(lag_ms=250.0, complete=False)
    api.post("/v1/match", {"model": "m", "tokens": [*PROMPT, 1]})
    api.post("/query", {"model": "m", "token_ids": [5, 6]})
    api.refused("/query", {"model": "m"})
    found = samples(api)
    expected = {
        "kvindexer_events_applied_total": 3,
        "kvindexer_batches_applied_total": 2,
        "kvindexer_blocks_stored_total": 12,
        "kvindexer_blocks_removed_total": 0,
        "kvindexer_skipped_total{reason=not_held}": 1,
        "kvindexer_entries_withdrawn_total{reason=new_life}": 7,
        "kvindexer_gaps_total": 2,
        "kvindexer_replays_total": 1,
        "kvindexer_sources{state=live}": 1,
        "kvindexer_sources{state=gone}": 0,
        "kvindexer_sources_unsound": 0,
        "kvindexer_sources_incomplete": 1,
        "kvindexer_blocks{state=live,tier=gpu}": 10,
        "kvindexer_blocks{state=live,tier=cpu}": 2,
        "kvindexer_poison": 4,
        "kvindexer_ingest_lag_seconds": 0.25,
        "kvindexer_ready": 1,
        "kvindexer_queries_total": 2,
        "kvindexer_asked_tokens_total": 43,
        "kvindexer_hit_tokens_total": 40,
        "kvindexer_http_requests_total{route=/v1/match,status=200}": 1,
        "kvindexer_http_requests_total{route=/query,status=200}": 1,
        "kvindexer_http_requests_total{route=/query,status=422}": 1,
        "kvindexer_http_request_duration_seconds_count{route=/query}": 2,
        "kvindexer_http_request_duration_seconds_bucket{le=+Inf,route=/query}": 2,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_counters_of_sources_never_fall(api: Api) -> None:
    for name, gaps in (("a", 3), ("b", 4)):
        api.fleet.counters[api.add(name)] = {"gaps": gaps}
    assert samples(api)["kvindexer_gaps_total"] == 7
    api.fleet.unregister("a")
    assert samples(api)["kvindexer_gaps_total"] == 7
    api.add("a")
    api.fleet.counters["tcp://a:5557"] = {"gaps": 1}
    assert samples(api)["kvindexer_gaps_total"] == 8


def test_metrics_show_the_store(api: Api) -> None:
    api.fleet.figures = StoreFigures(
        "redis", reachable=False, replicas=3, writes=4, records_written=500, refusals=1, checks=2, divergences=1,
        shards={"in_step": 5, "behind": 0}, lag_s=1.5, pending_bytes=64,
    )  # fmt: skip
    api.fleet.troubles = [StoreProblem("timeout", "", ""), StoreProblem("timeout", "", "")]
    found = samples(api)
    expected = {
        "kvindexer_store_reachable": 0,
        "kvindexer_store_replicas": 3,
        "kvindexer_store_writes_total": 4,
        "kvindexer_store_records_written_total": 500,
        "kvindexer_store_refusals_total": 1,
        "kvindexer_store_checks_total": 2,
        "kvindexer_store_divergences_total": 1,
        "kvindexer_store_shards{state=in_step}": 5,
        "kvindexer_store_shards{state=behind}": 0,
        "kvindexer_store_lag_seconds": 1.5,
        "kvindexer_store_pending_bytes": 64,
        "kvindexer_store_problems{reason=timeout}": 2,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_label_has_a_bounded_number_of_values() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.applied(Change(skipped={f"reason-{number}": 1}))
    text = metrics.render().decode()
    assert text.count("kvindexer_skipped_total{") == MAX_LABELS + 1
    assert f'kvindexer_skipped_total{{reason="other"}} {1000.0 - MAX_LABELS}' in text


def test_latencies_fall_into_the_bucket_that_holds_them() -> None:
    metrics = Metrics()
    for seconds in (0.0, LATENCY_BOUNDS_S[0], 0.0011, 99.0):
        metrics.answered("/query", 200, seconds)
    text = metrics.render().decode()
    buckets = dict(re.findall(r'duration_seconds_bucket\{le="([^"]+)",route="/query"\} (\S+)', text))
    assert buckets[str(LATENCY_BOUNDS_S[0])] == "2.0"
    assert (buckets["0.001"], buckets["0.0025"]) == ("2.0", "3.0")
    assert (buckets[str(LATENCY_BOUNDS_S[-1])], buckets["+Inf"]) == ("3.0", "4.0")


# OpenAPI


def test_the_openapi_document_describes_every_route_and_no_other(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/match",
        "/v1/match/batch",
        "/v1/keys",
        "/v1/explain",
        "/v1/routed",
        "/v1/feedback",
        "/v1/heat/prefixes",
        "/v1/heat/single",
        "/v1/heat/prewarm",
        "/v1/blocks/locate",
        "/v1/offload/plan",
        "/v1/tiers",
        "/v1/changes",
        "/v1/sources",
        "/score_completions",
        "/score_chat_completions",
        "/query",
        "/query_by_hash",
        "/register",
        "/unregister",
        "/workers",
        "/health",
        "/ready",
        "/metrics",
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            response = api.client.request(method, path, content=b"")
            assert str(response.status_code) in operation["responses"], path
            assert operation["summary"]


def test_the_openapi_document_has_the_fields_of_the_hot_routes(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    request = document["paths"]["/v1/match"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert request == {"$ref": "#/components/schemas/MatchRequest"}
    assert {"model", "tokens", "tokens_b64", "keys", "candidates", "require"} <= set(
        schemas["MatchRequest"]["properties"]
    )
    assert schemas["MatchRequest"]["required"] == ["model"]
    api.store(api.add("pod-a"), PROMPT[:8])
    api.post("/v1/routed", {"model": "m", "instance": "pod-a", "tokens": PROMPT, "ttl_s": 60})
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT, "candidates": ["pod-a"], "by_rank": True})
    assert set(schemas["Match"]["properties"]) == set(answer["matches"][0])
    assert set(schemas["MooncakeFigures"]["properties"]) == {"longest_matched", "GPU", "CPU", "DISK", "DP"}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', api.client.get("/openapi.json").text))
    assert references <= set(schemas)


def test_the_docs_page_is_there(api: Api) -> None:
    assert api.client.get("/docs").status_code == 200
    assert error(api.client.get("/openapi.yaml"))[0] == 404
