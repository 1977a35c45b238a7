"""POST /v1/routed, and what /v1/match makes of it; through a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from api_server import Api, batch, serving, stored
from kvindexer.api.routed import MAX_TTL_S
from kvindexer.events.fleet import LiveFleet
from kvindexer.testing import FakeEngine, PoolShape
from kvindexer.tiering.speculative import Speculation
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import Keyspace
from live import agrees, connected, spec_of, with_fleet

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""
LONG = {"ttl_s": 60}


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def routed(api: Api, instance: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "instance": instance, **LONG, **fields}
    if not {"tokens", "keys"} & fields.keys():
        body["tokens"] = PROMPT
    answer: dict[str, Any] = api.post("/v1/routed", body)
    return answer


def soon(api: Api, **fields: Any) -> dict[str, tuple[int, int]]:
    """Instance -> matched and speculative tokens, in the answer's order."""
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT, **fields})
    rows = answer["matches"]
    return {row["instance"]: (row["matched_tokens"], row.get("speculative_tokens", -1)) for row in rows}


def keys(prompt: list[int]) -> list[int]:
    return list(prompt_keys(pack_tokens(prompt), 4))


def test_prompts_alike_that_come_before_the_events_see_where_the_first_one_went(api: Api) -> None:
    api.add("pod-a")
    api.add("pod-b")
    assert routed(api, "pod-b") == {
        "model": "m",
        "instance": "pod-b",
        "tokens": 40,
        "speculative_tokens": 40,
        "ttl_s": 60.0,
    }
    assert soon(api) == {"pod-b": (0, 40)}
    assert soon(api, tokens=[*PROMPT[:20], 7, 7, 7, 7]) == {"pod-b": (0, 20)}
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT})
    assert (answer["reason"], answer["matches"][0]["tiers"]["gpu"]["tokens"]) == ("nothing_held", 0)


def test_nothing_but_one_field_changes_in_an_answer(api: Api) -> None:
    """Figures, order and ranks are what they were; instances that hold nothing come behind those that do."""
    api.store(api.add("pod-a"), PROMPT[:8])
    api.add("pod-b")
    body = {"model": "m", "tokens": PROMPT, "by_rank": True, "candidates": ["pod-a", "pod-b"]}
    before = api.post("/v1/match", body)["matches"]
    assert not any("speculative_tokens" in row for row in before)
    routed(api, "pod-b")
    after = api.post("/v1/match", body)["matches"]
    assert [row.pop("speculative_tokens") for row in after] == [8, 40]
    assert after == before


def test_the_rfc_routes_know_nothing_of_it(api: Api) -> None:
    api.add("pod-a")
    routed(api, "pod-a")
    assert api.post("/query", {"model": "m", "token_ids": PROMPT}) == {"default": {}}
    assert api.post("/query_by_hash", {"model_name": "m", "seq_hashes": keys(PROMPT)})["instances"] == {}


def test_routed_blocks_go_on_where_held_ones_end(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    routed(api, "pod-a", keys=keys(PROMPT)[2:5])
    assert soon(api) == {"pod-a": (8, 20)}
    assert soon(api, tokens=PROMPT[:16]) == {"pod-a": (8, 16)}
    assert soon(api, tokens=PROMPT[:8]) == {"pod-a": (8, -1)}


def test_it_goes_on_from_each_rank_by_itself_never_from_a_union(api: Api) -> None:
    """Rank 0 holds two blocks, rank 1 four; three and four are on their way, and bring only rank 0 further."""
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT[:8]), rank=0))
    api.index.apply(source, batch(stored(PROMPT[:12], first=2), rank=1))
    routed(api, "pod-a", keys=keys(PROMPT)[2:5])
    assert soon(api) == {"pod-a": (12, 20)}
    routed(api, "pod-a", keys=keys(PROMPT)[5:7])
    assert soon(api) == {"pod-a": (12, 28)}


def test_it_is_gone_after_its_time_and_the_longest_of_equals_counts(api: Api) -> None:
    api.add("pod-a")
    routed(api, "pod-a", ttl_s=0.05)
    routed(api, "pod-a", ttl_s=0.5, tokens=PROMPT[:8])
    assert soon(api)["pod-a"][1] in (40, 8)
    time.sleep(0.06)
    assert soon(api) == {"pod-a": (0, 8)}
    time.sleep(0.5)
    assert api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"] == []
    assert api.client.get("/metrics").text.count("kvindexer_speculative_blocks 0.0") == 1


def test_the_default_time_is_a_setting() -> None:
    with serving(speculative_ttl_s=7.5) as api:
        api.add("pod-a")
        assert routed(api, "pod-a", ttl_s=None)["ttl_s"] == 7.5


def test_requirements_candidates_and_top_k_hold_for_it_too(api: Api) -> None:
    for name in ("pod-a", "pod-b", "pod-c"):
        api.add(name)
    api.store(api.add("pod-d"), PROMPT[:4])
    routed(api, "pod-a", tokens=PROMPT[:8])
    routed(api, "pod-b")
    assert soon(api) == {"pod-d": (4, 4), "pod-b": (0, 40), "pod-a": (0, 8)}
    assert soon(api, top_k=2) == {"pod-d": (4, 4), "pod-b": (0, 40)}
    assert soon(api, candidates=["pod-a", "pod-c"]) == {"pod-a": (0, 8), "pod-c": (0, 0)}
    api.fleet.statuses["pod-b"] = api.fleet.status("pod-b")._replace(sound=False)
    assert soon(api, require=["sound"]) == {"pod-d": (4, 4), "pod-a": (0, 8)}


# What is on its way in the order


def test_prompts_alike_follow_the_first_one_if_that_is_asked_for(api: Api) -> None:
    """All hold the system prompt.  Load sent the first question elsewhere than to the first in order."""
    for name in ("pod-a", "pod-b", "pod-c"):
        api.store(api.add(name), PROMPT[:4])
    routed(api, "pod-c")
    assert next(iter(soon(api))) == "pod-a"
    for _ in range(3):
        (first,) = soon(api, order="expected", top_k=1)
        assert first == "pod-c"
        routed(api, first)
    assert next(iter(soon(api, order="score"))) == "pod-a"


def test_expected_order_is_by_reach_and_then_as_cached_tokens(api: Api) -> None:
    for name in ("pod-a", "pod-b", "pod-c", "pod-d", "pod-e"):
        api.add(name)
    api.store("tcp://pod-b:5557", PROMPT[:4])
    api.store("tcp://pod-c:5557", PROMPT[:20])
    api.store("tcp://pod-d:5557", PROMPT[:24])
    candidates = ["pod-a", "pod-b", "pod-c", "pod-d", "pod-e"]
    plain = soon(api, candidates=candidates)
    assert list(plain) == ["pod-d", "pod-c", "pod-b", "pod-a", "pod-e"]
    assert soon(api, candidates=candidates, order="expected") == plain
    routed(api, "pod-b", tokens=PROMPT[:24])
    routed(api, "pod-e")
    answer = soon(api, candidates=candidates, order="expected")
    assert list(answer.items()) == [
        ("pod-e", (0, 40)),
        ("pod-d", (24, 24)),
        ("pod-b", (4, 24)),
        ("pod-c", (20, 20)),
        ("pod-a", (0, 0)),
    ]
    assert list(soon(api, order="expected", top_k=2)) == ["pod-e", "pod-d"]
    assert list(soon(api, candidates=candidates)) == ["pod-d", "pod-c", "pod-b", "pod-e", "pod-a"]


def test_expected_order_changes_no_figure_and_holds_for_batches(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    api.add("pod-b")
    routed(api, "pod-b")
    body = {"model": "m", "tokens": PROMPT, "by_rank": True}
    usual = api.post("/v1/match", body)["matches"]
    expected = api.post("/v1/match", {**body, "order": "expected"})["matches"]
    assert (expected[::-1], len(usual)) == (usual, 2)
    batch = {"model": "m", "prompts": [{"tokens": PROMPT}, {"tokens": PROMPT[:8]}], "order": "expected"}
    results = api.post("/v1/match/batch", batch)["results"]
    instances = [[row["instance"] for row in each["matches"]] for each in results]
    assert instances == [["pod-b", "pod-a"], ["pod-a", "pod-b"]], "of the second prompt both have all"


def test_an_instance_that_is_unregistered_is_not_listed(api: Api) -> None:
    api.add("pod-a")
    api.add("pod-b")
    routed(api, "pod-a")
    api.fleet.unregister("pod-a")
    assert soon(api) == {}


@pytest.mark.parametrize("other", [{"lora": "x"}, {"cache_salt": "x"}, {"tenant": "acme"}])
def test_trap_9_another_lora_salt_or_tenant_sees_nothing_of_it(api: Api, other: dict[str, str]) -> None:
    api.add("pod-a")
    api.add("pod-b", tenant="acme")
    routed(api, "pod-a")
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT, **other})
    assert answer["matches"] == []
    assert api.refused("/v1/routed", {"model": "m", "tenant": "acme", "instance": "pod-a", "tokens": PROMPT})[:2] == (
        404,
        "unknown_instance",
    )


def test_a_batch_and_msgpack_say_the_same(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    api.add("pod-b")
    body = {"model": "m", "instance": "pod-b", "tokens_b64": pack_tokens(PROMPT), **LONG}
    headers = {"content-type": "application/msgpack", "accept": "application/msgpack"}
    answer = api.client.post("/v1/routed", content=msgpack.packb(body), headers=headers)
    assert msgpack.unpackb(answer.content)["speculative_tokens"] == 40
    packed = {"model": "m", "prompts": [{"tokens": PROMPT}, {"tokens": PROMPT[:12]}], "by_rank": True}
    packed["candidates"] = ["pod-a", "pod-b"]
    rows = msgpack.unpackb(api.client.post("/v1/match/batch", content=msgpack.packb(packed), headers=headers).content)
    assert rows == api.post("/v1/match/batch", packed)
    assert [[row["speculative_tokens"] for row in each["matches"]] for each in rows["results"]] == [[8, 40], [8, 12]]


def test_it_is_bounded_and_counted() -> None:
    with serving(max_speculative_blocks=12) as api:
        for name in ("pod-a", "pod-b"):
            api.add(name)
        routed(api, "pod-a", ttl_s=30)
        assert routed(api, "pod-b")["speculative_tokens"] == 40
        assert soon(api) == {"pod-b": (0, 40)}
        assert routed(api, "pod-b", tokens=list(range(400)))["speculative_tokens"] == 48
        text = api.client.get("/metrics").text
        assert "kvindexer_speculative_blocks 12.0" in text
        assert "kvindexer_routed_total 3.0" in text
        assert 'kvindexer_speculative_ended_total{reason="made_room"} 108.0' in text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "x", "instance": "pod-a", "tokens": PROMPT}, 404, "unknown_model"),
        ({"model": "m", "instance": "pod-x", "tokens": PROMPT}, 404, "unknown_instance"),
        ({"model": "m", "tokens": PROMPT}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a"}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": PROMPT, "keys": [1]}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": PROMPT, "ttl_s": 0}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": PROMPT, "ttl_s": -1}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": PROMPT, "ttl_s": 2 * MAX_TTL_S}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": [-1]}, 422, "invalid_request"),
        ({"model": "m", "instance": "pod-a", "tokens": PROMPT, "other": 1}, 422, "unknown_field"),
        ({"model": "m", "instance": "pod-a", "tokens": [1] * 1001}, 413, "too_large"),
        ({"model": "m", "instance": "pod-a", "keys": [1] * 251}, 413, "too_large"),
        ({"model": "m", "instance": "pod-a", "prompt": "hello"}, 422, "no_tokenizer"),
        (b"{", 400, "malformed_json"),
    ],
)
def test_trap_26_what_can_not_be_used_is_refused(body: Any, status: int, code: str) -> None:
    with serving(max_prompt_tokens=1000) as api:
        api.add("pod-a")
        assert api.refused("/v1/routed", body)[:2] == (status, code)


def test_nan_is_no_time(api: Api) -> None:
    api.add("pod-a")
    body = {"model": "m", "instance": "pod-a", "tokens": PROMPT, "ttl_s": float("nan")}
    headers = {"content-type": "application/msgpack"}
    assert api.client.post("/v1/routed", content=msgpack.packb(body), headers=headers).status_code == 422


def test_names_that_could_be_several_instances_are_refused(api: Api) -> None:
    api.add("pod-a", aliases=("pod",))
    api.add("pod-b", aliases=("pod", "only-b"))
    assert api.refused("/v1/routed", {"model": "m", "instance": "pod", "tokens": PROMPT})[:2] == (
        409,
        "ambiguous_instance",
    )
    assert routed(api, "only-b")["instance"] == "pod-b"


def test_blocks_whose_event_has_come_are_what_the_index_says_and_nothing_else() -> None:
    """Over real sockets: stored blocks leave the overlay, so that their removal inside of the time is seen."""
    overlay = Speculation(1_000)
    space = Keyspace("default", "m", "", 4)
    with FakeEngine(pool=PoolShape(num_blocks=14, block_size=4)) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet._speculation = overlay
            fleet.register(spec_of(engine))
            await connected(engine)
            overlay.add(space, "pod-a", keys(PROMPT), 1e12)
            overlay.add(space, "pod-b", keys(PROMPT), 1e12)
            overlay.add(space, "pod-a", keys([7] * 8), 1e12)
            engine.run_request(PROMPT)
            engine.publisher.flush()
            await agrees(fleet, engine)
            runs = overlay.routings(space)
            assert runs is not None
            assert runs.waiting("pod-a") == set(keys([7] * 8))
            assert len(runs.waiting("pod-b")) == 10
            assert overlay.confirmed == 10

        with_fleet(scenario)
