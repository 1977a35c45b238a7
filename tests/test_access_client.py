"""The Python client and the commands at a closed door: with a token, over TLS, with a certificate of their own."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from authority import Authority
from kvindexer.cli import main
from kvindexer.client import AsyncClient, Client, RefusedError, Tokens
from listening import HOST, Listening, listening

TOKEN = "a-token-of-the-test-0123456789"
PROMPT = Tokens(list(range(8)))


@pytest.fixture
def closed(tmp_path: Path) -> Any:
    """The settings of a service that speaks TLS and asks for a token or a certificate, and its authority."""
    authority = Authority(tmp_path)
    own = authority.issue("server", HOST)
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(yaml.safe_dump({"tokens": [{"name": "x", "token": TOKEN, "roles": ["query"]}]}))
    tokens.chmod(0o600)
    settings = {
        "tls_cert_file": str(own.cert),
        "tls_key_file": str(own.key),
        "tls_client_ca_file": str(authority.file),
        "auth_tokens_file": str(tokens),
        "auth_certificates": {"scheduler.llm.svc": ["query"]},
    }
    return settings, authority


def prompts(there: Listening) -> str:
    there.api.store(there.api.add("a-pod"), range(8))
    return f"https://{HOST}:{there.port}"


def test_the_client_says_who_it_is(closed: Any) -> None:
    """By a token, by one that changes, or by its certificate; a 401 is an error that says so."""
    settings, authority = closed
    with listening(**settings) as there:
        url, trust = prompts(there), authority.trusted()
        with Client(url, token=TOKEN, verify=trust) as client:
            assert client.match("m", PROMPT).matches[0].instance == "a-pod"
        own = authority.trusted(authority.issue("client", "scheduler.llm.svc"))
        with Client(url, verify=own) as client:
            assert client.match("m", PROMPT).matches
        turns = iter(["expired", TOKEN])
        with Client(url, token=lambda: next(turns), verify=trust) as client:
            with pytest.raises(RefusedError) as caught:
                client.match("m", PROMPT)
            assert (caught.value.status, caught.value.code) == (401, "unauthenticated")
            assert TOKEN not in str(caught.value)
            assert client.match("m", PROMPT).matches

        async def scenario() -> None:
            async with AsyncClient(url, token=TOKEN, verify=trust) as client:
                assert (await client.match("m", PROMPT)).matches

        asyncio.run(scenario())


def test_the_commands_say_who_they_are(closed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, authority = closed
    token, prompt = tmp_path / "token", tmp_path / "prompt.json"
    token.write_text(TOKEN + "\n")
    prompt.write_text(json.dumps(list(range(8))))
    with listening(**settings) as there:
        ask = ["query", str(prompt), "--url", prompts(there), "--model", "m", "--ca-file", str(authority.file)]
        assert main([*ask, "--json", "--token-file", str(token)]) == 0
        assert json.loads(capsys.readouterr().out)["matches"][0]["instance"] == "a-pod"
        assert main(ask) == 1
        assert "unauthenticated" in capsys.readouterr().err
        own = authority.issue("client", "scheduler.llm.svc")
        assert main([*ask, "--cert-file", str(own.cert), "--key-file", str(own.key)]) == 0


def test_a_certificate_that_nobody_vouches_for_is_told_from_silence(
    closed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command says which flag is missing, and a fleet does not try again."""
    settings, _ = closed
    prompt = tmp_path / "prompt.json"
    prompt.write_text("[1]")
    with listening(**settings) as there:
        url = prompts(there)
        for command in (
            ["query", str(prompt), "--url", url, "--model", "m"],
            ["doctor", "--url", url],
            ["simulate", "--register", url],
        ):
            assert main(command) == 1
            said = capsys.readouterr()
            assert "is not trusted: " in said.out + said.err
            assert "--ca-file" in said.out + said.err
            assert "trying for" not in said.err


def test_a_fleet_says_who_it_is(closed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When it registers, asks for routes, and takes its engines back."""
    settings, authority = closed
    tokens = Path(settings["auth_tokens_file"])
    tokens.write_text(yaml.safe_dump({"tokens": [{"name": "x", "token": TOKEN, "roles": ["query", "register"]}]}))
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with listening(**settings) as there:
        url = f"https://{HOST}:{there.port}"
        ways = ["--token-file", str(token), "--ca-file", str(authority.file)]
        fleet = ["simulate", "--engines", "2", "--register", url, "--route", url, "--duration-s", "1"]
        registered = there.api.fleet.registry.generation
        assert main([*fleet, *ways]) == 0
        assert capsys.readouterr().err == ""
        assert there.api.fleet.registry.generation == registered + 4  # two came, two went
        assert there.api.metrics._answers[("/v1/match", 200)] > 0
        assert main(fleet) == 1


def test_a_demo_shows_a_service_that_asks_who_calls(closed: Any, tmp_path: Path) -> None:
    """The variables are the service's; the line to paste works in a shell, and has no token in it."""
    settings, authority = closed
    tokens = Path(settings["auth_tokens_file"])
    tokens.write_text(yaml.safe_dump({"tokens": [{"name": "x", "token": TOKEN, "roles": ["query", "register"]}]}))
    token = tmp_path / "a token"
    token.write_text(TOKEN)
    secure = ("auth_tokens_file", "tls_cert_file", "tls_key_file")
    environ = {**os.environ, **{f"KVINDEXER_{name.upper()}": settings[name] for name in secure}}
    ways = ["--token-file", str(token), "--ca-file", str(authority.file)]
    command = [sys.executable, "-m", "kvindexer", "demo", "--engines", "1", *ways]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            line = next((line for line in demo.stdout if line.startswith("curl ")), "")
            assert line, demo.stderr.read() if demo.stderr else ""
            assert TOKEN not in line
            assert shlex.split(line)[2:4] == ["--cacert", str(authority.file)]
            shell = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30, check=True)  # noqa: S607 - the shell of the machine
            assert json.loads(shell.stdout)["matches"]
        finally:
            demo.terminate()
            demo.communicate(timeout=30)
    assert demo.returncode == 0
    replicas = subprocess.run([*command, "--replicas", "2"], env=environ, capture_output=True, text=True, check=False)
    assert (replicas.returncode, "KVINDEXER_TLS_CERT_FILE" in replicas.stderr) == (2, True)
