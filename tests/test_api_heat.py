"""GET /v1/heat/... through a real server."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import pytest

from api_server import Api, error, serving
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

SYSTEM = list(range(100, 124))
"""Six blocks of 4 tokens."""
TAILS = count()


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def key(prompt: list[int]) -> int:
    return int(prompt_keys(pack_tokens(prompt), 4)[-1])


def ask(api: Api, times: int, *, prefix: list[int] = SYSTEM, path: str = "/v1/match", **fields: Any) -> None:
    """Prompts that share a prefix, each with an end of its own."""
    for number in islice(TAILS, times):
        tokens = [*prefix, *([1000 + number] * 8)]
        api.post(path, {"model": "m", "tokens" if path == "/v1/match" else "token_ids": tokens, **fields})


def get(api: Api, what: str, **params: Any) -> Any:
    response = api.client.get(f"/v1/heat/{what}", params={"model": "m", **params})
    assert response.status_code == 200, response.text
    return response.json()


def test_top_shared_prefixes_with_who_has_them(api: Api) -> None:
    api.store(api.add("pod-a"), SYSTEM)
    api.store(api.add("pod-b", rank=2), SYSTEM[:8], medium="CPU")
    ask(api, 6)
    ask(api, 4, path="/query")
    ask(api, 3, prefix=SYSTEM[:8])
    answer = get(api, "prefixes")
    assert answer == {
        "model": "m",
        "error_per_minute": 0.0,
        "prefixes": [
            {
                "key": key(SYSTEM),
                "block_size": 4,
                "tokens": 24,
                "asked_per_minute": pytest.approx(10, rel=0.1),
                "holders": [{"instance": "pod-a", "rank": 0, "tier": "gpu"}],
            },
            {
                "key": key(SYSTEM[:8]),
                "block_size": 4,
                "tokens": 8,
                "asked_per_minute": pytest.approx(13, rel=0.1),
                "holders": [
                    {"instance": "pod-a", "rank": 0, "tier": "gpu"},
                    {"instance": "pod-b", "rank": 2, "tier": "cpu"},
                ],
            },
        ],
    }
    assert [prefix["tokens"] for prefix in get(api, "prefixes", top=1)["prefixes"]] == [24]


def test_hot_blocks_with_a_single_copy(api: Api) -> None:
    api.store(api.add("pod-a"), SYSTEM)
    api.store(api.add("pod-b"), SYSTEM[:8])
    ask(api, 5)
    ask(api, 3, prefix=[1] * 8)
    (row,) = get(api, "single")["blocks"]
    assert (row["key"], row["tokens"], row["holder"]) == (
        key(SYSTEM),
        24,
        {"instance": "pod-a", "rank": 0, "tier": "gpu"},
    )
    api.store("tcp://pod-b:5557", SYSTEM, first=2)
    assert get(api, "single")["blocks"] == []


def test_what_a_new_pod_should_load(api: Api) -> None:
    api.store(api.add("pod-a"), SYSTEM)
    api.add("new")
    ask(api, 5)
    ask(api, 3, prefix=[1] * 8)  # nobody has that
    (row,) = get(api, "prewarm", instance="new")["prefixes"]
    assert (row["key"], row["tokens"], [holder["instance"] for holder in row["holders"]]) == (
        key(SYSTEM),
        24,
        ["pod-a"],
    )
    assert get(api, "prewarm", instance="pod-a")["prefixes"] == []
    assert len(get(api, "prewarm", instance="not registered yet")["prefixes"]) == 1


def test_what_a_store_has_that_the_new_pod_reads_need_not_be_loaded(api: Api) -> None:
    api.store(api.add("pod-a"), SYSTEM)
    api.add("reader")
    api.store(api.add("lake", type="store", tier="remote", readers=("*",)), SYSTEM)
    ask(api, 5)
    assert get(api, "prewarm", instance="reader")["prefixes"] == []


def test_trap_27_tenants_and_salts_are_kept_apart_and_no_tokens_are_shown(api: Api) -> None:
    api.store(api.add("pod-a", tenant="acme", additional_salt="pepper"), SYSTEM)
    api.add("pod-b")
    ask(api, 4, tenant="acme")
    assert get(api, "prefixes")["prefixes"] == []
    (row,) = get(api, "prefixes", tenant="acme")["prefixes"]
    assert row["tokens"] == 24
    for what in ("prefixes", "single", "prewarm"):
        params = {"model": "m", "tenant": "acme", "instance": "x"}
        text = api.client.get(f"/v1/heat/{what}", params=params).text
        assert "pepper" not in text
        assert '"holder' in text
    assert get(api, "prefixes", tenant="acme", additional_salt="pepper")["prefixes"] == [row]
    params = {"model": "m", "tenant": "acme", "additional_salt": "salt"}
    assert error(api.client.get("/v1/heat/prefixes", params=params))[:2] == (404, "unknown_salt")


@pytest.mark.parametrize(
    ("what", "params", "status"),
    [
        ("prefixes", {}, 422),
        ("prefixes", {"model": ""}, 422),
        ("prefixes", {"model": "m", "top": 0}, 422),
        ("prefixes", {"model": "m", "top": 101}, 422),
        ("single", {"model": "m", "top": "x"}, 422),
        ("prewarm", {"model": "m"}, 422),
        ("prewarm", {"model": "m", "instance": "x" * 2000}, 422),
        ("prefixes", {"model": "other"}, 404),
    ],
)
def test_trap_26_what_can_not_be_used_is_refused(api: Api, what: str, params: dict[str, Any], status: int) -> None:
    api.add("pod-a")
    assert error(api.client.get(f"/v1/heat/{what}", params=params))[0] == status


def test_a_parameter_that_is_missing_is_said_to_be_missing(api: Api) -> None:
    told = [
        api.client.get(f"/v1/heat/prefixes{query}").json()["error"]["message"] for query in ("", "?model=m&top=0")
    ]
    assert told == ["not usable: query.model (missing)", "not usable: query.top"]


def test_offload_plans_know_the_heat(api: Api) -> None:
    """The figure of a plan is that of the same counts."""
    source = api.add("pod-a")
    api.store(source, SYSTEM)
    ask(api, 5)
    text = api.client.get("/metrics").text
    assert "kvindexer_heat_prompts_total 5.0" in text
    assert "kvindexer_heat_blocks 16.0" in text
