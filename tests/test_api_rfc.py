"""The routes of RFC #1403 through a real server, in Mooncake's and in Dynamo's dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from api_server import LIVE, Api, batch, error, serving, stored
from kvindexer.tokenization.blocks import local_hashes, pack_tokens, prompt_keys

PROMPT = list(range(40))
"""Ten blocks of 4 tokens."""

MOONCAKE: dict[str, Any] = {
    "endpoint": "tcp://10.0.0.1:5557",
    "replay_endpoint": "tcp://10.0.0.1:5558",
    "type": "vLLM",
    "modelname": "m",
    "lora_name": "sql",
    "tenant_id": "acme",
    "instance_id": "pod-a",
    "block_size": 4,
    "dp_rank": 2,
    "additionalsalt": "w8a8",
}
DYNAMO: dict[str, Any] = {"instance_id": 7, "endpoint": "tcp://10.0.0.7:5557", "model_name": "m", "block_size": 4}


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


# POST /register, /unregister, GET /workers


def test_register_as_mooncakes_clients_do(api: Api) -> None:
    response = api.client.post("/register", json=MOONCAKE)
    assert (response.status_code, response.json()) == (
        200,
        {"status": "registered successfully", "instance_id": "pod-a"},
    )
    ((source, spec),) = list(api.fleet.registry)
    assert source == "tcp://10.0.0.1:5557"
    assert (spec.instance, spec.model, spec.tenant, spec.rank) == ("pod-a", "m", "acme", 2)
    assert (spec.lora, spec.additional_salt, spec.type) == ("sql", "w8a8", "vllm")
    assert (spec.block_size, spec.replay) == (4, "tcp://10.0.0.1:5558")


def test_register_as_dynamos_clients_do(api: Api) -> None:
    response = api.client.post("/register", json=DYNAMO)
    assert (response.status_code, response.json()) == (201, {"status": "ok"})
    ((_, spec),) = list(api.fleet.registry)
    assert (spec.instance, spec.model, spec.tenant, spec.rank, spec.type) == ("7", "m", "default", 0, "vllm")


@pytest.mark.parametrize("name", ["model", "modelname", "model_name"])
@pytest.mark.parametrize("instance", [7, "pod-a"])
def test_every_spelling_of_the_model_is_taken(api: Api, name: str, instance: int | str) -> None:
    body = {"instance_id": instance, "endpoint": "tcp://h:1", "block_size": 4, name: "m"}
    assert api.client.post("/register", json=body).status_code == (201 if instance == 7 else 200)
    assert [spec.model for _, spec in api.fleet.registry] == ["m"]


@pytest.mark.parametrize("name", ["vLLM", "SGLang", "Mooncake", "VLLM", "sglang", "store"])
def test_types_are_known_in_any_case(api: Api, name: str) -> None:
    api.post("/register", {**MOONCAKE, "type": name})
    assert [spec.type for _, spec in api.fleet.registry] == [name.lower()]


def test_an_unknown_type_is_refused_with_the_list(api: Api) -> None:
    assert api.refused("/register", {**MOONCAKE, "type": "TensorRT"}) == (
        400,
        "unknown_type",
        "known: vllm, sglang, mooncake, store",
    )


def test_fields_of_a_source_beyond_the_rfc_are_taken_and_unknown_ones_ignored(api: Api) -> None:
    extra = {"offload_blocks_per_chunk": 8, "report_mode": "full", "topic": "kv@", "hash_profile": {"a": [1]}}
    api.post("/register", {**MOONCAKE, **extra})
    ((_, spec),) = list(api.fleet.registry)
    assert (spec.offload_blocks_per_chunk, spec.report_mode, spec.topic) == (8, "full", "kv@")


def test_registering_the_same_again_is_fine_and_a_contradiction_is_a_conflict(api: Api) -> None:
    for body, expected in ((MOONCAKE, 200), (DYNAMO, 201)):
        assert api.client.post("/register", json=body).status_code == expected
        assert api.client.post("/register", json=body).status_code == expected
        status, code, hint = api.refused("/register", {**body, "block_size": 8})
        assert (status, code) == (409, "conflict")
        assert "unregister" in hint
    assert len(api.fleet.registry) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modelname": None}, (422, "invalid_request")),
        ({"model_name": "other"}, (422, "invalid_request")),
        ({"instance_id": ""}, (422, "invalid_request")),
        ({"instance_id": -1}, (422, "invalid_request")),
        ({"instance_id": 1.5}, (422, "invalid_request")),
        ({"instance_id": 2**64}, (422, "invalid_request")),
        ({"block_size": 0}, (422, "invalid_request")),
        ({"block_size": "16"}, (422, "invalid_request")),
        ({"dp_rank": -1}, (422, "invalid_request")),
        ({"endpoint": "10.0.0.1:5557"}, (422, "invalid_request")),
        ({"endpoint": "ipc:///tmp/x"}, (400, "endpoint_not_allowed")),
        ({"replay_endpoint": "tcp://*:5"}, (422, "invalid_request")),
        ({"durable_tiers": ["attic"]}, (422, "invalid_request")),
        ({"report_mode": "loud"}, (422, "invalid_request")),
    ],
)
def test_an_unusable_registration_is_refused(api: Api, change: dict[str, Any], expected: tuple[int, str]) -> None:
    assert api.refused("/register", {**MOONCAKE, **change})[:2] == expected
    assert len(api.fleet.registry) == 0


def test_unregister_as_mooncakes_clients_do(api: Api) -> None:
    api.post("/register", MOONCAKE)
    body = {name: MOONCAKE[name] for name in ("type", "modelname", "lora_name", "tenant_id", "instance_id")}
    body |= {"block_size": 4, "dp_rank": 2}
    for change in ({"dp_rank": 0}, {"tenant_id": "default"}, {"modelname": "x"}, {"instance_id": "pod-b"}):
        assert api.refused("/unregister", {**body, **change})[:2] == (404, "unknown_instance")
    assert api.post("/unregister", body) == {
        "status": "unregistered successfully",
        "removed_instances": ["pod-a|acme|2"],
    }
    assert len(api.fleet.registry) == 0
    assert api.refused("/unregister", body)[:2] == (404, "unknown_instance")


def test_unregister_as_dynamos_clients_do(api: Api) -> None:
    for rank in range(3):
        api.post("/register", {**DYNAMO, "dp_rank": rank, "endpoint": f"tcp://h:{5557 + rank}"})
    assert api.post("/unregister", {"instance_id": 7, "model_name": "m", "dp_rank": 1}) == {"status": "ok"}
    assert [spec.rank for _, spec in api.fleet.registry] == [0, 2]
    assert api.refused("/unregister", {"instance_id": 7, "model_name": "m", "dp_rank": 1})[0] == 404
    assert api.post("/unregister", {"instance_id": 7, "model_name": "m"}) == {"status": "ok"}
    assert api.refused("/unregister", {"instance_id": 7, "model_name": "m"})[0] == 404


def test_an_unregistered_instance_is_gone_from_answers(api: Api) -> None:
    api.post("/register", DYNAMO)
    api.store(DYNAMO["endpoint"], PROMPT)
    query = {"model_name": "m", "token_ids": PROMPT}
    assert list(api.post("/query", query)["instances"]) == ["7"]
    api.add("pod-b")
    api.post("/unregister", {"instance_id": 7, "model_name": "m"})
    assert api.post("/query", query)["instances"] == {}


def test_workers_lists_instances_with_the_fields_of_dynamos_list(api: Api) -> None:
    api.post("/register", DYNAMO)
    api.post("/register", {**DYNAMO, "dp_rank": 1, "endpoint": "tcp://h:2"})
    api.post("/register", MOONCAKE)
    api.fleet.statuses["pod-a"] = LIVE._replace(state="gone")
    listed = api.client.get("/workers").json()
    assert listed == [
        {
            "instance_id": 7,
            "source": "zmq",
            "type": "vllm",
            "status": "active",
            "model_name": "m",
            "modelname": "m",
            "routing_group": "default",
            "tenant_id": "default",
            "block_size": 4,
            "endpoints": {"0": "tcp://10.0.0.7:5557", "1": "tcp://h:2"},
            "listeners": {
                "0": {"endpoint": "tcp://10.0.0.7:5557", "status": "active"},
                "1": {"endpoint": "tcp://h:2", "status": "active"},
            },
        },
        {
            "instance_id": "pod-a",
            "source": "zmq",
            "type": "vllm",
            "status": "failed",
            "model_name": "m",
            "modelname": "m",
            "routing_group": "acme",
            "tenant_id": "acme",
            "block_size": 4,
            "endpoints": {"2": "tcp://10.0.0.1:5557"},
            "listeners": {"2": {"endpoint": "tcp://10.0.0.1:5557", "status": "failed"}},
        },
    ]
    by_group = api.client.get("/workers", params={"routing_group": "acme"}).json()
    assert [entry["instance_id"] for entry in by_group] == ["pod-a"]
    assert api.client.get("/workers", params={"model_name": "x"}).json() == []


@pytest.mark.parametrize(
    ("registered", "shown"),
    [("18446744073709551615", 2**64 - 1), ("18446744073709551616",) * 2, ("007",) * 2, ("٣",) * 2],
)
def test_workers_shows_integers_only_where_one_was_registered(api: Api, registered: str, shown: int | str) -> None:
    api.post("/register", {**MOONCAKE, "instance_id": registered})
    assert [entry["instance_id"] for entry in api.client.get("/workers").json()] == [shown]


# POST /query and /query_by_hash


def three_instances(api: Api) -> None:
    """The same events that were once sent to Dynamo's standalone indexer 1.6.1."""

    def run(first: int, last: int, medium: str, **fields: Any) -> dict[str, Any]:
        event = stored(PROMPT[first * 4 : last * 4], medium=medium, **fields)
        hashes = [first_hash + 1 for first_hash in range(first, last)]
        return {**event, "block_hashes": hashes, "parent_block_hash": first or None}

    two_ranks = api.add("11")
    api.index.apply(two_ranks, batch(run(0, 2, "GPU"), rank=0))
    api.index.apply(two_ranks, batch(run(0, 3, "GPU"), run(2, 6, "CPU"), run(0, 1, "CPU"), rank=1))
    api.index.apply(api.add("12"), batch(run(0, 1, "GPU"), run(0, 4, "CPU"), run(4, 5, "DISK")))
    api.add("13")


def test_dynamos_form_is_what_dynamo_itself_answered_to_these_events(api: Api) -> None:
    three_instances(api)
    assert api.post("/query", {"model_name": "m", "token_ids": PROMPT}) == {
        "scores": {"12": {"0": 4}, "11": {"1": 12, "0": 8}},
        "frequencies": [],
        "instances": {
            "11": {"longest_matched": 24, "gpu": 12, "dp": {"0": 8, "1": 12}, "cpu": 24, "disk": 24},
            "12": {"longest_matched": 20, "gpu": 4, "dp": {"0": 4}, "cpu": 16, "disk": 20},
        },
    }


def test_dynamos_form_of_an_instance_without_gpu_blocks(api: Api) -> None:
    """As Dynamo 1.6.1: no scores, a zero for each rank, and what is external counts as disk."""
    source = api.add("21")
    api.index.apply(source, batch(stored(PROMPT[:8], medium="CPU"), rank=0))
    api.index.apply(source, batch(stored(PROMPT[:12], medium="EXTERNAL"), rank=1))
    assert api.post("/query", {"model_name": "m", "token_ids": PROMPT}) == {
        "scores": {},
        "frequencies": [],
        "instances": {"21": {"longest_matched": 12, "gpu": 0, "dp": {"0": 0, "1": 0}, "cpu": 8, "disk": 12}},
    }


def test_mooncakes_form_has_each_tier_by_itself(api: Api) -> None:
    three_instances(api)
    assert api.post("/query", {"model": "m", "token_ids": PROMPT, "block_size": 4}) == {
        "default": {
            "11": {"longest_matched": 24, "GPU": 12, "CPU": 4, "DISK": 0, "DP": {"0": 8, "1": 24}},
            "12": {"longest_matched": 20, "GPU": 4, "CPU": 16, "DISK": 0, "DP": {"0": 20}},
        }
    }


def test_nothing_held_is_an_empty_answer(api: Api) -> None:
    api.add("pod-a", tenant="acme")
    for path, prompt in (("/query", {"token_ids": PROMPT}), ("/query_by_hash", {"seq_hashes": [1, 2]})):
        assert api.post(path, {"model": "m", "tenant_id": "acme", **prompt}) == {"acme": {}}
        assert api.post(path, {"model_name": "m", "routing_group": "acme", **prompt}) == {
            "scores": {},
            "frequencies": [],
            "instances": {},
        }


def test_hashes_are_keys_or_dynamos_block_hashes_signed_or_not(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:24])
    packed = pack_tokens(PROMPT)
    keys, locals_ = list(prompt_keys(packed, 4)), local_hashes(packed, 4)
    assert max(keys) >= 2**63
    assert max(locals_) >= 2**63
    expected = {"default": {"pod-a": {"longest_matched": 24, "GPU": 24, "CPU": 0, "DISK": 0, "DP": {"0": 24}}}}
    for name, hashes in (("seq_hashes", keys), ("block_hash", keys), ("block_hashes", locals_)):
        for sent in (hashes, [value - 2**64 if value >= 2**63 else value for value in hashes]):
            assert api.post("/query_by_hash", {"model": "m", name: sent}) == expected


def test_instance_id_restricts_the_answer(api: Api) -> None:
    three_instances(api)
    for instance in (12, "12"):
        answer = api.post("/query", {"model_name": "m", "token_ids": PROMPT, "instance_id": instance})
        assert list(answer["instances"]) == ["12"]
    assert api.post("/query", {"model": "m", "token_ids": PROMPT, "instance_id": "x"}) == {"default": {}}


def test_lora_and_salt_of_a_token_query(api: Api) -> None:
    api.store(api.add("lora"), PROMPT, lora_name="sql")
    api.store(api.add("salted"), PROMPT, extra_keys=[["pepper"], *[None] * 9])
    api.store(api.add("plain"), PROMPT)
    query = {"model": "m", "token_ids": PROMPT}
    assert list(api.post("/query", query)["default"]) == ["plain"]
    assert list(api.post("/query", {**query, "lora_name": "", "cache_salt": ""})["default"]) == ["plain"]
    assert list(api.post("/query", {**query, "lora_name": "sql"})["default"]) == ["lora"]
    assert list(api.post("/query", {**query, "cache_salt": "pepper"})["default"]) == ["salted"]


def test_additionalsalt_selects_deployments(api: Api) -> None:
    api.store(api.add("w8a8", additional_salt="w8a8"), PROMPT)
    api.store(api.add("plain"), PROMPT)
    query = {"model": "m", "token_ids": PROMPT}
    assert set(api.post("/query", query)["default"]) == {"w8a8", "plain"}
    assert set(api.post("/query", {**query, "additionalsalt": "w8a8"})["default"]) == {"w8a8"}
    assert api.refused("/query", {**query, "additionalsalt": "x"})[:2] == (404, "unknown_salt")


def test_several_block_sizes_and_ranks_give_the_best_figure(api: Api) -> None:
    api.store(api.add("pod-a", 1), PROMPT[:12])
    api.store(api.add("pod-a", 2, block_size=8, rank=1), PROMPT[:16], block_size=8)
    query = {"model": "m", "token_ids": PROMPT}
    assert api.post("/query", query)["default"]["pod-a"] == {
        "longest_matched": 16,
        "GPU": 16,
        "CPU": 0,
        "DISK": 0,
        "DP": {"0": 12, "1": 16},
    }
    assert api.post("/query", {**query, "block_size": 4})["default"]["pod-a"]["longest_matched"] == 12
    status, code, hint = api.refused("/query", {**query, "block_size": 32})
    assert (status, code, hint) == (404, "unknown_block_size", "known block sizes: 4, 8")
    assert api.refused("/query_by_hash", {"model": "m", "seq_hashes": [1]})[:2] == (400, "block_size_needed")


def test_a_hybrid_models_figures_stop_where_its_rules_do(api: Api) -> None:
    """A sliding window of 5 tokens needs the last block; the window's group has lost block 3."""
    source = api.add("pod-a")
    window = stored(PROMPT[:16], group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=5)
    full = stored(PROMPT[:16])
    lost = {"type": "BlockRemoved", "block_hashes": full["block_hashes"][3:], "medium": "GPU", "group_idx": 1}
    api.index.apply(source, batch(window, full, lost))
    (row,) = api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"]
    assert row["matched_tokens"] == 12
    answer = api.post("/query", {"model_name": "m", "token_ids": PROMPT})
    assert answer["instances"]["pod-a"] == {
        "longest_matched": 12,
        "gpu": 12,
        "dp": {"0": 12},
        "cpu": 12,
        "disk": 12,
    }
    assert answer["scores"] == {"pod-a": {"0": 12}}


def test_a_prefix_that_no_rule_lets_reuse_is_no_match(api: Api) -> None:
    """The window's group has lost all its blocks: the full group's are of no use."""
    source = api.add("pod-a")
    window = stored(PROMPT[:16], group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=5)
    full = stored(PROMPT[:16])
    lost = {"type": "BlockRemoved", "block_hashes": full["block_hashes"], "medium": "GPU", "group_idx": 1}
    api.index.apply(source, batch(window, full, lost))
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT})
    assert (answer["matches"], answer["reason"]) == ([], "nothing_held")
    answer = api.post("/v1/match", {"model": "m", "tokens": PROMPT, "candidates": ["pod-a"]})
    assert [row["matched_tokens"] for row in answer["matches"]] == [0]
    assert api.post("/query", {"model": "m", "token_ids": PROMPT}) == {"default": {}}
    assert api.post("/query", {"model_name": "m", "token_ids": PROMPT})["instances"] == {}


@pytest.mark.parametrize(
    ("path", "change", "expected"),
    [
        ("/query", {"model": "x"}, (404, "unknown_model")),
        ("/query", {"tenant_id": "x"}, (404, "unknown_model")),
        ("/query", {"model": None}, (422, "invalid_request")),
        ("/query", {"model_name": "other"}, (422, "invalid_request")),
        ("/query", {"routing_group": "a", "tenant_id": "b"}, (422, "invalid_request")),
        ("/query", {"token_ids": None}, (422, "invalid_request")),
        ("/query", {"lora_id": 3}, (400, "lora_id_unsupported")),
        ("/query_by_hash", {"seq_hashes": None}, (422, "invalid_request")),
        ("/query_by_hash", {"block_hashes": [1]}, (422, "invalid_request")),
        ("/query_by_hash", {"cache_salt": "x"}, (400, "extras_with_hashes")),
        ("/query_by_hash", {"lora_name": "x"}, (400, "extras_with_hashes")),
        ("/query_by_hash", {"seq_hashes": [2**64]}, (422, "invalid_request")),
        ("/query_by_hash", {"seq_hashes": ["1"]}, (422, "invalid_request")),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(
    api: Api, path: str, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    api.add("pod-a")
    prompt = {"token_ids": [1, 2]} if path == "/query" else {"seq_hashes": [1, 2]}
    status, code, hint = api.refused(path, {"model": "m", **prompt, **change})
    assert (status, code) == expected
    assert hint


def test_hot_routes_take_nothing_but_post(api: Api) -> None:
    for path in ("/v1/match", "/query", "/query_by_hash", "/register", "/unregister"):
        response = api.client.get(path)
        assert error(response)[:2] == (405, "method_not_allowed")
        assert response.headers["allow"] == "POST"
