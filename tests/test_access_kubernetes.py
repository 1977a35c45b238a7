"""Tokens that Kubernetes confirms: who comes in, how often the API server is asked, and what its faults mean."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from api_server import Api, error, serving, until
from authority import Authority
from kvindexer.access import reviews as reviews_module
from kvindexer.access.errors import ForbiddenError
from kvindexer.access.guard import open_guard
from kvindexer.access.identity import Grant
from kvindexer.access.reviews import granted
from kvindexer.errors import SettingsError
from kvindexer.settings import Settings
from token_reviews import TokenReviews

AUDIENCE: Final = "kvindexer"
SCHEDULER: Final = "system:serviceaccount:llm:scheduler"
ROLES: Final = {
    SCHEDULER: ["query"],
    "system:serviceaccounts:team-a": {"roles": ["query"], "tenant": "a"},
    "readers": ["query"],
    "writers": ["register"],
}
USERS: Final[dict[str, tuple[str, list[str]]]] = {
    "of-the-scheduler": (SCHEDULER, ["system:serviceaccounts", "system:authenticated"]),
    "of-team-a": ("system:serviceaccount:team-a:x", ["system:serviceaccounts:team-a"]),
    "of-nobody": ("system:serviceaccount:other:x", ["system:serviceaccounts:other"]),
    "of-both": ("jane", ["readers", "writers"]),
    "of-two-tenants": ("joe", ["readers", "system:serviceaccounts:team-a"]),
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("kubernetes"))


@contextmanager
def cluster(authority: Authority, folder: Path, **settings: Any) -> Iterator[tuple[Api, TokenReviews]]:
    """An API server, and a service that asks it."""
    context = authority.serving(authority.issue("api", "127.0.0.1"))
    token = folder / "token"
    token.write_text("ours\n")
    chosen = {
        "auth_kubernetes_audience": AUDIENCE,
        "auth_kubernetes_roles": ROLES,
        "auth_kubernetes_token_file": str(token),
        "auth_kubernetes_ca_file": str(authority.file),
        **settings,
    }
    with (
        TokenReviews(context, dict(USERS), AUDIENCE) as reviews,
        serving(**{"auth_kubernetes_api": reviews.url, **chosen}) as api,
    ):
        yield api, reviews


def ask(api: Api, token: str, path: str = "/v1/sources") -> httpx.Response:
    return api.client.get(path, headers={"authorization": f"Bearer {token}"})


def jwt(**claims: Any) -> str:
    """A token that says something of itself; nobody has signed it."""
    parts = ({"alg": "RS256"}, claims, {"signature": "none"})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)


def test_users_and_groups_have_their_roles(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        api.add("a-pod", tenant="a")
        api.add("other-pod")
        assert {row["instance"] for row in ask(api, "of-the-scheduler").json()["sources"]} == {"a-pod", "other-pod"}
        assert [row["instance"] for row in ask(api, "of-team-a").json()["sources"]] == ["a-pod"]
        spec = {"instance_id": "a-pod", "tenant_id": "a"}
        for token, status in (("of-the-scheduler", 403), ("of-both", 200)):
            headers = {"authorization": f"Bearer {token}"}
            assert api.client.post("/unregister", json=spec, headers=headers).status_code == status
        assert reviews.asked[0]["spec"] == {"token": "of-the-scheduler", "audiences": [AUDIENCE]}


def test_who_has_no_role_is_told_so_by_name(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, _):
        response = ask(api, "of-nobody")
        assert error(response)[:2] == (403, "no_role")
        assert "system:serviceaccount:other:x" in response.text
        assert error(ask(api, "of-two-tenants"))[:2] == (403, "no_role")


def test_a_token_that_kubernetes_refuses_is_refused_and_not_asked_about_again(
    authority: Authority, tmp_path: Path
) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        for _ in range(5):
            response = ask(api, "made-up")
            assert error(response)[:2] == (401, "unauthenticated")
            assert "made-up" not in response.text
        assert len(reviews.asked) == 1
        assert api.client.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("audiences", [None, [], ["https://kubernetes.default.svc"]])
def test_a_token_for_others_is_refused_whatever_kubernetes_thinks_of_it(
    authority: Authority, tmp_path: Path, audiences: list[str] | None
) -> None:
    """An API server that knows no audiences confirms tokens for itself."""
    with cluster(authority, tmp_path) as (api, reviews):
        reviews.audiences = audiences
        response = ask(api, "of-the-scheduler")
        assert error(response)[:2] == (401, "unauthenticated")
        assert "audience" in response.text


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"exp": 1_000_000_000, "aud": [AUDIENCE]}, "expired"),
        ({"exp": 9_000_000_000, "aud": ["vault"]}, "audience"),
        ({"exp": 9_000_000_000, "aud": "vault"}, "audience"),
    ],
)
def test_what_a_token_says_against_itself_is_believed_without_asking(
    authority: Authority, tmp_path: Path, claims: dict[str, Any], said: str
) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        response = ask(api, jwt(**claims))
        assert error(response)[:2] == (401, "unauthenticated")
        assert said in response.text
        assert not reviews.asked


def test_what_a_token_says_for_itself_is_not_believed(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        for token in (jwt(exp=9_000_000_000, aud=[AUDIENCE], sub=SCHEDULER), "a.b.c", jwt(exp="soon"), "..", "a.!.c"):
            assert error(ask(api, token))[:2] == (401, "unauthenticated")
        assert len(reviews.asked) == 5


def test_a_confirmed_token_needs_no_new_confirmation_for_a_while(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path, auth_kubernetes_cache_s=0.1) as (api, reviews):
        until_s = time.monotonic() + 20
        while len(reviews.asked) < 3 and time.monotonic() < until_s:
            assert ask(api, "of-the-scheduler").status_code == 200
        assert len(reviews.asked) == 3
    with cluster(authority, tmp_path) as (api, reviews):
        for _ in range(20):
            assert ask(api, "of-the-scheduler").status_code == 200
        assert len(reviews.asked) == 1


def test_a_confirmation_lasts_no_longer_than_its_token(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        token = jwt(exp=time.time() + 0.8, aud=[AUDIENCE])
        reviews.users[token] = USERS["of-the-scheduler"]
        assert ask(api, token).status_code == 200
        until(lambda: ask(api, token).status_code == 401)
        assert "expired" in ask(api, token).text
        assert len(reviews.asked) == 1


def test_so_many_tokens_are_remembered(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path, auth_kubernetes_cache_tokens=2) as (api, reviews):
        assert api.access.guard is not None
        known = api.access.guard._reviews
        assert known is not None
        for number in range(5):
            ask(api, f"made-up-{number}")
            assert len(known) <= 2
        ask(api, "made-up-0")
        assert len(reviews.asked) == 6


def test_who_comes_with_the_same_token_waits_for_one_answer(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, reviews), ThreadPoolExecutor(20) as pool:
        reviews.gate.clear()
        answers = [pool.submit(ask, api, "of-the-scheduler") for _ in range(20)]
        until(lambda: reviews.under_way == 1)
        reviews.gate.set()
        assert {answer.result().status_code for answer in answers} == {200}
        assert len(reviews.asked) == 1


def test_a_flood_of_made_up_tokens_is_no_flood_at_the_api_server(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, count = 3, 12
    monkeypatch.setattr(reviews_module, "MAX_UNDER_WAY", most)
    with (
        cluster(authority, tmp_path, auth_kubernetes_timeout_s=20) as (api, reviews),
        ThreadPoolExecutor(count) as pool,
    ):
        assert ask(api, "of-the-scheduler").status_code == 200
        reviews.gate.clear()
        answers = [pool.submit(ask, api, f"made-up-{number}") for number in range(count)]
        until(lambda: sum(answer.done() for answer in answers) >= count - most)
        shed = [answer.result() for answer in answers if answer.done()]
        assert {error(response)[:2] for response in shed} == {(503, "auth_unavailable")}
        assert all(response.headers["retry-after"] for response in shed)
        assert ask(api, "of-the-scheduler").status_code == 200, "who is known comes in all the while"
        reviews.gate.set()
        assert reviews.most_under_way <= most


FAULTS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "no right": ({"status": 403}, "tokenreviews.authentication.k8s.io"),
    "own token refused": ({"own_token": "another"}, "our own token"),
    "a fault of its own": ({"status": 500}, "answered 500"),
    "busy": ({"status": 429}, "answered 429"),
    "no review": ({"garbage": True}, "no TokenReview"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_api_server_lets_nobody_in_and_is_not_the_callers_fault(
    authority: Authority, tmp_path: Path, fault: str
) -> None:
    """And it ends by itself; /health says meanwhile what is wrong."""
    change, said = FAULTS[fault]
    with cluster(authority, tmp_path) as (api, reviews):
        good = {name: getattr(reviews, name) for name in change}
        for name, value in change.items():
            setattr(reviews, name, value)
        response = ask(api, "of-the-scheduler")
        assert error(response)[:2] == (503, "auth_unavailable")
        assert response.headers["retry-after"]
        assert api.client.get("/health").json()["status"] == "degraded"
        assert api.access.guard is not None
        (problem,) = api.access.guard.problems()
        assert said in f"{problem.message} {problem.hint}"
        for name, value in good.items():
            setattr(reviews, name, value)
        assert ask(api, "of-the-scheduler").status_code == 200
        assert ask(api, "of-the-scheduler", "/health").json()["status"] == "ok"


def test_an_api_server_that_is_away_lets_nobody_in_for_longer_than_was_confirmed(
    authority: Authority, tmp_path: Path
) -> None:
    with cluster(authority, tmp_path, auth_kubernetes_cache_s=0.3) as (api, reviews):
        assert ask(api, "of-the-scheduler").status_code == 200
        reviews.close()
        assert error(ask(api, "of-team-a"))[:2] == (503, "auth_unavailable")
        until(lambda: ask(api, "of-the-scheduler").status_code == 503)


def test_an_api_server_that_is_slow_is_not_waited_for(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path, auth_kubernetes_timeout_s=0.2) as (api, reviews):
        reviews.gate.clear()
        response = ask(api, "of-the-scheduler")
        assert error(response)[:2] == (503, "auth_unavailable")
        assert "0.2 s" in response.text


def test_an_api_server_of_another_authority_is_not_told_any_token(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority(tmp_path, "foreign")
    with cluster(authority, tmp_path, auth_kubernetes_ca_file=str(foreign.file)) as (api, reviews):
        assert error(ask(api, "of-the-scheduler"))[:2] == (503, "auth_unavailable")
        assert not reviews.asked
        foreign.file.write_bytes(authority.file.read_bytes())
        assert ask(api, "of-the-scheduler").status_code == 200, "the file is read again"


def test_our_own_token_is_read_again_when_it_changes(authority: Authority, tmp_path: Path) -> None:
    with cluster(authority, tmp_path) as (api, reviews):
        assert ask(api, "of-the-scheduler").status_code == 200
        reviews.own_token = "renewed"
        assert ask(api, "of-team-a").status_code == 503
        (tmp_path / "token").write_text("renewed")
        assert ask(api, "of-team-a").status_code == 200


def test_tokens_of_the_file_come_in_without_kubernetes(authority: Authority, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    entry = {"name": "x", "token": "of-the-file-0123456789", "roles": ["query"]}
    tokens.write_text(yaml.safe_dump({"tokens": [entry]}))
    with cluster(authority, tmp_path, auth_tokens_file=str(tokens)) as (api, reviews):
        assert ask(api, "of-the-file-0123456789").status_code == 200
        assert not reviews.asked
        assert ask(api, "of-the-scheduler").status_code == 200


def test_a_user_s_own_entry_wins_over_those_of_its_groups() -> None:
    grants = {
        "joe": Grant(frozenset({"query"}), "b"),
        "g": Grant(frozenset({"query"}), "a"),
        "h": Grant(frozenset({"register"}), "a"),
        "i": Grant(frozenset({"query"}), "a", "salt"),
    }
    assert granted("joe", ["g"], grants).tenant == "b"
    assert granted("jane", ["g", "h"], grants) == Grant(frozenset({"query", "register"}), "a")
    for groups in (["g", "i"], [], ["unknown"]):
        with pytest.raises(ForbiddenError):
            granted("jane", groups, grants)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"auth_kubernetes_token_file": "/none"}, "auth_kubernetes_token_file"),
        ({"auth_kubernetes_ca_file": "/none"}, "auth_kubernetes_ca_file"),
        ({"auth_kubernetes_api": ""}, "auth_kubernetes_api"),
    ],
)
def test_what_is_missing_is_named_at_the_start(
    authority: Authority, tmp_path: Path, change: dict[str, str], key: str
) -> None:
    token = tmp_path / "token"
    token.write_text("ours")
    chosen: dict[str, Any] = {
        "auth_kubernetes_audience": AUDIENCE,
        "auth_kubernetes_roles": ROLES,
        "auth_kubernetes_token_file": str(token),
        "auth_kubernetes_ca_file": str(authority.file),
        "auth_kubernetes_api": "https://127.0.0.1:1",
    }
    with pytest.raises(SettingsError) as caught:
        open_guard(Settings(**{**chosen, **change}), {})
    assert caught.value.key == key
    assert open_guard(Settings(**{**chosen, "auth_kubernetes_api": ""}), {"KUBERNETES_SERVICE_HOST": "fd00::1"})
