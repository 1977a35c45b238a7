"""`kvindexer serve` beside a cluster: what an operator sees, what callers are answered, what stops the start."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from discovering import MODEL, EnginePod, engine_http, expected, finding, followed, free_port, models, reasons
from kube_api import TOKEN, KubeApi, pod
from kvindexer.errors import SettingsError
from kvindexer.events.discovery import watching
from kvindexer.events.discovery.cluster import open_cluster
from kvindexer.events.fleet import LiveFleet
from kvindexer.service import open_finder
from kvindexer.settings import Settings
from live import until
from watched import Watched, eventually

PROMPT = list(range(24))


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as running:
        yield running


def test_a_question_is_answered_from_pods_that_nobody_has_named(api: KubeApi, tmp_path: Path) -> None:
    """Model asked of the engine, named by pod or address; what a pod held goes when it is made again."""
    events, replay, http = free_port(), free_port(), free_port()
    said = {
        "kvindexer.io/event-port": str(events),
        "kvindexer.io/replay-port": str(replay),
        "kvindexer.io/http-port": str(http),
    }
    settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
    with (
        EnginePod("127.77.6.1", events, replay) as a,
        EnginePod("127.77.6.2", events, replay) as b,
        engine_http(a.address, http) as a_http,
        engine_http(b.address, http) as b_http,
    ):
        a_http.models = b_http.models = models("the-model")
        for name, one in (("a", a), ("b", b)):
            api.put("pods", pod(name, one.address, annotations=said))
        with Watched(tmp_path, **settings) as service:

            def holders(*candidates: str) -> list[str]:
                body: dict[str, Any] = {"model": "the-model", "tokens": PROMPT}
                found = service.client.post(
                    "/v1/match", json=body | ({"candidates": candidates} if candidates else {})
                )
                rows = found.json().get("matches", [])
                return [row["instance"] for row in rows if row["matched_tokens"] > 0]

            eventually("both are live", lambda: service.client.get("/health").json()["status"] == "ok")
            eventually("ready", lambda: service.client.get("/ready").status_code == 200)
            a.engine.run_request(PROMPT)
            eventually("a is found by its address", lambda: holders() == [f"{a.address}:{http}"])
            for spelled in ("a", "a-rank-0", "ns/a", f"http://{a.address}:{http}/v1"):
                assert holders(spelled, "ns/b") == [f"{a.address}:{http}"], spelled
            assert holders("b") == []
            assert holders(f"{b.address}:{http}", f"{a.address}:{http}") == [f"{a.address}:{http}"]
            state = service.client.get("/v1/sources").json()["discovery"]
            assert state | {"contact_s": 0} == {
                "kind": "kubernetes",
                "informed": True,
                "pods": 2,
                "followed": 2,
                "waiting": 0,
                "contact_s": 0,
                "problems": [],
            }
            assert service.value("kvindexer_discovery_followed") == 2
            new = a.restart()
            api.delete("pods", "a")
            api.put("pods", pod("a", a.address, annotations=said))
            eventually("nobody holds it", lambda: holders() == [])
            eventually("followed again", lambda: service.value("kvindexer_discovery_followed") == 2)
            new.wait_for_subscribers()
            new.run_request(PROMPT)
            eventually("the new one holds it", lambda: holders() == [f"{a.address}:{http}"])
            api.statuses[""] = 403
            api.cut()
            eventually("degraded", lambda: service.client.get("/health").json()["status"] == "degraded")
            assert holders() == [f"{a.address}:{http}"]
            (problem,) = service.client.get("/health").json()["discovery"]["problems"]
            assert (problem["reason"], problem["where"]) == ("forbidden", "pods of namespace ns")
            assert "docs/discovery.md#rights" in problem["hint"]
            assert service.value("kvindexer_discovery_problems", reason="forbidden") == 1
            assert TOKEN not in service.process.log


# What stops the start


def start(*settings: str, before: str = "pass", **environ: str) -> tuple[int, str]:
    """Exit code and what was said by a service that can't start."""
    flags = [part for setting in ("max_sources=64", *settings) for part in ("--set", setting)]
    program = f"import sys; {before}; from kvindexer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", "--port", "0", *flags]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("KUBERNETES_")}
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment | environ)
    return done.returncode, done.stderr.decode()


def test_without_the_extra_the_start_stops_and_says_what_to_install() -> None:
    code, said = start("discovery=kubernetes", before="sys.modules['lightkube'] = None")
    assert code == 2
    assert said.count("\n") == 1
    assert "pip install 'kvindexer[kubernetes]'" in said


def test_a_kubeconfig_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    code, said = start("discovery=kubernetes", f"discovery_kubeconfig={tmp_path / 'none'}")
    assert (code, said.count("\n")) == (2, 1)
    assert f"setting discovery_kubeconfig: '{tmp_path / 'none'}'" in said


def test_outside_of_a_cluster_the_start_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a mounted service-account token, or discovery_kubeconfig"):
        open_cluster(Settings(discovery="kubernetes"), tmp_path / "none")


@pytest.mark.parametrize("content", ["", "[]", "a: b", "{", "current-context: t\nclusters: [{name: t}]"])
def test_a_kubeconfig_with_a_slip_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content)

    async def opened() -> None:
        open_finder(Settings(discovery="kubernetes", discovery_kubeconfig=str(path)))

    with pytest.raises(SettingsError, match="discovery_kubeconfig"):
        asyncio.run(opened())


# Inside a cluster


class Account:
    """A mounted service account, and the API server that it is of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "serviceaccount"
        self.folder.mkdir()
        self.authority = trustme.CA()
        self.trust(self.authority)
        self.write("namespace", "ns")
        self.write("token", "first")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self.api = KubeApi(context)
        self.api.tokens = {"first"}

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def trust(self, authority: trustme.CA) -> None:
        authority.cert_pem.write_to_path(str(self.folder / "ca.crt"))


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    monkeypatch.setattr(watching, "RETRY_MIN_S", 0.02)
    made = Account(tmp_path)
    with made.api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(made.api.port))
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # must have no say
        yield made


def test_the_service_account_is_used_and_its_token_read_again_when_it_has_run_out(account: Account) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await until("found", lambda: followed(fleet) == expected(account.api))
        account.api.tokens = {"second"}
        account.api.cut()
        await until("refused", lambda: reasons(fleet) == ["unauthorized"])
        account.write("token", "second\n")
        account.api.put("pods", pod("b", "127.77.0.2", annotations=MODEL))
        await until("found", lambda: followed(fleet) == expected(account.api))
        await until("well", lambda: reasons(fleet) == [])
        (account.folder / "token").unlink()
        account.api.tokens = set()
        account.api.cut()
        await until("told", lambda: reasons(fleet) == ["credentials"])
        assert followed(fleet) == expected(account.api)

    account.api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
    finding(scenario, None, account.folder)


def test_a_certificate_of_another_authority_is_not_trusted(account: Account) -> None:
    account.trust(trustme.CA())

    async def scenario(fleet: LiveFleet) -> None:
        await until("told", lambda: reasons(fleet) == ["tls"])
        assert account.api.asked == []

    finding(scenario, None, account.folder)
