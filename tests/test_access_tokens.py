"""The tokens file: what it may say, what happens when it changes, and limits by caller."""

from __future__ import annotations

import asyncio
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from api_server import Api, serving
from kvindexer.access.errors import UnauthenticatedError
from kvindexer.access.kept import Kept
from kvindexer.access.opening import open_access
from kvindexer.access.rates import Rates, network_of
from kvindexer.access.tokens import digest_of, look_up, read_tokens
from kvindexer.errors import SettingsError
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.access import is_loopback

TOKEN: Final = "a-token-of-the-test-0123456789"
GOOD: Final = {"name": "x", "token": TOKEN, "roles": ["query"]}


def write(path: Path, *entries: Any) -> Path:
    """Replace the file at once, as an operator should and Kubernetes does."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"tokens": list(entries)}))
    new.chmod(0o600)
    new.replace(path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read_tokens(path)
    assert caught.value.key.startswith("auth_tokens_file")
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_token_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    digest = sha256(TOKEN.encode()).hexdigest()
    for entry in (GOOD, {"name": "x", "sha256": digest.upper(), "roles": ["query"]}):
        tokens = read_tokens(write(tmp_path / "tokens", entry))
        assert list(tokens) == [bytes.fromhex(digest)]
        assert TOKEN not in repr(tokens)
        assert look_up(tokens, digest_of(TOKEN.encode()), 0.0) is tokens[bytes.fromhex(digest)].identity
        assert look_up(tokens, digest_of(TOKEN.encode() + b" "), 0.0) is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"token": TOKEN, "roles": ["query"]}, "name"),
        ({**GOOD, "name": "a b"}, "name"),
        ({**GOOD, "name": 7}, "name"),
        ({"name": "x", "roles": ["query"]}, "either token or sha256"),
        ({**GOOD, "sha256": "0" * 64}, "either token or sha256"),
        ({"name": "x", "sha256": "0" * 63, "roles": ["query"]}, "64 hexadecimal digits"),
        ({"name": "x", "sha256": TOKEN, "roles": ["query"]}, "64 hexadecimal digits"),
        ({**GOOD, "token": "short"}, "openssl rand"),
        ({**GOOD, "token": 1234567890123456789}, "openssl rand"),
        ({**GOOD, "token": TOKEN + " x"}, "without spaces"),
        ({"name": "x", "token": TOKEN}, "roles"),
        ({**GOOD, "roles": []}, "a list of roles"),
        ({**GOOD, "roles": "query"}, "a list of roles"),
        ({**GOOD, "roles": ["query", "query"]}, "a list of roles"),
        ({**GOOD, "roles": ["root"]}, "query, register, admin"),
        ({**GOOD, "tenant": ""}, "tenant"),
        ({**GOOD, "tenant": 7}, "in quotes"),
        ({**GOOD, "roles": ["admin"], "tenant": "a"}, "an admin sees everything"),
        ({**GOOD, "expires": "soon"}, "2027-01-31"),
        ({**GOOD, "expires": 7}, "2027-01-31"),
        ({**GOOD, "secret": TOKEN}, "one of name, token"),
        (TOKEN, "a map with name"),
    ],
)
def test_an_entry_that_makes_no_sense_is_named_and_its_token_is_not(tmp_path: Path, entry: object, said: str) -> None:
    message = refused(write(tmp_path / "tokens", {**GOOD, "name": "first", "token": "t" * 20}, entry))
    assert "tokens[1]" in message
    assert said in message


@pytest.mark.parametrize(
    "content", ["", "[]", "tokens:", "tokens: []", "tokens: {}", "other: 1", f"- {TOKEN}", f"tokens: [{TOKEN}"]
)
def test_a_file_that_is_no_list_of_tokens_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    refused(path)


@pytest.mark.parametrize("other", [{**GOOD, "name": "y"}, {**GOOD, "token": "t" * 20}])
def test_two_entries_share_neither_name_nor_token(tmp_path: Path, other: dict[str, Any]) -> None:
    assert "of its own" in refused(write(tmp_path / "tokens", GOOD, other))


@pytest.mark.parametrize(
    ("written", "until_s"),
    [("2027-01-31", 1801353600), ("2027-01-31 12:00:00", 1801396800), ("2027-01-31T12:00:00+02:00", 1801389600)],
)
def test_a_token_is_good_until_it_expires(tmp_path: Path, written: str, until_s: float) -> None:
    """In UTC unless it says otherwise; in quotes or not."""
    for text in (written, f'"{written}"'):
        path = tmp_path / "tokens"
        path.write_text(f"tokens: [{{name: x, token: {TOKEN}, roles: [query], expires: {text}}}]")
        tokens, digest = read_tokens(path), digest_of(TOKEN.encode())
        assert look_up(tokens, digest, until_s - 1) is not None
        with pytest.raises(UnauthenticatedError, match="expired"):
            look_up(tokens, digest, until_s)


# The file changes


def status(api: Api, token: str) -> int:
    return api.client.get("/v1/sources", headers={"authorization": f"Bearer {token}"}).status_code


def test_tokens_change_with_their_file_and_survive_its_faults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Looked at as the service does it once a second; here, once a step."""
    path = write(tmp_path / "tokens", GOOD)
    other = "another-token-0123456789"
    with serving(auth_tokens_file=str(path)) as api:
        assert api.access.guard is not None
        (kept,) = api.access.guard.rereads()

        def health() -> dict[str, Any]:
            kept.look()
            answer: dict[str, Any] = api.client.get("/health", headers={"authorization": f"Bearer {TOKEN}"}).json()
            return answer

        assert (status(api, TOKEN), status(api, other)) == (200, 401)
        write(path, GOOD, {**GOOD, "name": "y", "token": other})
        assert health()["status"] == "ok"
        assert (status(api, TOKEN), status(api, other)) == (200, 200)
        for fault in ("unreadable", "wrong", "gone"):
            if fault == "wrong":
                path.write_text("tokens: [{name: x}]")
            elif fault == "gone":
                path.unlink()
            else:
                path.unlink()
                path.mkdir()
            answer = health()
            assert answer["status"] == "degraded"
            (problem,) = answer["access"]
            assert problem["reason"] == "auth_tokens_file_unusable"
            assert (status(api, TOKEN), status(api, other)) == (200, 200)
            assert sum("stays in force" in record.message for record in caplog.records) == 1
            health()
            assert sum("stays in force" in record.message for record in caplog.records) == 1, "told once"
            caplog.clear()
            if fault == "unreadable":
                path.rmdir()
        write(path, {**GOOD, "name": "y", "token": other})
        kept.look()
        assert (status(api, TOKEN), status(api, other)) == (401, 200)
        assert api.client.get("/health").json()["status"] == "ok"
        assert TOKEN not in caplog.text


def test_a_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted secret: same length, same second."""
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        write(tmp_path / f"v{number}" / "tokens", {**GOOD, "name": f"v{number}"})
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "tokens").symlink_to("data/tokens")
    path = tmp_path / "tokens"
    kept = Kept("auth_tokens_file", [path], lambda: read_tokens(path))
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").replace(tmp_path / "data")
    kept.look()
    assert [known.identity.name for known in kept.value.values()] == ["v2"]


def test_a_file_that_was_not_well_is_tried_again_though_it_looks_the_same(tmp_path: Path) -> None:
    """Its rights may have changed, of which neither time nor size tells."""
    path = write(tmp_path / "tokens", GOOD)
    answers: list[SettingsError | None] = [None, SettingsError("auth_tokens_file", "x", "a readable file"), None]

    def read() -> int:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return len(answers)

    kept = Kept("auth_tokens_file", [path], read)
    with pytest.raises(SettingsError):
        kept.reload()
    assert (kept.value, kept.problem is None) == (2, False)
    kept.look()
    assert (kept.value, kept.problem) == (0, None)


def test_a_reload_reads_again_whatever_the_file_looks_like(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens", GOOD)
    with serving(auth_tokens_file=str(path)) as api:
        before = path.stat()
        path.write_text(path.read_text().replace(TOKEN, TOKEN[::-1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        api.access.reload()
        assert (status(api, TOKEN), status(api, TOKEN[::-1])) == (401, 200)
        path.write_text("tokens: 7")
        with pytest.raises(SettingsError):
            api.access.reload()
        assert status(api, TOKEN[::-1]) == 200


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o440, False), (0o640, False), (0o644, True), (0o660, True)]
)
def test_a_file_that_others_can_read_is_worth_a_word(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    warned: bool,  # noqa: FBT001 - a table
) -> None:
    path = write(tmp_path / "tokens", GOOD)
    path.chmod(mode)
    with serving(auth_tokens_file=str(path)):
        assert ("is open to others" in caplog.text) == warned


# Closed by default


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nobody_has_to_say_who_he_is(host: str) -> None:
    assert is_loopback(host)
    assert not load_settings(None, {"host": host}, {}).closed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "kvindexer.llm.svc", "", "localhost.example"])  # noqa: S104
def test_elsewhere_the_door_is_closed_or_said_to_be_open(tmp_path: Path, host: str) -> None:
    assert not is_loopback(host)
    if not host:
        return
    with pytest.raises(SettingsError) as caught:
        load_settings(None, {"host": host}, {})
    assert caught.value.key == "auth"
    for choice in ("auth_tokens_file", "auth_kubernetes_audience", "auth_certificates", "auth: none", "127.0.0.1"):
        assert choice in str(caught.value)
    assert not load_settings(None, {"host": host, "auth": "none"}, {}).closed
    assert load_settings(None, {"host": host, "auth_tokens_file": str(tmp_path / "x")}, {}).closed


@pytest.mark.parametrize(
    ("chosen", "key"),
    [
        ({"auth": "required"}, "auth"),
        ({"auth": "none", "auth_tokens_file": "x"}, "auth"),
        ({"auth_certificates": {"x": ["query"]}}, "tls_client_ca_file"),
        ({"tls_cert_file": "x"}, "tls_key_file"),
        ({"tls_key_file": "x"}, "tls_cert_file"),
        ({"tls_client_ca_file": "x"}, "tls_cert_file"),
        ({"auth_kubernetes_audience": "x"}, "auth_kubernetes_roles"),
        ({"auth_kubernetes_roles": {"x": ["query"]}}, "auth_kubernetes_audience"),
        ({"auth_kubernetes_roles": {"x": []}}, "auth_kubernetes_roles.x.roles"),
        ({"auth_kubernetes_roles": {"x": {"role": ["query"]}}}, "auth_kubernetes_roles.x.role"),
        ({"auth_kubernetes_roles": {7: ["query"]}}, "auth_kubernetes_roles"),
        ({"auth_kubernetes_roles": ["query"]}, "auth_kubernetes_roles"),
        ({"auth_kubernetes_api": "kubernetes"}, "auth_kubernetes_api"),
        ({"probe_host": "10.0.0.1"}, "probe_port"),
        ({"max_requests_per_s": 0}, "max_requests_per_s"),
    ],
)
def test_settings_that_contradict_each_other_are_named(chosen: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, chosen, {})
    assert caught.value.key == key


def test_grants_can_be_written_as_text() -> None:
    settings = load_settings(
        None,
        {"auth_kubernetes_audience": "k"},
        {"KVINDEXER_AUTH_KUBERNETES_ROLES": "{g: [query], u: {roles: [register], tenant: a, cache_salt: s}}"},
    )
    assert settings.auth_kubernetes_roles["g"].roles == {"query"}
    assert settings.auth_kubernetes_roles["u"].tenant == "a"
    assert "'s'" not in repr(settings)


def test_tokens_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError), serving(auth_tokens_file=str(tmp_path / "none")):
        pass


# Rates


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 2)), max_size=60), st.sampled_from([0.5, 1.0, 3.0]))
def test_nobody_gets_more_than_his_rate_and_a_second_s_worth(asked: list[tuple[str, float]], per_s: float) -> None:
    """And who is told to wait is let in when he did."""
    rates, now_s, let_in = Rates(per_s, 10), 0.0, dict.fromkeys("abc", 0)
    for caller, pause_s in asked:
        now_s += pause_s
        wait_s = rates.take(caller, now_s)
        let_in[caller] += not wait_s
        assert let_in[caller] <= max(1.0, per_s) + now_s * per_s + 1e-6
        if wait_s:
            now_s += wait_s + 1e-6
            assert not rates.take(caller, now_s)
            let_in[caller] += 1


def test_so_many_callers_are_remembered() -> None:
    rates = Rates(1.0, 3)
    for number in range(10):
        rates.take(f"caller {number}", 0.0)
        assert len(rates) <= 3
    assert rates.take("caller 9", 0.0)
    assert not rates.take("caller 0", 0.0), "it was forgotten"


def test_addresses_of_one_network_are_one_caller() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.7") == network_of("10.0.0.7") != network_of("10.0.0.8")
    assert network_of("testclient") == "testclient"


def test_a_service_looks_at_its_files_by_itself(tmp_path: Path) -> None:
    """`Access.watched`, on a loop of its own."""
    path = write(tmp_path / "tokens", GOOD)

    async def scenario() -> None:
        access = open_access(Settings(auth_tokens_file=path))
        assert access.guard is not None
        async with access.watched():
            write(path, {**GOOD, "token": TOKEN[::-1]})
            deadline = time.monotonic() + 20
            while access.guard.glance(f"Bearer {TOKEN[::-1]}".encode(), None).name != "x":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(scenario())
