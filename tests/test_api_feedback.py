"""POST /v1/feedback through a real server: outcomes, figures, the verdict on a source, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from api_server import Api, serving


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def told(api: Api, predicted: int, cached: int, **fields: Any) -> dict[str, Any]:
    body = {"instance": "pod-a", "predicted_tokens": predicted, "cached_tokens": cached, **fields}
    answer: dict[str, Any] = api.post("/v1/feedback", body)
    return answer


def figures(api: Api, instance: str = "pod-a") -> dict[str, int]:
    (entry,) = api.client.get("/v1/sources", params={"instance": instance}).json()["sources"]
    found: dict[str, int] = entry["feedback"]
    return found


def test_outcomes_and_figures(api: Api) -> None:
    api.add("pod-a")
    api.add("pod-b")
    assert told(api, 32, 32) == {"instance": "pod-a", "outcome": "exact", "counted": True, "doubted": 0}
    assert told(api, 32, 16)["outcome"] == "over"
    assert told(api, 16, 32)["outcome"] == "under"
    assert figures(api) == {
        "exact": 1,
        "over": 1,
        "under": 1,
        "predicted_tokens": 80,
        "cached_tokens": 80,
        "doubts": 0,
    }
    assert not any(figures(api, "pod-b").values())
    text = api.client.get("/metrics").text
    for line in (
        'kvindexer_feedback_total{outcome="over"} 1.0',
        "kvindexer_feedback_predicted_tokens_total 80.0",
        "kvindexer_feedback_cached_tokens_total 80.0",
        "kvindexer_feedback_doubts_total 0.0",
    ):
        assert line in text


def test_a_report_that_is_sent_again_counts_once(api: Api) -> None:
    api.add("pod-a")
    api.add("pod-b")
    assert told(api, 32, 16, request_id="r-1")["counted"]
    assert told(api, 32, 16, request_id="r-1") == {
        "instance": "pod-a",
        "outcome": "over",
        "counted": False,
        "doubted": 0,
    }
    assert told(api, 32, 16, request_id="r-1", instance="pod-b")["counted"]
    assert figures(api)["over"] == 1


def test_a_source_that_is_wrong_again_and_again_is_doubted(api: Api) -> None:
    api.add("pod-a")
    assert [told(api, 32, 0)["doubted"] for _ in range(10)] == [0] * 7 + [1, 0, 0]
    assert figures(api)["doubts"] == 1
    assert "kvindexer_feedback_doubts_total 1.0" in api.client.get("/metrics").text


def test_model_tenant_and_rank_say_which_source_is_meant(api: Api) -> None:
    api.add("pod-a", model="m1", rank=0)
    api.add("pod-a", port=2, model="m2", rank=1)
    told(api, 8, 8, model="m1")
    told(api, 8, 8, rank=1)
    told(api, 8, 8)
    entries = api.client.get("/v1/sources").json()["sources"]
    assert [entry["feedback"]["exact"] for entry in entries] == [2, 2]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"instance": "pod-x"}, 404, "unknown_instance"),
        ({"tenant": "acme"}, 404, "unknown_instance"),
        ({"model": "other"}, 404, "unknown_instance"),
        ({"rank": 7}, 404, "unknown_instance"),
        ({"predicted_tokens": -1}, 422, "invalid_request"),
        ({"cached_tokens": 2**41}, 422, "invalid_request"),
        ({"cached_tokens": 1.5}, 422, "invalid_request"),
        ({"cached_tokens": None}, 422, "invalid_request"),
        ({"request_id": ""}, 422, "invalid_request"),
        ({"request_id": "x" * 2000}, 422, "invalid_request"),
        ({"tokens": [1]}, 422, "unknown_field"),
    ],
)
def test_trap_26_what_can_not_be_used_is_refused(api: Api, change: dict[str, Any], status: int, code: str) -> None:
    api.add("pod-a")
    body = {"instance": "pod-a", "predicted_tokens": 1, "cached_tokens": 1, **change}
    assert api.refused("/v1/feedback", body)[:2] == (status, code)


def test_what_is_refused_leaves_its_request_id_free(api: Api) -> None:
    body = {"instance": "pod-a", "predicted_tokens": 1, "cached_tokens": 1, "request_id": "r"}
    assert api.refused("/v1/feedback", body)[0] == 404
    api.add("pod-a")
    assert told(api, 1, 1, request_id="r")["counted"]
