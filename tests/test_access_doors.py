"""Every door: each route with each role, with every kind of wrong credential, and for callers of one tenant."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from api_server import Api, error, serving
from kvindexer.access.doors import DOORS
from kvindexer.access.identity import ROLES
from kvindexer.api import changes
from kvindexer.events.finding import FindingFigures, FindingProblem
from kvindexer.events.sources import Registry
from tokenizing import IDS, ids, make_tokenizer

TEXT: Final = "the quick brown fox jumps over the dog the quick brown"
TOKENS: Final = [IDS["<s>"], *ids(TEXT)]
SECRETS: Final = {
    "query": "query-0123456789abcdef",
    "register": "register-0123456789abcdef",
    "admin": "admin-0123456789abcdef",
    "of-a": "of-a-0123456789abcdef",
    "salted": "salted-0123456789abcdef",
    "expired": "expired-0123456789abcdef",
}
ENTRIES: Final[list[dict[str, Any]]] = [
    {"name": "query", "token": SECRETS["query"], "roles": ["query"]},
    {"name": "register", "sha256": sha256(SECRETS["register"].encode()).hexdigest(), "roles": ["register"]},
    {"name": "admin", "token": SECRETS["admin"], "roles": ["admin"]},
    {"name": "of-a", "token": SECRETS["of-a"], "roles": ["query", "register"], "tenant": "a"},
    {"name": "salted", "token": SECRETS["salted"], "roles": ["query"], "tenant": "a", "cache_salt": "team"},
    {"name": "expired", "token": SECRETS["expired"], "roles": ["admin"], "expires": "2020-01-31T00:00:00Z"},
]
QUESTION: Final = {"model": "m", "tokens": TOKENS}

# What is asked of each route; `tenant` is where it reads the tenant.
POSTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "/v1/match": ("tenant", QUESTION),
    "/v1/match/batch": ("tenant", {"model": "m", "prompts": [{"tokens": TOKENS}]}),
    "/v1/keys": ("tenant", QUESTION),
    "/v1/explain": ("tenant", QUESTION),
    "/v1/routed": ("tenant", {**QUESTION, "instance": "own-pod"}),
    "/v1/feedback": ("tenant", {"instance": "own-pod", "predicted_tokens": 8, "cached_tokens": 8}),
    "/v1/blocks/locate": ("tenant", {"model": "m", "keys": [1, 2]}),
    "/v1/offload/plan": ("tenant", {"model": "m", "instance": "own-pod", "tier": "gpu", "hashes": [1000, 1001]}),
    "/query": ("tenant_id", {"model": "m", "token_ids": TOKENS}),
    "/query_by_hash": ("tenant_id", {"model": "m", "seq_hashes": [1, 2]}),
    "/register": (
        "tenant_id",
        {"instance_id": "new-pod", "endpoint": "tcp://new-pod:5557", "model": "m", "block_size": 4},
    ),
    "/unregister": ("tenant_id", {"instance_id": "new-pod"}),
    "/score_completions": ("", {"model": "m", "prompt": TEXT}),
    "/score_chat_completions": ("", {"model": "m", "messages": [{"role": "user", "content": TEXT}]}),
}
GETS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "/v1/changes": ("tenant", {"model": "m"}),
    "/v1/heat/prefixes": ("tenant", {"model": "m"}),
    "/v1/heat/single": ("tenant", {"model": "m"}),
    "/v1/heat/prewarm": ("tenant", {"model": "m", "instance": "other"}),
    "/v1/sources": ("tenant", {}),
    "/v1/tiers": ("tenant", {}),
    "/workers": ("tenant_id", {}),
    "/metrics": ("", {}),
    "/health": ("", {}),
    "/ready": ("", {}),
    "/docs": ("", {}),
    "/openapi.json": ("", {}),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Two tenants that hold the same prompts of the same model."""
    folder = tmp_path_factory.mktemp("access")
    path = folder / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": ENTRIES}))
    path.chmod(0o600)
    tokenizers = {"m": {"path": str(make_tokenizer(folder / "tokenizer"))}}
    with serving(auth_tokens_file=str(path), tokenizers=tokenizers) as running:
        for tenant in ("default", "a", "b"):
            source = running.add(f"{tenant}-pod", tenant=tenant)
            running.store(source, TOKENS)
        yield running


def as_caller(name: str | None) -> dict[str, str]:
    return {} if name is None else {"authorization": f"Bearer {SECRETS.get(name, name)}"}


def ask(api: Api, path: str, name: str | None, **named: str) -> httpx.Response:
    """Ask a route in the way that it answers; of a stream, what comes until it is at its first position."""
    headers = as_caller(name)
    if path in POSTS:
        field, body = POSTS[path]
        tenant = {field: named["tenant"]} if named else {}
        if body.get("instance") == "own-pod":
            body = {**body, "instance": f"{'a' if name in ('of-a', 'salted') else 'default'}-pod"}
        return api.client.post(path, json={**body, **tenant}, headers=headers)
    field, query = GETS.get(path, ("", {}))
    parameters = {**query, **({field: named["tenant"]} if named else {})}
    with api.client.stream("GET", path, params=parameters, headers=headers) as response:
        if response.status_code == 200 and path == "/v1/changes":
            text = ""
            for piece in response.iter_text():
                text += piece
                if "event: position" in text:
                    return httpx.Response(200, text=text)
        response.read()
        return response


def test_every_route_has_a_door_and_every_door_a_route(api: Api) -> None:
    """And the tests below ask every route."""
    described = set(ask(api, "/openapi.json", "admin").json()["paths"])
    assert described | {"/docs", "/openapi.json"} == set(DOORS)
    assert POSTS.keys() | GETS.keys() == DOORS.keys()


def test_the_table_of_doors_is_the_one_that_was_decided() -> None:
    """Written down twice on purpose: who opens a door has to say so here, too."""

    def those(**fields: Any) -> set[str]:
        return {path for path, door in DOORS.items() if all(getattr(door, name) == of for name, of in fields.items())}

    assert those(role=None) == {"/health", "/ready"}
    assert those(role="register") == {"/register", "/unregister"}
    assert len(those(role="query")) == len(DOORS) - 4
    assert those(shows="every tenant") == {"/metrics"}
    assert those(shows="every salt") == {
        "/query_by_hash",
        "/v1/blocks/locate",
        "/v1/offload/plan",
        "/v1/changes",
        "/v1/heat/prefixes",
        "/v1/heat/single",
        "/v1/heat/prewarm",
    }


@pytest.mark.parametrize("path", DOORS)
def test_a_door_opens_to_its_role_and_to_no_other(api: Api, path: str) -> None:
    if path == "/unregister":
        assert ask(api, "/register", "admin").status_code == 200
    door = DOORS[path]
    for role in ROLES:
        if path == "/unregister" and role == "admin":
            ask(api, "/register", "admin")
        response = ask(api, path, role)
        if door.role in (None, role) or role == "admin":
            assert response.status_code == 200, (role, response.text)
        else:
            status, code, hint = error(response)
            assert (status, code) == (403, "no_role")
            assert role in hint


@pytest.mark.parametrize("path", [path for path, door in DOORS.items() if door.role])
@pytest.mark.parametrize("credential", [None, "expired", "a-token-that-nobody-has"])
def test_a_door_is_shut_to_those_who_are_not_known(api: Api, path: str, credential: str | None) -> None:
    """Whatever was presented stands in no answer."""
    response = ask(api, path, credential)
    status, code, _ = error(response)
    assert (status, code) == (401, "unauthenticated")
    challenge = response.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="kvindexer"')
    assert ("invalid_token" in challenge) == (credential is not None)
    if credential is not None:
        assert SECRETS.get(credential, credential) not in response.text


def test_an_expired_token_is_told_apart_from_one_that_nobody_has(api: Api) -> None:
    def said(name: str) -> str:
        return str(ask(api, "/v1/sources", name).json()["error"]["message"])

    assert "expired" in said("expired")
    assert "not known" in said("a-token-that-nobody-has")


@pytest.mark.parametrize("value", ["", "Bearer", "Basic cTpx", "Bearer\tx", "bearer " + "x" * 20_000, "Bearer ü"])
def test_a_header_that_is_no_bearer_token_is_refused(api: Api, value: str) -> None:
    response = api.client.get("/v1/sources", headers=[(b"authorization", value.encode("latin-1"))])
    assert error(response)[0] == 401


def test_two_authorization_headers_are_one_too_many(api: Api) -> None:
    """A proxy may have looked at the other one."""
    good = as_caller("admin")["authorization"]
    response = api.client.get("/v1/sources", headers=[("authorization", "Bearer x"), ("authorization", good)])
    assert error(response)[0] == 401


@pytest.mark.parametrize(
    "path", ["/", "/v1/match/", "//v1/match", "/redoc", "/v1", "/Health", "/docs/oauth2-redirect"]
)
def test_what_has_no_door_is_not_there(api: Api, path: str) -> None:
    """And who is not known is not told so."""
    assert error(api.client.get(path, headers=as_caller("admin")))[0] == 404
    assert error(api.client.get(path))[0] == 401


@pytest.mark.parametrize("path", [path for path, door in DOORS.items() if door.role])
def test_another_method_is_no_way_in(api: Api, path: str) -> None:
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        assert api.client.request(method, path).status_code == 401


def test_health_names_nobody_to_those_who_are_not_known(api: Api) -> None:
    """A kubelet needs the status; names of instances and what is wrong with them need a role."""
    api.fleet.statuses["a-pod"] = api.fleet.status("a-pod")._replace(state="stale")
    try:
        anonymous, of_a, everything = (ask(api, "/health", name).json() for name in (None, "of-a", "query"))
        assert anonymous["status"] == of_a["status"] == "degraded"
        assert anonymous["problems"] == of_a["problems"] == []
        assert [problem["instance"] for problem in everything["problems"]] == ["a-pod"]
        assert ask(api, "/health", "wrong").status_code == 200
    finally:
        del api.fleet.statuses["a-pod"]


# Tenants

TENANT_ROUTES: Final = sorted(path for path, (field, _) in {**POSTS, **GETS}.items() if field)
BOUND: Final = sorted(path for path, door in DOORS.items() if door.role and door.shows != "every tenant")


@pytest.mark.parametrize("path", BOUND)
def test_a_caller_of_a_tenant_is_answered_about_its_own(api: Api, path: str) -> None:
    """Without a tenant in the request, and with the right one; nothing of other tenants is in any answer."""
    asked = [{}, {"tenant": "a"}] if path in TENANT_ROUTES else [{}]
    for named in asked:
        if path == "/unregister":
            assert ask(api, "/register", "of-a").status_code == 200
        response = ask(api, path, "of-a", **named)
        assert response.status_code == 200, response.text
        assert "b-pod" not in response.text
        assert "default-pod" not in response.text
        assert '"default"' not in response.text or path == "/openapi.json"
    if path == "/register":
        assert [spec.tenant for spec in api.fleet.specs() if spec.instance == "new-pod"] == ["a"]
        ask(api, "/unregister", "of-a")


@pytest.mark.parametrize("path", TENANT_ROUTES)
@pytest.mark.parametrize("other", ["b", "default", "A"])
def test_a_caller_of_a_tenant_may_not_name_another(api: Api, path: str, other: str) -> None:
    before = api.fleet.generation
    assert error(ask(api, path, "of-a", tenant=other))[:2] == (403, "other_tenant")
    assert api.fleet.generation == before


@pytest.mark.parametrize("name", ["query", "register", "admin"])
def test_callers_of_no_tenant_may_name_any(api: Api, name: str) -> None:
    path = "/register" if name == "register" else "/v1/match"
    for tenant in ("a", "b"):
        assert ask(api, path, name, tenant=tenant).status_code == 200
        ask(api, "/unregister", "admin", tenant=tenant)


@pytest.mark.parametrize("path", ["/v1/match", "/v1/match/batch", "/v1/explain", "/query", "/v1/blocks/locate"])
def test_a_tenant_finds_its_own_blocks(api: Api, path: str) -> None:
    """So the silence about others is not the silence of an empty index."""
    if path == "/v1/blocks/locate":
        keys = ask(api, "/v1/keys", "of-a").json()["keys"]
        response = api.client.post(path, json={"model": "m", "keys": keys}, headers=as_caller("of-a"))
    else:
        response = ask(api, path, "of-a")
    assert "a-pod" in response.text
    assert "b-pod" not in response.text


@pytest.mark.parametrize("form", [{"instance_id": 7}, {"instance_id": "b-pod"}])
def test_a_tenant_unregisters_nothing_of_others(api: Api, form: dict[str, Any]) -> None:
    """Also in Dynamo's dialect, which otherwise means all tenants."""
    api.add("7", tenant="b")
    before = api.fleet.generation
    response = api.client.post("/unregister", json=form, headers=as_caller("of-a"))
    assert error(response)[:2] == (404, "unknown_instance")
    assert api.fleet.generation == before
    api.fleet.unregister("7")


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "tcp://b-pod:5557"},
        {"replay_endpoint": "tcp://b-pod:5557"},
        {"instance_id": "b-pod"},
    ],
)
def test_a_tenant_takes_nothing_of_others_and_learns_nothing_about_it(api: Api, change: dict[str, Any]) -> None:
    body = {**POSTS["/register"][1], **change}
    response = api.client.post("/register", json=body, headers=as_caller("of-a"))
    status, code, _ = error(response)
    assert (status, code) == (409, "conflict")
    assert "tenant 'b'" not in response.text
    assert "block_size" not in response.text


def test_figures_of_the_whole_service_are_for_those_who_see_all_of_it(api: Api) -> None:
    own, everything = (ask(api, "/v1/sources", name).json()["totals"] for name in ("of-a", "query"))
    assert (own["events"], own["queries"]) == (None, None)
    assert everything["blocks"] == 3 * own["blocks"] > 0
    assert error(ask(api, "/metrics", "of-a"))[:2] == (403, "not_scoped")


def test_near_spellings_and_other_models_are_those_of_the_own_tenant(api: Api) -> None:
    api.add("default-other", model="secret-model")
    api.add("a-other", tenant="a", model="open-model")
    try:
        asked = {"model": "secret-mode", "tokens": TOKENS}
        answer = api.client.post("/v1/explain", json=asked, headers=as_caller("of-a")).json()
        assert (answer["reason"], answer.get("near_models", [])) == ("unknown_model", [])
        asked = {"model": "open-mode", "tokens": TOKENS}
        answer = api.client.post("/v1/explain", json=asked, headers=as_caller("of-a")).json()
        assert answer["near_models"] == ["open-model"]
        asked = {**QUESTION, "candidates": ["default-other", "a-other"]}
        answer = api.client.post("/v1/explain", json=asked, headers=as_caller("of-a")).json()
        reasons = {row["candidate"]: row["reason"] for row in answer["unknown_candidates"]}
        assert reasons == {"default-other": "not_registered", "a-other": "other_model"}
    finally:
        api.fleet.unregister("default-other")
        api.fleet.unregister("a-other")


@pytest.mark.parametrize("path", ["/v1/match", "/v1/explain"])
def test_aliases_are_those_of_the_own_tenant(api: Api, path: str) -> None:
    api.add("a-named", tenant="a", aliases=("ours",))
    api.add("b-named", tenant="b", aliases=("theirs",))
    try:
        asked = {**QUESTION, "candidates": ["ours", "theirs"]}
        answer = api.client.post(path, json=asked, headers=as_caller("of-a")).json()
        assert "a-named" in str(answer)
        assert "b-named" not in str(answer)
    finally:
        api.fleet.unregister("a-named")
        api.fleet.unregister("b-named")


def test_what_discovery_lacks_is_for_those_who_see_all_tenants(api: Api) -> None:
    """Pods have names, too."""
    problem = FindingProblem("no_port", "llm/pod-of-somebody", "it names no port", "name one")
    api.fleet.found = FindingFigures(kind="kubernetes", pods=1, problems=[problem])
    try:
        for path in ("/v1/sources", "/health"):
            assert "pod-of-somebody" in ask(api, path, "query").text
            for name in ("of-a", *([None] if path == "/health" else [])):
                assert "pod-of-somebody" not in ask(api, path, name).text
    finally:
        api.fleet.found = FindingFigures()


def test_who_follows_changes_is_asked_again_who_he_is(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is taken away ends what it began."""
    monkeypatch.setattr(changes, "KNOWN_FOR_S", 0.0)
    with api.client.stream("GET", "/v1/changes", params={"model": "m"}, headers=as_caller("of-a")) as response:
        text = response.read().decode()
    assert 'event: end\ndata: {"code":"ask_again"}' in text


# Cache salts


def matched(api: Api, name: str, path: str = "/v1/match", **fields: Any) -> int:
    body = {**QUESTION, **fields}
    response = api.client.post(path, json=body, headers=as_caller(name))
    assert response.status_code == 200, response.text
    return max((int(row["matched_tokens"]) for row in response.json()["matches"]), default=0)


def test_a_salted_caller_finds_prompts_of_its_own_salts_alone(api: Api) -> None:
    """As engines hash them: the salt is the one that the engine was given, word for word."""
    tokens = list(range(100, 112))
    keys = [["team:x"], None, None]
    source = api.add("salty", tenant="a")
    api.store(source, tokens, first=7, extra_keys=keys)
    assert matched(api, "salted", tokens=tokens) == 0
    assert matched(api, "salted", tokens=tokens, cache_salt="team:x") == 12
    assert matched(api, "of-a", tokens=tokens, cache_salt="team:x") == 12
    for other in ("teams", "other", "team-x", "Team:x"):
        body = {**QUESTION, "cache_salt": other}
        for path in ("/v1/match", "/v1/keys", "/v1/explain"):
            response = api.client.post(path, json=body, headers=as_caller("salted"))
            assert error(response)[:2] == (403, "other_cache_salt")
    of_rfc = {"model": "m", "token_ids": tokens, "cache_salt": "other"}
    assert error(api.client.post("/query", json=of_rfc, headers=as_caller("salted")))[:2] == (403, "other_cache_salt")
    api.fleet.unregister("salty")


def test_texts_of_a_salted_caller_are_held_to_its_salt_too(api: Api) -> None:
    body = {"model": "m", "prompt": TEXT}
    for caller, found in (("of-a", {"a-pod": 3.0}), ("salted", {})):
        answer = api.client.post("/score_completions", json=body, headers=as_caller(caller))
        assert answer.json() == found
    refused = {**body, "cache_salt": "other"}
    for path, more in (
        ("/v1/match", {}),
        ("/v1/keys", {}),
        ("/v1/explain", {}),
        ("/v1/routed", {"instance": "a-pod"}),
    ):
        response = api.client.post(path, json={**refused, **more}, headers=as_caller("salted"))
        assert error(response)[:2] == (403, "other_cache_salt")
    prompts = {"model": "m", "prompts": [{"tokens": TOKENS, "cache_salt": salt} for salt in ("other", "team:x")]}
    first, second = api.client.post("/v1/match/batch", json=prompts, headers=as_caller("salted")).json()["results"]
    assert first["error"]["code"] == "other_cache_salt"
    assert "error" not in second
    routed = {**QUESTION, "instance": "a-pod", "cache_salt": "other"}
    response = api.client.post("/v1/routed", json=routed, headers=as_caller("salted"))
    assert error(response)[:2] == (403, "other_cache_salt")


def test_without_a_salt_a_salted_caller_has_its_own(api: Api) -> None:
    assert matched(api, "of-a") == 12
    assert matched(api, "salted") == 0
    plain, salted = (ask(api, "/v1/keys", name).json()["keys"] for name in ("of-a", "salted"))
    assert plain != salted
    asked = {**QUESTION, "cache_salt": "team"}
    assert api.client.post("/v1/keys", json=asked, headers=as_caller("of-a")).json()["keys"] == salted


@pytest.mark.parametrize("path", sorted(path for path, door in DOORS.items() if door.shows != "own"))
def test_what_shows_blocks_of_every_salt_is_shut_to_salted_callers(api: Api, path: str) -> None:
    assert error(ask(api, path, "salted"))[:2] == (403, "not_scoped")


@pytest.mark.parametrize("path", ["/v1/match", "/v1/explain", "/v1/routed", "/v1/match/batch"])
def test_keys_don_t_show_their_salt_so_salted_callers_can_t_give_them(api: Api, path: str) -> None:
    keys = {"keys": [1]}
    body: dict[str, Any] = {"model": "m", "prompts": [keys]} if path.endswith("batch") else {"model": "m", **keys}
    if path == "/v1/routed":
        body["instance"] = "a-pod"
    response = api.client.post(path, json=body, headers=as_caller("salted"))
    if path.endswith("batch"):
        assert response.json()["results"][0]["error"]["code"] == "salt_unknown"
    else:
        assert error(response)[:2] == (403, "salt_unknown")


ODD: Final = (
    b"GET /%76%31/sources HTTP/1.1",
    b"GET http://x/v1/sources HTTP/1.1",
    b"GET /v1/sources?x=/health HTTP/1.1",
    b"GET /v1/sources#/health HTTP/1.1",
    b"GET /health/../v1/sources HTTP/1.1",
    b"GET //health HTTP/1.1",
    b"GET /health;x HTTP/1.1",
    b"GET /health%00 HTTP/1.1",
    b"GET /health%2f HTTP/1.1",
    b"GET /v1/sources HTTP/1.0",
    b"OPTIONS * HTTP/1.1",
)


@pytest.mark.parametrize("line", ODD)
def test_no_spelling_of_a_path_is_a_way_around(api: Api, line: bytes) -> None:
    with socket.create_connection(api.address, timeout=20) as connection:
        connection.sendall(line + b"\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


# Services of their own (from here on: they take the place of the one above)


def test_a_tenant_may_be_held_to_its_own_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": ENTRIES}))
    patterns = {"a": ["tcp://a-*"]}
    with serving(auth_tokens_file=str(path), auth_tenant_endpoints=patterns) as api:
        for endpoint, caller, status in (
            ("tcp://a-pod:5557", "of-a", 200),
            ("tcp://b-pod:5557", "of-a", 403),
            ("tcp://b-pod:5557", "register", 200),
        ):
            body = {**POSTS["/register"][1], "instance_id": caller, "endpoint": endpoint}
            assert api.client.post("/register", json=body, headers=as_caller(caller)).status_code == status
        body = {**POSTS["/register"][1], "endpoint": "tcp://a-1:5557", "replay_endpoint": "tcp://b-1:5657"}
        assert error(api.client.post("/register", json=body, headers=as_caller("of-a")))[0] == 403


def test_a_caller_that_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    """Each caller by itself; probes are not counted."""
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": ENTRIES}))
    with serving(auth_tokens_file=str(path), max_requests_per_s=0.01) as api:
        assert ask(api, "/v1/sources", "query").status_code == 200
        response = ask(api, "/v1/sources", "query")
        assert error(response)[:2] == (429, "too_many_requests")
        assert 1 <= int(response.headers["retry-after"]) <= 100
        assert ask(api, "/v1/sources", "admin").status_code == 200
        assert error(ask(api, "/v1/sources", None))[0] == 401
        assert error(ask(api, "/v1/sources", "a-guess"))[0] == 429, "guessing costs as much as asking"
        for _ in range(3):
            assert ask(api, "/health", None).status_code == 200


def test_an_endpoint_that_tenants_share_tells_none_of_the_others(tmp_path: Path) -> None:
    """Publishers that dial in are told apart by topic; whose the others are is nobody's business."""
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": ENTRIES}))
    shared = "tcp://127.0.0.1:45672"
    with serving(auth_tokens_file=str(path), bind_endpoints=[shared]) as api:
        api.fleet.registry = Registry(bind_endpoints=(shared,))
        body = {"instance_id": "x", "endpoint": shared, "model": "m", "block_size": 4, "topic": "t"}
        answers = []
        for caller, change in (
            ("register", {"tenant_id": "b"}),
            ("of-a", {"instance_id": "y", "topic": "u"}),
            ("of-a", {"instance_id": "z"}),
        ):
            answers.append(api.client.post("/register", json={**body, **change}, headers=as_caller(caller)))
        assert [answer.status_code for answer in answers] == [200, 200, 409]
        assert "'b'" not in answers[-1].text
        assert "tenant is" not in answers[-1].text


def test_without_names_callers_are_told_apart_by_their_addresses() -> None:
    with serving(max_requests_per_s=0.01) as api:
        assert api.client.get("/v1/sources").status_code == 200
        assert error(api.client.get("/v1/sources"))[0] == 429


def test_without_auth_nothing_is_asked_for() -> None:
    with serving() as api:
        assert api.client.get("/v1/sources", headers=as_caller("wrong")).status_code == 200
