"""TLS of the service's own port: certificates that rotate, clients that need one, and whom their names make them."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from api_server import error, until
from authority import Authority, Certificate
from kvindexer.access import guard
from kvindexer.access.certificates import identity_of, names_in
from kvindexer.access.errors import ForbiddenError
from kvindexer.access.identity import Grant
from kvindexer.access.transport import open_transport
from kvindexer.api import listeners
from kvindexer.cli import main
from kvindexer.errors import SettingsError
from kvindexer.settings import Settings
from listening import HOST, Listening, listening

TOKEN: Final = "a-token-of-the-test-0123456789"
CERTIFICATES: Final = {
    "scheduler.llm.svc": ["query"],
    "spiffe://cluster/ns/llm/sa/registrar": ["register"],
    "operator": ["admin"],
    "team-a.example": {"roles": ["query"], "tenant": "a"},
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at more often than once a second."""
    monkeypatch.setattr(guard, "LOOK_S", 0.05)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def own(authority: Authority) -> Certificate:
    return authority.issue("server", HOST)


def files(own: Certificate, authority: Authority | None = None) -> dict[str, Any]:
    found = {"tls_cert_file": str(own.cert), "tls_key_file": str(own.key)}
    return found if authority is None else {**found, "tls_client_ca_file": str(authority.file)}


def serial(there: Listening, authority: Authority) -> str:
    """Of the certificate that a new connection is shown."""
    with (
        there.dial() as connection,
        authority.trusted().wrap_socket(connection, server_hostname=HOST) as secure,
    ):
        shown = secure.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])


def tokens(folder: Path, **fields: Any) -> str:
    path = folder / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": [{"name": "x", "token": TOKEN, "roles": ["query"], **fields}]}))
    path.chmod(0o600)
    return str(path)


def refused(there: Listening, trust: ssl.SSLContext) -> bool:
    """Whether a client is not even let to ask."""
    with there.client(trust) as client:
        try:
            client.get("/health")
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError):
            return True
    return False


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_service_speaks_https_and_nothing_else(authority: Authority, own: Certificate, loop: str) -> None:
    with listening(loop, **files(own)) as there:
        with there.client(authority.trusted()) as client:
            response = client.get("/health")
            assert response.json()["status"] == "ok"
            assert response.headers["strict-transport-security"] == "max-age=31536000"
        with there.client() as client, pytest.raises(httpx.HTTPError):
            client.get("/health")
        old = authority.trusted()
        old.minimum_version, old.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_2
        with there.client(old) as client:
            assert client.get("/health").status_code == 200


def test_tls_before_1_2_is_not_spoken(own: Certificate) -> None:
    context = open_transport(Settings(**files(own)))
    assert context is not None
    assert context.kept.value.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_certificate_is_replaced_without_a_restart(authority: Authority, own: Certificate) -> None:
    """Connections that are open go on; new ones are shown the new one.  The service looks by itself."""
    with listening(**files(own)) as there, there.client(authority.trusted()) as client:
        assert client.get("/health").status_code == 200
        before = serial(there, authority)
        authority.issue("server", HOST)
        until(lambda: serial(there, authority) != before)
        assert client.get("/health").json()["status"] == "ok"


def test_half_a_certificate_changes_nothing_and_is_told(authority: Authority, own: Certificate) -> None:
    with listening(**files(own)) as there:
        assert there.api.access.context is not None
        before = serial(there, authority)
        other = authority.issue("other", HOST)
        own.cert.write_bytes(other.cert.read_bytes())
        with there.client(authority.trusted()) as client:
            until(lambda: client.get("/health").json()["status"] == "degraded")
            (problem,) = client.get("/health").json()["access"]
            assert problem["reason"] == "tls_cert_file_unusable"
            assert serial(there, authority) == before
            own.key.write_bytes(other.key.read_bytes())
            until(lambda: client.get("/health").json()["status"] == "ok")
            assert serial(there, authority) != before


def test_a_connection_that_never_begins_tls_is_closed(
    own: Certificate, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "HANDSHAKE_S", 0.2)
    with listening(**files(own)) as there, there.dial() as connection:
        assert connection.recv(1) == b""
        assert serial(there, authority)


# Clients with certificates


def test_with_authorities_alone_every_client_needs_a_certificate(
    authority: Authority, own: Certificate, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path, "foreign")
    stranger = foreign.issue("stranger", "scheduler.llm.svc")
    known = authority.issue("client", "scheduler.llm.svc")
    with listening(**files(own, authority), auth="none") as there:
        assert refused(there, authority.trusted())
        assert refused(there, authority.trusted(stranger))
        assert not refused(there, authority.trusted(known))


def status(there: Listening, trust: ssl.SSLContext, path: str = "/v1/sources", **headers: str) -> int:
    with there.client(trust) as client:
        if path == "/unregister":
            return client.post(path, json={"instance_id": "nobody"}, headers=headers).status_code
        return client.get(path, headers=headers).status_code


def test_the_name_in_a_certificate_has_its_roles(authority: Authority, own: Certificate) -> None:
    """DNS name, URI and common name; one connection's name is not another's."""
    with listening(**files(own, authority), auth_certificates=CERTIFICATES) as there:
        there.api.add("a-pod", tenant="a")
        there.api.add("b-pod", tenant="b")
        of = {
            "query": authority.trusted(authority.issue("1", "scheduler.llm.svc")),
            "register": authority.trusted(authority.issue_uri("2", "spiffe://cluster/ns/llm/sa/registrar")),
            "admin": authority.trusted(authority.issue("3", "x.example", common_name="operator")),
            "a": authority.trusted(authority.issue("4", "team-a.example")),
            "nobody": authority.trusted(authority.issue("5", "other.example")),
        }
        seen = {name: (status(there, trust), status(there, trust, "/unregister")) for name, trust in of.items()}
        assert seen == {
            "query": (200, 403),
            "register": (403, 404),
            "admin": (200, 404),
            "a": (200, 403),
            "nobody": (403, 403),
        }
        with there.client(of["a"]) as client:
            assert [row["instance"] for row in client.get("/v1/sources").json()["sources"]] == ["a-pod"]
        with there.client(of["nobody"]) as client:
            response = client.get("/v1/sources")
            assert error(response)[:2] == (403, "no_role")
            assert "other.example" in response.text
        assert refused(there, authority.trusted()), "there is no other way in"


def test_a_certificate_may_be_one_of_several_ways_in(authority: Authority, own: Certificate, tmp_path: Path) -> None:
    ways: dict[str, Any] = {"auth_certificates": CERTIFICATES, "auth_tokens_file": tokens(tmp_path)}
    scheduler = authority.issue("client", "scheduler.llm.svc")
    with listening(**files(own, authority), **ways) as there:
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert status(there, authority.trusted(scheduler)) == 200
        assert status(there, authority.trusted(), **bearer) == 200
        assert status(there, authority.trusted()) == 401
        assert status(there, authority.trusted(), "/health") == 200, "a kubelet has neither"
        assert status(there, authority.trusted(scheduler), authorization="Bearer wrong") == 401


def test_tokens_may_need_a_certificate_as_well(authority: Authority, own: Certificate, tmp_path: Path) -> None:
    with listening(**files(own, authority), auth_tokens_file=tokens(tmp_path)) as there:
        trust = authority.trusted(authority.issue("client", "x.example"))
        assert status(there, trust) == 401
        assert status(there, trust, authorization=f"Bearer {TOKEN}") == 200
        assert refused(there, authority.trusted())


def test_authorities_are_replaced_too(authority: Authority, own: Certificate, tmp_path: Path) -> None:
    """What an authority that is gone has signed is refused from the next connection on."""
    accepted = tmp_path / "accepted.pem"
    accepted.write_bytes(authority.file.read_bytes())
    renewed = Authority(tmp_path, "renewed")
    old, new = authority.issue("old", "x.example"), renewed.issue("new", "x.example")
    chosen = {**files(own), "tls_client_ca_file": str(accepted), "auth_certificates": {"*": ["query"]}}
    with listening(**chosen) as there:
        assert status(there, authority.trusted(old)) == 200
        assert refused(there, authority.trusted(new))
        accepted.write_bytes(renewed.file.read_bytes())
        until(lambda: not refused(there, authority.trusted(new)))
        assert refused(there, authority.trusted(old))


def test_a_star_in_a_certificate_is_no_wildcard_of_ours() -> None:
    grants = {"x.example": Grant(frozenset({"query"}))}
    with pytest.raises(ForbiddenError):
        identity_of(["*"], grants)
    assert identity_of(["*"], {**grants, "*": Grant(frozenset({"admin"}))}).name == "*"
    assert identity_of(["*", "x.example"], grants).grant.roles == {"query"}
    assert names_in(None) == names_in({}) == ()
    names = (("DNS", "d"), ("IP Address", "1.2"))
    assert names_in({"subject": ((("commonName", "c"),),), "subjectAltName": names}) == ("d", "c")


# Files that can't be used


def test_files_that_cannot_be_used_are_named_at_the_start(
    authority: Authority, own: Certificate, tmp_path: Path
) -> None:
    other = authority.issue("other", HOST)
    empty, locked = tmp_path / "empty.pem", tmp_path / "locked.key"
    empty.write_text("nothing")
    key = load_pem_private_key(own.key.read_bytes(), None)
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    good = files(own, authority)
    for change, setting in (
        ({"tls_cert_file": "/none"}, "tls_cert_file"),
        ({"tls_key_file": "/none"}, "tls_key_file"),
        ({"tls_client_ca_file": "/none"}, "tls_client_ca_file"),
        ({"tls_cert_file": str(empty)}, "tls_cert_file"),
        ({"tls_key_file": str(empty)}, "tls_cert_file"),
        ({"tls_key_file": str(other.key)}, "tls_cert_file"),
        ({"tls_key_file": str(locked)}, "tls_cert_file"),
        ({"tls_client_ca_file": str(empty)}, "tls_client_ca_file"),
    ):
        with pytest.raises(SettingsError) as caught:
            open_transport(Settings(**{**good, **change}, auth="none"))
        assert caught.value.key == setting


# The whole of it, as a process


@pytest.fixture
def process(own: Certificate, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`kvindexer serve` with TLS, tokens and a port for probes, on every address; and what it has said so far."""
    chosen = {
        "host": "0.0.0.0",  # noqa: S104 - what the settings are for
        "port": 0,
        "probe_host": HOST,
        "probe_port": 0,
        "drain_s": 0,
        "auth_tokens_file": tokens(tmp_path),
        **files(own),
    }
    config = tmp_path / "kvindexer.yaml"
    config.write_text(yaml.safe_dump(chosen))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEXER_")}
    command = [sys.executable, "-m", "kvindexer", "serve", "--exit-with-stdin", "--config", str(config)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        said: list[str] = []
        assert running.stderr is not None
        for line in running.stderr:
            said.append(line)
            if "serving on" in "".join(said) and "probes on" in "".join(said):
                break
        yield running, said
        running.send_signal(signal.SIGTERM)
        said.extend(running.stderr)
        assert running.wait(20) == 0, "".join(said)
        assert TOKEN not in "".join(said)


def port(said: list[str], what: str) -> int:
    return int("".join(said).partition(what)[2].partition(" ")[0].split()[0].rpartition(":")[2])


@pytest.mark.proof
def test_a_service_that_other_machines_reach(
    process: tuple[subprocess.Popen[str], list[str]], authority: Authority, tmp_path: Path
) -> None:
    """HTTPS with a token on its port; probes in clear on theirs; tokens read again at SIGHUP."""
    running, said = process
    url = f"https://{HOST}:{port(said, 'serving on https://')}"
    with httpx.Client(base_url=url, verify=authority.trusted(), trust_env=False, timeout=20) as client:
        assert client.get("/v1/sources").status_code == 401
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/sources", headers=bearer).status_code == 200
        tokens(tmp_path, roles=["register"])
        running.send_signal(signal.SIGHUP)
        until(lambda: client.get("/v1/sources", headers=bearer).status_code == 403)
    probes = f"http://{HOST}:{port(said, 'probes on http://')}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(probes + "/health", timeout=20) as answer:
        assert json.load(answer)["status"] == "ok"


def test_a_service_that_other_machines_reach_is_not_open_by_chance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2  # noqa: S104 - refused
    said = capsys.readouterr().err
    assert "auth_tokens_file" in said
    assert "auth: none" in said


@pytest.mark.proof
def test_a_port_for_probes_that_is_taken_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        done = subprocess.run(
            [sys.executable, "-m", "kvindexer", "serve", "--port", "0"],
            env={**os.environ, "KVINDEXER_PROBE_PORT": str(taken.getsockname()[1])},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert "probe_port" in done.stderr
