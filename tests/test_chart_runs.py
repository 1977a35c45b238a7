"""What the chart gives to run is run: the small Valkey's scripts, and both containers of `helm test`."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from charts import RELEASE, Object, objects, one, settings_file
from kvindexer.testing.redis_server import guard, server_binary
from served import Served

PATIENCE_S: Final = 20.0
NAME: Final = f"{RELEASE}-kvindexer"
PASSWORD: Final = "".join(map(chr, range(0x21, 0x7F)))
"""Every character that can be seen: quotes, backslashes, dollars and backticks among them."""


def valkey_scripts(folder: Path, values: dict[str, Any] | None = None) -> Path:
    """The scripts and the configuration, as the pod has them, but for port and place."""
    data = one(objects({"valkey": {"enabled": True, **(values or {})}}), "ConfigMap", f"{NAME}-valkey")["data"]
    made = folder / "etc"
    made.mkdir()
    for name, text in data.items():
        (made / name).write_text(
            text.replace("port 6379", f"port 0\nunixsocket {folder}/socket").replace("/data", str(folder))
        )
    return made


@contextmanager
def valkey(folder: Path, scripts: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The container's command, with the server that the tests have."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "valkey-server").symlink_to(server_binary())
    secret = folder / "secret"
    secret.mkdir()
    (secret / "password").write_text(PASSWORD)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*guard(), "sh", str(scripts / "start.sh"), str(secret), str(scripts)],
        env={"PATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def client(folder: Path, password: str) -> Redis:
    """Connected, as soon as it listens."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        once = Retry(NoBackoff(), 0)
        made = Redis(unix_socket_path=str(folder / "socket"), password=password, decode_responses=True, retry=once)
        try:
            made.ping()
        except (RedisConnectionError, BusyLoadingError) as error:
            made.close()
            if isinstance(error, AuthenticationError) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return made


@pytest.mark.parametrize("lasts", [False, True])
def test_the_small_valkey_starts_as_it_is_told_and_ends_when_it_is_told(tmp_path: Path, *, lasts: bool) -> None:
    """With any password, which no list of processes shows; SIGTERM reaches the server itself."""
    scripts = valkey_scripts(tmp_path, {"maxmemory": "64mb", "persistence": {"enabled": lasts}})
    with valkey(tmp_path, scripts) as process:
        with client(tmp_path, PASSWORD) as redis:
            for name, value in {
                "maxmemory": str(64 * 2**20),
                "maxmemory-policy": "noeviction",
                "appendonly": "yes" if lasts else "no",
                "save": "",
                "hash-max-listpack-entries": "128",
                "hash-max-listpack-value": "64",
            }.items():
                assert redis.config_get(name) == {name: value}
        with pytest.raises(AuthenticationError):
            client(tmp_path, "")
        assert PASSWORD not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(("answer", "code"), [("PONG", 0), ("LOADING the dataset is in memory", 1), ("", 1)])
def test_readiness_of_the_small_valkey_is_its_answer(tmp_path: Path, answer: str, code: int) -> None:
    """The client is given the password by a variable, and whatever isn't PONG is not ready."""
    scripts = valkey_scripts(tmp_path)
    (tmp_path / "password").write_text(PASSWORD)
    command = tmp_path / "valkey-cli"
    command.write_text(
        f'#!/bin/sh\nprintf %s "$VALKEYCLI_AUTH" >{tmp_path}/seen\ntest "$*" = ping && echo "{answer}"\n'
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["/bin/sh", scripts / "ask.sh", tmp_path],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "seen").read_text() == PASSWORD


@pytest.fixture(scope="module")
def release() -> list[Object]:
    """As the chart comes, but for discovery, which needs a cluster."""
    return objects({"discovery": {"enabled": False}})


@pytest.fixture(scope="module")
def tokens(release: list[Object]) -> dict[str, str]:
    """By role, and the file of all."""
    made: dict[str, str] = one(release, "Secret")["stringData"]
    return made


@pytest.fixture(scope="module")
def service(
    release: list[Object], tokens: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The pod's service with the release's settings and Secret, at ports of this machine."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "tokens.yaml").write_text(tokens["tokens.yaml"])
    config = folder / "config.yaml"
    config.write_text(settings_file(release, NAME).replace("/run/secrets/kvindexer", str(folder)))
    here = [word for name in ("probe_host=127.0.0.1", "probe_port=0") for word in ("--set", name)]
    served = Served(folder, "a", "--config", str(config), "--host", "127.0.0.1", *here)
    served.start()
    try:
        yield served
    finally:
        served.close()


def probe_url(served: Served) -> str:
    """Of the port that kubelet and Prometheus ask, as the service says."""
    found = re.search(r"probes on (http://127\.0\.0\.1:\d+)", served.log)
    assert found
    return found[1]


def status(url: str, token: str = "") -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.get(url, headers=headers, timeout=PATIENCE_S).status_code


def test_the_service_of_a_release_is_closed_but_for_its_probes(service: Served, tokens: dict[str, str]) -> None:
    """The pod's probes are answered without a token, at their port; all else wants one of those that were made."""
    (container,) = one(objects(), "Deployment")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert status(probe_url(service) + container[probe]["httpGet"]["path"]) == 200
    assert status(probe_url(service) + "/metrics") == 200
    assert status(probe_url(service) + "/v1/sources") == 404
    assert status(f"{service.url}/v1/sources") == 401
    assert status(f"{service.url}/metrics") == 401
    for role in ("query", "register", "admin"):
        assert status(f"{service.url}/v1/sources", tokens[role]) == 200
    for role in ("query", "register", "admin"):
        headers = {"authorization": f"Bearer {tokens[role]}"}
        answer = httpx.post(f"{service.url}/register", json={}, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == (403 if role == "query" else 422), role  # nothing to register was named


def run_hook(container: Object, served: Served, token: Path) -> subprocess.CompletedProcess[str]:
    """A container of the test's pod, against the service."""

    def here(text: str) -> str:
        text = text.replace(f"http://{NAME}-headless:9090", probe_url(served))
        text = text.replace(f"http://{NAME}:8090", served.url)
        return text.replace("/run/secrets/kvindexer/token/token", str(token))

    variables = {each["name"]: here(each["value"]) for each in container.get("env", ())}
    (command, *more) = container["command"]
    start = [sys.executable] if command == "python" else [sys.executable, "-m", command]
    return subprocess.run(
        [*start, *more, *map(here, container["args"])],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def hook(values: dict[str, Any]) -> Object:
    spec: Object = one(objects(values), "Pod")["spec"]
    return spec


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_the_test_of_a_release_passes_with_its_token_alone(
    service: Served, tokens: dict[str, str], tmp_path: Path, *, right: bool, code: int
) -> None:
    token = tokens["query"] if right else "0123456789abcdef-wrong"
    file = tmp_path / "token"
    file.write_text(token)
    spec = hook({})
    asked = run_hook(spec["initContainers"][0], service, file)
    assert asked.returncode == code, asked
    assert ("answers" in asked.stdout) is (code == 0)
    assert ("401" in asked.stderr) is (code == 1)
    examined = run_hook(spec["containers"][0], service, file)
    assert examined.returncode == code, examined
    assert token not in asked.stdout + asked.stderr + examined.stdout + examined.stderr


def test_without_a_token_readiness_is_all_that_is_asked(service: Served, tmp_path: Path) -> None:
    spec = hook({"auth": {"existingSecret": "t"}})
    (container,) = spec["containers"]
    assert "initContainers" not in spec
    assert [each["name"] for each in container["env"]] == ["READY_URL"]
    asked = run_hook(container, service, tmp_path / "none")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.endswith("/ready: ready\n")


def test_a_service_that_is_not_there_fails_the_test(service: Served, tmp_path: Path) -> None:
    """Its question goes elsewhere than to /ready, so it is seen."""
    container = hook({"auth": {"enabled": False}})["initContainers"][0]
    for each in container["env"]:
        if each["name"] == "URL":
            each["value"] = "http://127.0.0.1:1/v1/match"
    asked = run_hook(container, service, tmp_path / "none")
    assert asked.returncode == 1
    assert "http://127.0.0.1:1/v1/match" in asked.stderr
