"""Candidates under any name: ids, aliases, addresses, hosts, URLs; and what a name is that could be several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from api_server import Api, serving
from kvindexer.api.identities import MAX_REMEMBERED, Address, Identities, address_of
from kvindexer.errors import SettingsError
from kvindexer.settings.source import parse_source, source_of
from kvindexer.store.layout import pack_spec, unpack_spec
from kvindexer.types import SourceSpec

PROMPT = list(range(16))


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


def add(api: Api, instance: str, endpoint: str, **fields: Any) -> None:
    spec = SourceSpec(instance=instance, model=fields.pop("model", "m"), block_size=4, endpoint=endpoint, **fields)
    api.fleet.register(spec)


def asked(api: Api, *candidates: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "tokens": PROMPT, "candidates": candidates, **fields}
    answer: dict[str, Any] = api.post("/v1/match", body)
    return answer


def meant(api: Api, *candidates: str, **fields: Any) -> dict[str, str]:
    """Candidate -> the instance that the answer lists for it."""
    return {row["candidate"]: row["instance"] for row in asked(api, *candidates, **fields)["matches"]}


@pytest.mark.parametrize(
    "name",
    [
        "pod-a",
        "10.0.0.7",
        "10.0.0.7:5557",
        "10.0.0.7:8000",
        "http://10.0.0.7:8000",
        "http://10.0.0.7:8000/v1/completions",
        "tcp://10.0.0.7:5557",
        "llm-0",
        "llm-0:8000",
        "gpu-box.example:8000",
        "GPU-box.example:8000",
        "http://gpu-box.example:8000/",
        "gpu-box.example",
    ],
)
def test_trap_13_an_instance_answers_to_all_its_names(api: Api, name: str) -> None:
    """Its id, its aliases, the addresses and hosts among them and in its endpoints, and URLs with any of these."""
    add(api, "pod-a", "tcp://10.0.0.7:5557", aliases=("llm-0",))
    add(api, "pod-a", "tcp://10.0.0.7:5558", rank=1, aliases=("gpu-box.example:8000",))
    add(api, "pod-b", "tcp://10.0.0.8:5557")
    answer = asked(api, name)
    assert [row["instance"] for row in answer["matches"]] == ["pod-a"]
    assert answer["matches"][0]["candidate"] == name
    assert answer["unknown_candidates"] == []
    assert "ambiguous_candidates" not in answer


def test_without_candidates_there_are_no_spellings(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    (row,) = api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"]
    assert "candidate" not in row


def test_a_port_counts_only_against_ports_at_which_an_instance_is_known_to_serve(api: Api) -> None:
    """A publisher's port says nothing; that of an id, an alias or a listing does."""
    add(api, "by-endpoint", "tcp://10.0.0.1:5557")
    add(api, "10.0.0.2:8000", "tcp://10.0.0.2:5557")
    add(api, "by-alias", "tcp://10.0.0.3:5557", aliases=("http://10.0.0.3:8000",))
    for host, known in (("10.0.0.1", True), ("10.0.0.2", False), ("10.0.0.3", False)):
        assert len(meant(api, f"{host}:8000")) == 1
        assert asked(api, f"{host}:8001")["unknown_candidates"] == ([] if known else [f"{host}:8001"])
        assert len(meant(api, host)) == 1


def test_a_name_that_could_be_several_instances_is_reported_and_not_guessed(api: Api) -> None:
    add(api, "first", "tcp://10.0.0.1:5557", aliases=("shared", "10.0.0.1:8000"))
    add(api, "second", "tcp://10.0.0.1:5558", aliases=("shared", "10.0.0.1:8001"))
    answer = asked(api, "10.0.0.1", "shared", "10.0.0.1:8001", "nobody")
    assert [(row["instance"], row["candidate"]) for row in answer["matches"]] == [("second", "10.0.0.1:8001")]
    assert answer["ambiguous_candidates"] == {"10.0.0.1": ["first", "second"], "shared": ["first", "second"]}
    assert answer["unknown_candidates"] == ["nobody"]
    only = asked(api, "10.0.0.1")
    assert (only["matches"], only["reason"]) == ([], "no_known_candidate")


def test_an_id_wins_over_an_alias_and_an_alias_over_an_address(api: Api) -> None:
    """No registration can take away the id of another one."""
    add(api, "10.0.0.2", "tcp://10.0.0.1:5557", aliases=("10.0.0.3",))
    add(api, "other", "tcp://10.0.0.2:5557", aliases=("10.0.0.2",))
    add(api, "third", "tcp://10.0.0.3:5557")
    assert meant(api, "10.0.0.2") == {"10.0.0.2": "10.0.0.2"}
    assert meant(api, "10.0.0.3") == {"10.0.0.3": "10.0.0.2"}


def test_two_spellings_of_one_instance_are_one_row(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT)
    answer = asked(api, "pod-a:8000", "pod-a", "pod-a")
    assert [(row["instance"], row["candidate"]) for row in answer["matches"]] == [("pod-a", "pod-a")]
    answer = asked(api, "pod-a:8000", "http://pod-a:1")
    assert [(row["instance"], row["candidate"]) for row in answer["matches"]] == [("pod-a", "pod-a:8000")]


def test_names_follow_registrations(api: Api) -> None:
    add(api, "old", "tcp://10.0.0.1:5557")
    assert meant(api, "10.0.0.1") == {"10.0.0.1": "old"}
    api.fleet.unregister("old")
    add(api, "new", "tcp://10.0.0.1:5557")
    assert meant(api, "10.0.0.1") == {"10.0.0.1": "new"}
    add(api, "too", "tcp://10.0.0.1:5558")
    assert asked(api, "10.0.0.1")["ambiguous_candidates"] == {"10.0.0.1": ["new", "too"]}


def test_trap_27_names_of_other_tenants_models_and_salts_mean_nobody(api: Api) -> None:
    add(api, "theirs", "tcp://10.0.0.1:5557", tenant="other", aliases=("box",))
    add(api, "salted", "tcp://10.0.0.1:5558", additional_salt="pepper", aliases=("box",))
    add(api, "model", "tcp://10.0.0.1:5559", model="n", aliases=("box",))
    add(api, "mine", "tcp://10.0.0.1:5560", aliases=("box",))
    for name in ("box", "10.0.0.1"):
        assert asked(api, name)["ambiguous_candidates"] == {name: ["salted", "mine"]}
        assert meant(api, name, additional_salt="") == {name: "mine"}
        assert meant(api, name, additional_salt="pepper") == {name: "salted"}
        assert meant(api, name, tenant="other") == {name: "theirs"}
    assert asked(api, "theirs")["unknown_candidates"] == ["theirs"]


def test_a_block_size_leaves_only_instances_that_have_it(api: Api) -> None:
    add(api, "small", "tcp://10.0.0.1:5557")
    api.fleet.register(SourceSpec(instance="large", model="m", block_size=8, endpoint="tcp://10.0.0.1:5558"))
    assert "10.0.0.1" in asked(api, "10.0.0.1")["ambiguous_candidates"]
    assert meant(api, "10.0.0.1", block_size=8) == {"10.0.0.1": "large"}


def test_stores_and_our_own_addresses_are_nobodys_names() -> None:
    with serving(bind_endpoints=("tcp://10.0.0.1:5557",)) as api:
        add(api, "dials-in", "tcp://10.0.0.1:5557", topic="x", aliases=("pod-x",))
        add(api, "s3", "tcp://10.0.0.2:5557", type="store", tier="remote", readers=("*",), aliases=("bucket",))
        assert asked(api, "10.0.0.1", "10.0.0.2", "s3", "bucket")["matches"] == []
        assert meant(api, "pod-x") == {"pod-x": "dials-in"}


def test_aliases_are_registered_in_every_way(api: Api) -> None:
    body = {
        "instance_id": "pod-a",
        "endpoint": "tcp://10.0.0.1:5557",
        "modelname": "m",
        "block_size": 4,
        "aliases": ["llm-0", "10.0.0.1:8000"],
    }
    api.post("/register", body)
    api.post("/register", body)
    assert meant(api, "llm-0") == {"llm-0": "pod-a"}
    assert api.refused("/register", {**body, "aliases": ["llm-1"]})[:2] == (409, "conflict")
    for wrong in ([""], ["x" * 2000], "llm-0", ["x"] * 65):
        assert api.refused("/register", {**body, "aliases": wrong})[0] == 422
    text = "instance=pod-a,model=m,block_size=4,endpoint=tcp://10.0.0.1:5557,aliases="
    assert parse_source(text + "llm-0+10.0.0.1:8000").aliases == ("llm-0", "10.0.0.1:8000")
    values = {"instance": "pod-a", "model": "m", "block_size": 4, "endpoint": "tcp://10.0.0.1:5557"}
    assert source_of({**values, "aliases": ["llm-0"]}, "source").aliases == ("llm-0",)
    with pytest.raises(SettingsError, match="aliases"):
        source_of({**values, "aliases": [""]}, "source")


@pytest.mark.parametrize(
    ("name", "address", "bare"),
    [
        ("10.0.0.1:8000", Address("10.0.0.1", 8000), None),
        ("10.0.0.1", None, Address("10.0.0.1", None)),
        ("http://10.0.0.1:8000/v1", Address("10.0.0.1", 8000), None),
        ("https://Host", Address("host", 443), None),
        ("tcp://host:1", Address("host", 1), None),
        ("fd00::1", None, Address("fd00::1", None)),
        ("[fd00::1]:8", Address("fd00::1", 8), None),
        ("[fd00::1]", None, Address("fd00::1", None)),
        ("http://[FD00::1]:8/", Address("fd00::1", 8), None),
        ("pod-a", None, Address("pod-a", None)),
        ("host:x", None, None),
        ("host:99999", None, None),
        ("host:8/x", None, None),
        ("a/b", None, None),
        ("http://", None, None),
        (":80", None, None),
        ("[x", None, None),
        ("http://[", None, None),
        ("", None, None),
    ],
)
def test_what_is_an_address(name: str, address: Address | None, bare: Address | None) -> None:
    assert address_of(name) == address
    assert address_of(name, bare=True) == (address or bare)


def test_p7_what_is_remembered_of_spellings_is_bounded(api: Api) -> None:
    add(api, "pod-a", "tcp://10.0.0.1:5557")
    identities = Identities(api.fleet)
    family = ("default", "m", None)
    names = [f"nobody-{number}" for number in range(MAX_REMEMBERED + 10)]
    assert identities.resolve(names, family, {"pod-a"}).unknown == names
    (table,) = identities._tables.values()
    assert 0 < len(table._remembered) <= MAX_REMEMBERED
    assert identities.resolve(["10.0.0.1"], family, {"pod-a"}).spelled == {"pod-a": "10.0.0.1"}


def test_aliases_survive_in_the_directory_of_sources() -> None:
    """What one replica was told, all know; a registration without aliases is written as it always was."""
    spec = SourceSpec(instance="pod-a", model="m", block_size=4, endpoint="tcp://10.0.0.1:5557", aliases=("a", "b"))
    assert unpack_spec(pack_spec(spec)) == spec
    assert b"aliases" not in pack_spec(replace(spec, aliases=()))
