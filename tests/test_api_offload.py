"""/v1/blocks/locate, /v1/offload/plan and /v1/tiers through a real server."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from api_server import LIVE, Api, batch, serving, stored
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

PROMPT = list(range(100, 140))
KEYS = list(prompt_keys(pack_tokens(PROMPT), 4))
HASHES = [1000 + number for number in range(10)]
UNSURE = LIVE._replace(sound=False)


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def locate(api: Api, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = api.post("/v1/blocks/locate", {"model": "m", **fields})
    return answer


def plan(api: Api, **fields: Any) -> list[dict[str, Any]]:
    answer: dict[str, Any] = api.post(
        "/v1/offload/plan", {"instance": "pod-a", "tier": "gpu", "hashes": HASHES[:1], **fields}
    )
    blocks: list[dict[str, Any]] = answer["blocks"]
    return blocks


def advice(api: Api, **fields: Any) -> list[tuple[str, str]]:
    return [(block["advice"], block["reason"]) for block in plan(api, **fields)]


def placed(medium: str | None, hashes: list[int]) -> dict[str, Any]:
    """A store that only names blocks, as tiers below the GPU do."""
    return {"type": "BlockStored", "block_hashes": hashes, "token_ids": [], "block_size": 0, "medium": medium}


def shared(api: Api, *readers: str, hashes: list[int], **fields: Any) -> str:
    """A store that has these blocks."""
    source = api.add("shared", type="store", tier="remote", readers=readers, **fields)
    api.index.apply(source, batch(placed(None, hashes)))
    return source


# Locate


def test_holders_of_a_block_with_all_that_is_known_of_them(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:4])
    api.fleet.statuses["pod-a"] = UNSURE
    assert locate(api, keys=KEYS[:2]) == {
        "model": "m",
        "blocks": [
            {
                "status": "held",
                "holders": [
                    {"instance": "pod-a", "rank": 0, "tier": "gpu", "state": "live", "sound": False, "complete": True}
                ],
                "key": KEYS[0],
            },
            {"status": "not_held", "holders": [], "key": KEYS[1]},
        ],
        "unknown": 0,
    }


def test_nearest_first_own_tiers_then_stores_that_are_read_then_others(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    api.index.apply(source, batch(placed("CPU", HASHES[:1])))
    api.store(api.add("pod-b"), PROMPT, first=7)
    shared(api, "pod-a", hashes=HASHES[:1])
    (block,) = locate(api, keys=KEYS[:1], near="pod-a")["blocks"]
    rows = [(row.get("instance", row.get("store")), row["tier"], row["reach"]) for row in block["holders"]]
    assert rows == [
        ("pod-a", "gpu", "own"),
        ("pod-a", "cpu", "own"),
        ("shared", "remote", "reads"),
        ("pod-b", "gpu", "other"),
    ]
    (block,) = locate(api, keys=KEYS[:1], near="pod-b")["blocks"]
    assert [row["reach"] for row in block["holders"]] == ["own", "other", "other", "apart"]
    (block,) = locate(api, keys=KEYS[:1])["blocks"]
    assert [row["tier"] for row in block["holders"]] == ["gpu", "gpu", "cpu", "remote"]
    assert "reach" not in block["holders"][0]


def test_near_may_be_any_name_of_an_instance(api: Api) -> None:
    api.store(api.add("pod-a", aliases=("10.0.0.7:8000",)), PROMPT)
    (block,) = locate(api, keys=KEYS[:1], near="http://10.0.0.7:8000")["blocks"]
    assert block["holders"][0]["reach"] == "own"
    assert api.refused("/v1/blocks/locate", {"model": "m", "keys": KEYS, "near": "x"})[:2] == (
        404,
        "unknown_instance",
    )


def test_a_stores_blocks_count_for_every_reader_and_the_store_is_no_target(api: Api) -> None:
    """As in /v1/match: the owner of a copy and the instances to route to are told apart."""
    for pod in ("pod-a", "pod-b", "pod-c"):
        api.store(api.add(pod), PROMPT[:4] if pod == "pod-a" else [1, 2, 3, 4])
    api.index.apply("tcp://pod-a:5557", batch(stored(PROMPT)))
    api.index.apply("tcp://pod-a:5557", batch({"type": "BlockRemoved", "block_hashes": HASHES, "medium": "GPU"}))
    shared(api, "pod-a", "pod-b", hashes=HASHES)
    (block,) = locate(api, keys=KEYS[1:2])["blocks"]
    (row,) = block["holders"]
    assert (row["store"], row["readers"], row["tier"]) == ("shared", ["pod-a", "pod-b"], "remote")
    assert "instance" not in row
    matches = {row["instance"]: row for row in api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"]}
    assert set(matches) == {"pod-a", "pod-b"}
    assert all(row["tiers"]["remote"]["tokens"] == 40 for row in matches.values())


def test_every_instance_of_the_model_reads_a_store_for_all(api: Api) -> None:
    for pod in ("pod-b", "pod-a"):
        api.store(api.add(pod), PROMPT)
    shared(api, "*", hashes=HASHES)
    (block,) = locate(api, keys=KEYS[:1])["blocks"]
    assert block["holders"][-1]["readers"] == ["pod-a", "pod-b"]


SPELLINGS = [
    (0x0102030405060708, 0x0102030405060708),
    (-1, 2**64 - 1),
    ("0102030405060708", 0x0102030405060708),
    ("0x0102030405060708", 0x0102030405060708),
    ((b"\xff" * 24 + b"\x00" * 7 + b"\x05").hex(), 5),
    (base64.b64encode(b"\xff" * 24 + b"\x00" * 7 + b"\x05").decode(), 5),
    (base64.urlsafe_b64encode(b"\xff" * 8).decode(), 2**64 - 1),
]


@pytest.mark.parametrize(("given", "meant"), SPELLINGS)
def test_engine_hashes_as_engines_spell_them(api: Api, given: int | str, meant: int) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT[:4], block_hashes=[meant])
    (block,) = locate(api, hashes=[given], source=source)["blocks"]
    assert (block["status"], block["hash"], block["key"]) == ("held", meant, KEYS[0])
    assert len(block["holders"]) == 1


def test_hashes_mean_something_only_in_the_domain_of_their_source(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    other = api.add("pod-b")
    api.store(other, PROMPT[4:8])
    answer = locate(api, hashes=[HASHES[0], HASHES[1]], source=other)
    assert [block["status"] for block in answer["blocks"]] == ["held", "unknown"]
    assert [row["instance"] for row in answer["blocks"][0]["holders"]] == ["pod-b"]
    assert answer["unknown"] == 1
    assert answer["blocks"][1]["hash"] == HASHES[1]
    by_instance = locate(api, hashes=[HASHES[0], HASHES[1]], instance="pod-a")
    assert by_instance["blocks"][0]["holders"][0]["instance"] == "pod-a"


def test_a_hash_of_a_removed_block_still_finds_other_holders(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    api.store(api.add("pod-b"), PROMPT, first=5)
    api.index.apply(source, batch({"type": "BlockRemoved", "block_hashes": HASHES, "medium": "GPU"}))
    (block,) = locate(api, hashes=HASHES[:1], source=source)["blocks"]
    assert [row["instance"] for row in block["holders"]] == ["pod-b"]


def test_a_hash_that_two_sources_of_an_instance_use_differently_is_unknown(api: Api) -> None:
    api.store(api.add("pod-a", rank=0), PROMPT)
    api.store(api.add("pod-a", port=5558, rank=1), PROMPT[4:])
    answer = locate(api, hashes=HASHES[:1], instance="pod-a")
    assert answer["blocks"][0]["status"] == "unknown"
    assert locate(api, hashes=HASHES[:1], source="tcp://pod-a:5557")["blocks"][0]["status"] == "held"


def test_tenants_and_salts_see_their_own(api: Api) -> None:
    """Trap 27, for blocks: neither holders nor the existence of sources show to another tenant."""
    source = api.add("pod-a", tenant="red")
    api.store(source, PROMPT)
    api.store(api.add("pod-b"), PROMPT)
    api.store(api.add("pod-c", additional_salt="pepper"), PROMPT)
    assert api.refused("/v1/blocks/locate", {"model": "m", "hashes": HASHES, "source": source})[1] == "unknown_source"
    refused = api.refused("/v1/blocks/locate", {"model": "m", "hashes": HASHES, "instance": "pod-a"})
    assert refused[1] == "unknown_instance"
    assert refused == api.refused("/v1/blocks/locate", {"model": "m", "hashes": HASHES, "instance": "nobody"})
    rows = locate(api, tenant="red", keys=KEYS[:1])["blocks"][0]["holders"]
    assert [row["instance"] for row in rows] == ["pod-a"]
    rows = locate(api, hashes=HASHES[:1], instance="pod-c")["blocks"][0]["holders"]
    assert [row["instance"] for row in rows] == ["pod-c"]
    rows = locate(api, keys=KEYS[:1], additional_salt="")["blocks"][0]["holders"]
    assert [row["instance"] for row in rows] == ["pod-b"]
    assert (
        api.refused("/v1/offload/plan", {"instance": "pod-a", "tier": "gpu", "hashes": []})[1] == "unknown_instance"
    )


def test_keys_of_a_model_with_two_block_sizes_need_one(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b", block_size=8), PROMPT, block_size=8)
    assert api.refused("/v1/blocks/locate", {"model": "m", "keys": KEYS})[:2] == (400, "block_size_needed")
    assert locate(api, keys=KEYS[:1], block_size=4)["blocks"][0]["status"] == "held"
    assert api.refused("/v1/blocks/locate", {"model": "m", "keys": KEYS, "block_size": 3})[0] == 404


def test_msgpack_both_ways(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    headers = {"content-type": "application/msgpack", "accept": "application/msgpack"}
    body = msgpack.packb({"model": "m", "keys": KEYS[:1]})
    answer = api.client.post("/v1/blocks/locate", content=body, headers=headers)
    assert msgpack.unpackb(answer.content) == locate(api, keys=KEYS[:1])


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 422),
        ({"keys": [1], "hashes": [1], "source": "s"}, 422),
        ({"hashes": [1]}, 422),
        ({"hashes": [1], "source": "tcp://pod-a:5557", "instance": "pod-a"}, 422),
        ({"keys": [1], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": [2**64], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": [-(2**63) - 1], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": ["abc"], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": ["!" * 44], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": ["é" * 16], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": ["00" * 80], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": [1.5], "source": "tcp://pod-a:5557"}, 422),
        ({"hashes": [1], "source": "x"}, 404),
        ({"keys": [2**64]}, 422),
        ({"keys": [1], "model": "x"}, 404),
        ({"keys": [1] * 101}, 413),
        ({"hashes": [1] * 101, "source": "tcp://pod-a:5557"}, 413),
        ({"keys": [1], "more": 1}, 422),
    ],
)
def test_what_can_not_be_answered_is_refused(fields: dict[str, Any], status: int) -> None:
    with serving(max_blocks=100) as api:
        api.add("pod-a")
        assert api.refused("/v1/blocks/locate", {"model": "m", **fields})[0] == status


# Plan


def test_a_plan_says_what_would_be_lost(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b"), PROMPT[:4], first=5)
    first, second = plan(api, hashes=HASHES[:2])
    assert first == {
        "hash": HASHES[0],
        "key": KEYS[0],
        "held": True,
        "copies": {"gpu": 1, "cpu": 0, "disk": 0, "remote": 0},
        "last_copy": False,
        "heat": first["heat"],
        "advice": "drop",
        "reason": "other_holder",
    }
    assert second["last_copy"]
    assert (second["advice"], second["reason"]) == ("offload", "last_copy")


def test_never_drop_unless_another_holder_is_live_and_sound(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b"), PROMPT)
    for status in (UNSURE, LIVE._replace(state="stale"), LIVE._replace(state="syncing"), LIVE._replace(state="gone")):
        api.fleet.statuses["pod-b"] = status
        assert advice(api) == [("offload", "other_holders_unsure")]
        assert advice(api, tier="remote") == [("keep", "other_holders_unsure")]
    api.fleet.statuses["pod-b"] = LIVE
    assert advice(api) == [("drop", "other_holder")]


def test_a_lower_tier_that_the_instance_reads_lets_the_gpu_copy_go(api: Api) -> None:
    source = api.add("pod-a")
    api.store(source, PROMPT)
    assert advice(api) == [("offload", "last_copy")]
    api.index.apply(source, batch(placed("CPU", HASHES[:1])))
    assert advice(api) == [("drop", "lower_copy")]
    assert advice(api, tier="cpu") == [("offload", "own_copies_only")]
    api.fleet.statuses["pod-a"] = UNSURE
    assert advice(api) == [("keep", "lower_copy_unsure")]


def test_a_store_counts_for_its_readers_and_plans_for_itself(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    shared(api, "pod-a", hashes=HASHES[:1])
    assert advice(api) == [("drop", "lower_copy")]
    assert advice(api, instance="shared", tier="remote") == [("drop", "other_holder")]
    api.fleet.statuses["pod-a"] = UNSURE
    assert advice(api, instance="shared", tier="remote") == [("keep", "other_holders_unsure")]


def test_unknown_hashes_are_kept(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b"), PROMPT, first=9)
    (block,) = plan(api, hashes=[9000])
    assert (block["advice"], block["reason"], block["key"], block["last_copy"]) == ("keep", "unknown", None, None)


def test_half_of_a_hybrid_models_block_is_no_copy(api: Api) -> None:
    groups = [stored(PROMPT), stored(PROMPT, group_idx=1)]
    api.index.apply(api.add("pod-a"), batch(*groups))
    api.index.apply(api.add("pod-b"), batch(groups[1]))
    assert advice(api) == [("offload", "other_holders_unsure")]


def test_a_rank_of_its_own(api: Api) -> None:
    source = api.add("pod-a")
    api.index.apply(source, batch(stored(PROMPT), rank=0))
    api.index.apply(source, batch(stored(PROMPT), placed("CPU", HASHES), rank=1))
    assert advice(api, rank=1) == [("drop", "lower_copy")]
    assert advice(api, rank=0) == [("offload", "own_copies_only")]
    assert advice(api) == [("offload", "own_copies_only")]


def test_hot_blocks_are_offloaded_before_they_go(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    api.store(api.add("pod-b"), PROMPT, first=5)
    assert plan(api)[0]["heat"] == 0.0
    for _ in range(20):
        api.post("/v1/match", {"model": "m", "tokens": PROMPT})
    (block,) = plan(api)
    assert block["heat"] > 1
    assert (block["advice"], block["reason"]) == ("offload", "hot")
    assert advice(api, tier="remote") == [("keep", "hot")]
    assert advice(api, hot_from=1e6) == [("drop", "other_holder")]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"tier": "tape"}, 422),
        ({"tier": None}, 422),
        ({"hashes": None}, 422),
        ({"hashes": [1] * 101}, 413),
        ({"instance": "x"}, 404),
        ({"model": "x"}, 404),
        ({"rank": -1}, 422),
        ({"hot_from": -1}, 422),
    ],
)
def test_plans_that_can_not_be_made_are_refused(fields: dict[str, Any], status: int) -> None:
    with serving(max_blocks=100) as api:
        api.add("pod-a")
        body = {"instance": "pod-a", "tier": "gpu", "hashes": [1], **fields}
        assert api.refused("/v1/offload/plan", body)[0] == status


# Tiers


def test_blocks_and_bytes_by_model_instance_and_tier_stores_apart(api: Api) -> None:
    source = api.add("pod-a", block_bytes=1000)
    api.store(source, PROMPT)
    api.index.apply(source, batch(placed("CPU", HASHES[:3])))
    api.store(api.add("pod-a", port=5558, rank=1, block_bytes=1000), PROMPT[:8])
    api.store(api.add("pod-b"), PROMPT[:4])
    shared(api, "*", hashes=HASHES[:2], block_bytes=500)
    api.store(api.add("pod-x", model="other"), PROMPT)
    api.store(api.add("pod-red", tenant="red"), PROMPT)
    answer = api.client.get("/v1/tiers", params={"model": "m"}).json()
    nothing = {"blocks": 0, "bytes": 0}
    cpu = {"blocks": 3, "bytes": 3000}
    a = {"gpu": {"blocks": 12, "bytes": 12_000}, "cpu": cpu, "disk": nothing, "remote": nothing}
    b = {"gpu": {"blocks": 1, "bytes": None}, "cpu": nothing, "disk": nothing, "remote": nothing}
    remote = {"gpu": nothing, "cpu": nothing, "disk": nothing, "remote": {"blocks": 2, "bytes": 1000}}
    assert answer == {
        "tenant": "default",
        "models": [
            {
                "model": "m",
                "tiers": {"gpu": {"blocks": 13, "bytes": None}, "cpu": cpu, "disk": nothing, "remote": nothing},
                "instances": [{"instance": "pod-a", "tiers": a}, {"instance": "pod-b", "tiers": b}],
                "stores": [{"store": "shared", "readers": ["*"], "tiers": remote}],
            }
        ],
    }
    models = api.client.get("/v1/tiers").json()["models"]
    assert [entry["model"] for entry in models] == ["m", "other"]
    red = api.client.get("/v1/tiers", params={"tenant": "red"}).json()["models"]
    assert [entry["instances"][0]["instance"] for entry in red] == ["pod-red"]


def test_a_chunk_that_is_announced_once_counts_as_all_its_blocks(api: Api) -> None:
    source = api.add("pod-a", block_bytes=10, offload_blocks_per_chunk=4)
    api.store(source, PROMPT)
    api.index.apply(source, batch(placed("CPU", HASHES[3:4])))
    tiers = api.client.get("/v1/tiers").json()["models"][0]["tiers"]
    assert tiers["cpu"] == {"blocks": 4, "bytes": 40}


def test_block_bytes_can_be_registered(api: Api) -> None:
    body = {"instance_id": "pod-z", "endpoint": "tcp://127.0.0.1:1", "block_size": 4, "model": "m"}
    api.post("/register", {**body, "block_bytes": 4096})
    (spec,) = api.fleet.specs()
    assert spec.block_bytes == 4096
    assert api.refused("/register", {**body, "block_bytes": 0})[0] == 422
