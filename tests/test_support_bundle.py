"""`kvindexer support-bundle`: everything that helps, and none of the secrets that lie about everywhere."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from kvindexer import __version__
from kvindexer.cli import main
from kvindexer.commands import support_bundle
from kvindexer.commands.redaction import Redaction
from kvindexer.hiding import HIDDEN
from kvindexer.testing import FakeEngine
from served import HOST, Served
from servers import Server

MARK = "mark7f3a"
"""Stands in every secret and in every name of a tenant below."""
ACME, UMBRELLA = f"acme-{MARK}", f"umbrella-{MARK}"
SERVICE_PARTS = {f"service/{name}" for name in ("health.json", "metrics.txt", "ready.json", "sources.json")} | {
    "service/tiers.json",
    "service/version.json",
}

Bundle = Callable[..., tuple[int, dict[str, bytes], str]]


@pytest.fixture
def bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bundle:
    made = 0

    def run(*arguments: object) -> tuple[int, dict[str, bytes], str]:
        nonlocal made
        made += 1
        out = tmp_path / f"bundle-{made}.tar.gz"
        code = main(["support-bundle", "--out", str(out), *map(str, arguments)])
        assert out.stat().st_mode & 0o077 == 0
        with tarfile.open(out) as archive:
            names = archive.getnames()
            assert names == sorted(names)
            content = {name: archive.extractfile(name) for name in names}
            parts = {
                name.removeprefix("kvindexer-support/"): file.read()
                for name, file in content.items()
                if file is not None
            }
        said = capsys.readouterr()
        return code, parts, said.out + said.err

    return run


@pytest.fixture
def store() -> Any:
    with Server(password=f"redis-{MARK}") as server:
        yield server


def test_no_secret_is_in_the_bundle_wherever_it_was(bundle: Bundle, tmp_path: Path, store: Server) -> None:
    """Tokens, salts, passwords and tenants, in settings, service, engine and Redis; the bytes are searched."""
    tokens = tmp_path / "tokens.yaml"
    tokens.touch(0o600)
    token = f"token-{MARK}-0123456789"
    entry = {"name": "admin", "token": token, "roles": ["admin"]}
    bound = {"name": "b", "token": f"{token}-b", "roles": ["query"], "tenant": ACME, "cache_salt": f"scope-{MARK}"}
    tokens.write_text(yaml.safe_dump({"tokens": [entry, bound]}))
    token_file = tmp_path / "token"
    token_file.write_text(token)
    with FakeEngine() as engine:
        shape: dict[str, Any] = {"model": "m", "block_size": engine.shape.block_size, "instance": "pod-a"}
        source = {**shape, "endpoint": engine.endpoint, "replay": engine.replay_endpoint, "tenant": ACME}
        silent = {**shape, "instance": "pod-b", "endpoint": "tcp://127.0.0.1:9", "tenant": UMBRELLA}
        settings: dict[str, Any] = {
            "sources": [{**source, "additional_salt": f"salt-{MARK}"}, silent],
            "store": f"redis://:redis-{MARK}@{HOST}:{store.port}",
            "tokenizer_api_key": f"key-{MARK}",
            "auth_tokens_file": str(tokens),
            "auth_tenant_endpoints": {ACME: ["tcp://*"]},
            "discovery_tenant": UMBRELLA,
            "drain_s": 0,
        }
        file = tmp_path / "kvindexer.yaml"
        file.write_text(yaml.safe_dump(settings))
        service = Served(tmp_path, "supported", "--config", str(file))
        service.start()
        try:
            engine.wait_for_subscribers()
            engine.run_request(list(range(64)), salt=f"salted-{MARK}")
            ways = ("--url", service.url, "--token-file", token_file, "--config", file)
            code, parts, said = bundle(*ways)
            _, named, _ = bundle(*ways, "--with-names")
        finally:
            service.close()
    assert code == 0
    assert set(parts) == {
        *SERVICE_PARTS,
        *("manifest.json", "environment.json", "settings.json", "store.json", "doctor.json"),
    }
    everything = b"\n".join(parts.values())
    assert MARK.encode() not in everything
    assert MARK not in said
    for secret in ("redis-", "key-", "salt-", "token-", "scope-", "salted-"):
        assert f"{secret}{MARK}".encode() not in b"\n".join(named.values())
    assert ACME.encode() in named["service/sources.json"]

    sources = json.loads(parts["service/sources.json"])["sources"]
    assert [row["tenant"] for row in sources] == ["tenant-1", "tenant-2"]
    assert [row["tenant"] for row in json.loads(parts["service/tiers.json"])] == ["tenant-1", "tenant-2"]
    chosen = json.loads(parts["settings.json"])
    assert chosen["discovery_tenant"] == "tenant-2"
    assert list(chosen["auth_tenant_endpoints"]) == ["tenant-1"]
    assert chosen["sources"][0]["additional_salt"] == HIDDEN
    assert {row["tenant"] for row in json.loads(parts["store.json"])} <= {"tenant-1", "tenant-2"}
    assert json.loads(parts["service/version.json"]) == {"version": __version__}
    assert json.loads(parts["environment.json"])["packages"]["msgspec"]
    assert b"kvindexer_events_applied_total" in parts["service/metrics.txt"]
    assert {"level", "check", "what"} <= set(json.loads(parts["doctor.json"])[0])
    manifest = json.loads(parts["manifest.json"])
    assert (manifest["missing"], set(manifest["parts"])) == ({}, set(parts) - {"manifest.json"})
    assert all(len(parts[name]) == part["bytes"] for name, part in manifest["parts"].items())


def test_what_cannot_be_had_is_noted_and_the_rest_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    """Exit code 1: what was written is not what was asked for.  Parts that lack for one reason share a line."""
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"store_pasword: {MARK}")
    code, parts, said = bundle("--url", f"http://user:{MARK}@127.0.0.1:9", "--config", broken)
    assert code == 1
    assert set(parts) == {"manifest.json", "environment.json", "doctor.json"}
    missing = json.loads(parts["manifest.json"])["missing"]
    assert set(missing) == {*SERVICE_PARTS, "settings.json"}
    assert "did you mean store_password" in missing["settings.json"]
    assert missing["service/metrics.txt"].startswith("no answer from http://***@127.0.0.1:9: ")
    lines = [line for line in said.splitlines() if line.startswith("kvindexer: not in the bundle: ")]
    assert len(lines) == 2
    named = {name for line in lines for name in line.split(": ")[2].split(", ")}
    assert named == set(missing)
    assert f"incomplete: {len(missing)} could not be had" in said
    assert MARK.encode() not in b"".join(parts.values())
    assert MARK not in said
    assert json.loads(parts["doctor.json"])[0]["level"] == "fail"


def test_a_store_that_is_down_is_noted(bundle: Bundle) -> None:
    _, parts, _ = bundle("--url", "http://127.0.0.1:9", "--store", f"redis://:{MARK}@127.0.0.1:9")
    missing = json.loads(parts["manifest.json"])["missing"]
    assert "store.json" in missing
    assert "settings.json" in parts
    assert MARK.encode() not in b"".join(parts.values())


def test_a_service_that_lets_nobody_in_is_noted(bundle: Bundle, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.touch(0o600)
    tokens.write_text(yaml.safe_dump({"tokens": [{"name": "a", "token": f"{MARK}-0123456789", "roles": ["admin"]}]}))
    service = Served(tmp_path, "shut", "--set", f"auth_tokens_file={tokens}", "--set", "drain_s=0")
    service.start()
    try:
        code, parts, _ = bundle("--url", service.url)
    finally:
        service.close()
    assert code == 1
    missing = json.loads(parts["manifest.json"])["missing"]
    assert "401" in missing["service/sources.json"]
    assert missing["service/tiers.json"] == "the tenants are not known without service/sources.json"


def test_another_program_at_the_address_is_noted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are JSON of another form, and one is longer than a part may be."""
    monkeypatch.setattr(support_bundle, "MAX_PART_BYTES", 1000)

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'["' + b"x" * 2000 + b'"]' if self.path == "/metrics" else b"[1]"
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((HOST, 0), Other) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            code, parts, _ = bundle("--url", f"http://{HOST}:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert code == 1
    missing = json.loads(parts["manifest.json"])["missing"]
    assert set(missing) >= {"service/metrics.txt", "service/version.json", "service/tiers.json", "doctor.json"}
    assert "longer than 1000 bytes" in missing["service/metrics.txt"]
    assert "environment.json" in parts or "environment.json" in missing


def test_secrets_that_answers_repeat_are_hidden(bundle: Bundle, tmp_path: Path) -> None:
    """What is known to be one is looked for in every text, whatever the service says it for."""
    token, salt, key = f"token-{MARK}", f"salt-{MARK}", f"key-{MARK}"
    token_file, file = tmp_path / "token", tmp_path / "kvindexer.yaml"
    token_file.write_text(token)
    source = {"instance": "a", "model": "m", "block_size": 4, "endpoint": "tcp://a:1", "additional_salt": salt}
    file.write_text(yaml.safe_dump({"sources": [source], "tokenizer_api_key": key}))

    class Talkative(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = self.headers["authorization"].removeprefix("Bearer ")
            body = json.dumps({"why": f"{shown}, {salt} and {key} at http://me:{MARK}@h/"}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((HOST, 0), Talkative) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://{HOST}:{server.server_port}"
            _, parts, said = bundle("--url", url, "--token-file", token_file, "--config", file, "--with-names")
        finally:
            server.shutdown()
            thread.join()
    assert f"{HIDDEN}, {HIDDEN} and {HIDDEN} at".encode() in parts["service/health.json"]
    assert MARK.encode() not in b"".join(parts.values())
    assert MARK not in said


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there"
    out.write_text("precious")
    assert main(["support-bundle", "--url", "http://127.0.0.1:9", "--out", str(out)]) == 2
    assert out.read_text() == "precious"
    assert "exists" in capsys.readouterr().err
    assert main(["support-bundle", "--out", str(tmp_path / "no" / "where")]) == 2
    assert main(["support-bundle", "--url", "nowhere", "--out", str(tmp_path / "half")]) == 2
    assert not (tmp_path / "half").exists()


def test_a_token_that_cannot_be_read_is_refused_without_being_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "token"
    bad.write_text(f"{MARK} {MARK}")
    for arguments in (["--token-file", str(bad)], ["--token-file", "/none"], ["--ca-file", str(bad)]):
        assert main(["support-bundle", "--out", str(tmp_path / "x"), *arguments]) == 2
    assert MARK not in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_names_of_tenants_are_replaced_as_words_only() -> None:
    redaction = Redaction(with_names=False)
    redaction.tenants(["a", "a-b", "default", ""])
    redaction.hide(["secret", "abc"])
    assert redaction.text("a a-b ab (a) 'a-b' default secretive abc") == (
        f"tenant-1 tenant-2 ab (tenant-1) 'tenant-2' default {HIDDEN}ive abc"
    )
    assert (
        redaction.text("Authorization: Bearer x.y-z, http://u:p@h") == f"Authorization: Bearer {HIDDEN} http://***@h"
    )
    assert redaction.clean({"a": [{"tenant": "a"}, 1, None]}) == {"a": [{"tenant": "tenant-1"}, 1, None]}
