"""Alerts: each names what exists, has its runbook, and its condition comes true when that really happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import httpx
import msgpack  # type: ignore[import-untyped]
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api_server import NO_CERTIFICATES, serving
from kube_api import KubeApi, pod
from kvindexer.api.fleet import InstanceStatus
from kvindexer.testing import FakeEngine, Faults
from promql import Scrape, evaluate, references, scrape_of
from servers import Server
from test_metrics_reference import documented
from tokenizing import fake_engine, tokens_of
from watched import Watched, eventually

ROOT: Final = Path(__file__).parent.parent
RULES: Final = yaml.safe_load((ROOT / "deploy/helm/kvindexer/files/rules.yaml").read_text())
ALERTS: Final[dict[str, dict[str, Any]]] = {
    rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]
}
OF_TARGETS: Final = frozenset({"job", "instance", "namespace", "pod"})
"""Labels that Prometheus puts on whatever it scrapes."""
PROMPT: Final = list(range(1000, 1064))

# What they are


def test_every_rule_is_an_alert_with_a_severity_words_and_a_runbook() -> None:
    assert len(ALERTS) == sum(len(group["rules"]) for group in RULES["groups"]), "names are unique"
    for name, rule in ALERTS.items():
        assert name.startswith("KvIndexer")
        assert rule["labels"] == {"severity": rule["labels"]["severity"]}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m")), name


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    """Symptom, meaning, where to look with commands, what to do: in this order."""
    page = (ROOT / "docs" / "runbooks.md").read_text()
    sections = dict(re.findall(r"^## (KvIndexer\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(ALERTS), "in the order of the rules"
    for name, text in sections.items():
        parts = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
        assert parts == ["Symptom.", "Meaning.", "Look at.", "Do."], name


def test_the_commands_of_the_runbooks_run_and_find_what_they_look_for(service: Watched, engine: FakeEngine) -> None:
    """Each block against a live service: no route, metric or field in them is made up."""
    followed(service, engine)
    service.post("/v1/match", {"model": "m", "tokens": PROMPT})
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "runbooks.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > len(ALERTS)
    script = "set -euo pipefail\n" + "\n".join(blocks).replace("http://localhost:8090", service.process.url)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(["bash", "-xc", script], env={**os.environ, "PATH": path}, capture_output=True, check=False)  # noqa: S607 - the operator's own shell
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]


@pytest.mark.parametrize("name", ALERTS)
def test_an_expression_names_metrics_and_labels_that_exist(name: str) -> None:
    rows = {row.name: row for row in documented()}
    found = references(ALERTS[name]["expr"])
    assert found
    for metric, labels in found:
        row = rows.get(metric) or rows[metric.removesuffix("_bucket")]
        le = {"le"} if metric.endswith("_bucket") else set()
        assert labels <= {*row.labels, *le, *OF_TARGETS}, metric


# When they come true


class Watch:
    """Scrapes a service now and then, and says which alerts' conditions hold, whatever their `for`."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._history: list[Scrape] = []
        self.firing()

    def firing(self) -> set[str]:
        families = text_string_to_metric_families(self._client.get("/metrics").text)
        self._history.append(scrape_of(list(families), monotonic()))
        return {name for name, rule in ALERTS.items() if evaluate(rule["expr"], self._history)}

    def sees(self, *names: str) -> None:
        """Wait until all of these conditions hold at once."""
        eventually(f"{names} come true", lambda: self.firing() >= set(names))

    def rests(self) -> None:
        """Wait until none holds."""
        eventually("all is well", lambda: self.firing() == set())


@pytest.fixture(scope="module")
def _service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    times = {"stale_after_s": "1", "gone_after_s": "2.5", "feedback_min_reports": "8"}
    with Watched(tmp_path_factory.mktemp("service"), **times) as service:
        yield service


@pytest.fixture
def service(_service: Watched) -> Iterator[Watched]:
    """A service of several tests, as each leaves it: without sources."""
    yield _service
    for source in _service.client.get("/v1/sources").json()["sources"]:
        _service.post("/unregister", {"instance_id": source["instance"], "model": source["model"]})


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as one:
        yield one


def followed(service: Watched, engine: FakeEngine) -> Watch:
    """An engine is followed and all is well."""
    service.follow(engine)
    engine.run_request(PROMPT)
    watch = Watch(service.client)
    eventually("its blocks are there", lambda: service.value("kvindexer_blocks", state="live") >= 4)
    Watch(service.client).rests()
    return watch


def test_nothing_fires_while_all_is_well(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    for turn in range(10):
        engine.run_request(list(range(turn, 64 + turn)))
        service.post("/v1/match", {"model": "m", "tokens": PROMPT})
        service.post("/v1/feedback", {"instance": "pod-a", "predicted_tokens": 64, "cached_tokens": 64})
    assert watch.firing() == set()


def test_a_service_without_sources(service: Watched) -> None:
    assert Watch(service.client).firing() == {"KvIndexerNoSources"}


def test_an_engine_that_dies_is_stale_then_gone(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    engine.stop()
    watch.sees("KvIndexerSourceStale", "KvIndexerSourceUnsound", "KvIndexerSourceIncomplete")
    watch.sees("KvIndexerSourceGone")


def test_an_engine_that_never_lists_its_publishers_stays_syncing(service: Watched) -> None:
    service.post("/register", {"instance_id": "a", "model": "m", "endpoint": "http://127.0.0.1:9", "block_size": 16})
    Watch(service.client).sees("KvIndexerSourceSyncing", "KvIndexerSourceIncomplete")


def test_messages_that_nobody_has_any_more(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    lost = (engine.last_seq or 0) + 1
    engine.faults = Faults(drop_and_forget_seqs=frozenset({lost}))
    for turn in range(3):
        engine.run_request(list(range(5000 + turn, 5064 + turn)))
    watch.sees("KvIndexerGapsUnfilled", "KvIndexerSourceUnsound", "KvIndexerSourceIncomplete")


def test_messages_that_cannot_be_read(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    engine.publish_raw(b"no msgpack at all")
    watch.sees("KvIndexerPoison", "KvIndexerSourceIncomplete")


def test_blocks_without_a_beginning(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    size = engine.shape.block_size
    event = {
        "type": "BlockStored",
        "block_hashes": list(range(1, 1102)),
        "parent_block_hash": 10**9,
        "token_ids": list(range(1101 * size)),
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    engine.publish_raw(msgpack.packb([1.5, [event], 0]))
    watch.sees("KvIndexerOrphans")


def test_engines_that_report_less_than_was_predicted(service: Watched, engine: FakeEngine) -> None:
    watch = followed(service, engine)
    for _ in range(25):
        service.post("/v1/feedback", {"instance": "pod-a", "predicted_tokens": 640, "cached_tokens": 0})
    watch.sees("KvIndexerAccuracyLow", "KvIndexerSourceDoubted")


@pytest.mark.proof
def test_followers_that_take_nothing(tmp_path: Path, engine: FakeEngine) -> None:
    with Watched(tmp_path, changes_heartbeat_s="0.1") as service:
        watch = followed(service, engine)
        size = engine.shape.block_size
        stored = {
            "type": "BlockStored",
            "block_hashes": list(range(1, 60_001)),
            "parent_block_hash": None,
            "token_ids": list(range(60_000 * size)),
            "block_size": size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        engine.publish_raw(msgpack.packb([1.5, [stored], 0]))
        eventually("they are there", lambda: service.value("kvindexer_blocks", tier="gpu") >= 60_000)
        clients = [_unread(service.process.port) for _ in range(5)]
        watch.sees("KvIndexerFollowersCutOff")
        for client in clients:
            client.close()


def _unread(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /v1/changes?model=m HTTP/1.1\r\nhost: x\r\n\r\n")
    return client


@pytest.mark.proof
def test_a_slow_tokenizer_too_many_requests_a_full_index_and_a_start_that_waits(
    tmp_path: Path, engine: FakeEngine
) -> None:
    """One service in which all of that is so: its bounds are small, and a source of its settings is not there."""
    with fake_engine() as tokenizer:
        released = Event()

        def slow(asked: dict[str, Any]) -> tuple[int, bytes]:
            released.wait(0.3)
            return tokens_of(asked)

        tokenizer.says["/tokenize"] = slow
        with Watched(
            tmp_path,
            sync_deadline_s="600",
            max_entries="70",
            max_concurrent_requests="2",
            tokenizers=json.dumps({"m": {"engines": [tokenizer.url]}}),
            sources=json.dumps(
                [{"instance": "never", "model": "n", "endpoint": "tcp://127.0.0.1:9", "block_size": 4}]
            ),
        ) as service:
            watch = Watch(service.client)
            service.follow(engine)
            with ThreadPoolExecutor(6) as callers:

                def burst() -> set[int]:
                    return set(callers.map(_asked, [service.process.url] * 12))

                assert burst() == {200, 503}
                watch.firing()  # what has just come up can only grow from now on
                assert burst() == {200, 503}
            watch.sees("KvIndexerNotReady", "KvIndexerSlow", "KvIndexerOverloaded")
            for turn in range(16):
                engine.run_request(list(range(1000 * turn, 1000 * turn + 64)))
            watch.sees("KvIndexerIndexFull")


def _asked(url: str) -> int:
    with httpx.Client(trust_env=False, verify=NO_CERTIFICATES, timeout=30) as client:
        return client.post(f"{url}/v1/match", json={"model": "m", "prompt": f"the fox {uuid4()}"}).status_code


@pytest.mark.proof
def test_an_api_server_that_is_away_and_a_pod_that_contradicts_itself(tmp_path: Path) -> None:
    with KubeApi() as api:
        settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
        with Watched(tmp_path, discovery_timeout_s="1", **settings) as service:
            watch = Watch(service.client)
            api.put("pods", pod("odd", "127.77.9.1", annotations={"kvindexer.io/event-port": "none of them"}))
            watch.sees("KvIndexerDiscoveryProblem")
            api.down()
            watch.sees("KvIndexerDiscoveryBlind")


def test_a_reload_of_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("log_level: info\n")
    with Watched(tmp_path, "--config", str(file)) as service:
        watch = Watch(service.client)
        file.write_text("log_level: loud\n")
        service.process.tell(signal.SIGHUP)
        watch.sees("KvIndexerReloadFailed")
        file.write_text("log_level: warning\n")
        service.process.tell(signal.SIGHUP)
        eventually("it is applied", lambda: "KvIndexerReloadFailed" not in watch.firing())


def test_a_fault_of_ours() -> None:
    """A fleet that fails in the midst of an answer; nothing that callers send brings about a 500."""
    with serving() as api:
        api.store(api.add("pod-a"), PROMPT)

        def fail(instances: Sequence[str]) -> list[InstanceStatus]:
            raise RuntimeError(len(instances))

        api.fleet.each_status = fail  # type: ignore[method-assign]
        watch: Watch | None = None
        for _ in range(2):
            assert api.client.post("/v1/match", json={"model": "m", "tokens": PROMPT}).status_code == 500
            watch = watch or Watch(api.client)
        assert watch is not None
        assert watch.firing() == {"KvIndexerErrors"}


def test_a_service_that_is_not_there() -> None:
    history = [Scrape(0.0, {})]
    assert [name for name, rule in ALERTS.items() if evaluate(rule["expr"], history)] == ["KvIndexerAbsent"]


@pytest.mark.proof
def test_a_store_that_dies_and_one_that_is_tampered_with(
    tmp_path: Path, own_redis_server: Server, engine: FakeEngine
) -> None:
    quick = {"store_flush_interval_s": "0.05", "store_poll_interval_s": "0.1", "store_check_interval_s": "0.2"}
    with Watched(tmp_path, store=own_redis_server.url, store_timeout_s="0.5", **quick) as service:
        watch = followed(service, engine)
        eventually("it is written", lambda: service.value("kvindexer_store_shards", state="in_step") == 1)
        (bucket, *_) = own_redis_server.ask("KEYS", "*:*:*:*")
        own_redis_server.ask("DEL", bucket)
        watch.sees("KvIndexerStoreDivergence")
        own_redis_server.kill()
        watch.sees("KvIndexerStoreUnreachable", "KvIndexerStoreDegraded")


@pytest.mark.proof
def test_a_store_that_is_behind_for_long(tmp_path: Path, own_redis_server: Server, engine: FakeEngine) -> None:
    """A minute has to pass."""
    with Watched(tmp_path, store=own_redis_server.url, store_timeout_s="0.5") as service:
        watch = followed(service, engine)
        own_redis_server.kill()
        engine.run_request(list(range(64)))
        eventually("it is behind", lambda: service.value("kvindexer_store_lag_seconds") > 0)
        eventually("for a minute", lambda: "KvIndexerStoreLag" in watch.firing(), 90.0)


@pytest.mark.proof
def test_messages_that_wait_for_a_replay_that_does_not_come(tmp_path: Path, engine: FakeEngine) -> None:
    """Seconds have to pass."""
    with Watched(tmp_path, replay_timeout_s="60") as service:
        watch = followed(service, engine)
        engine.faults = Faults(drop_seqs=frozenset({(engine.last_seq or 0) + 1}), replay_silent=True)
        for turn in range(3):
            engine.run_request(list(range(90_000 + 100 * turn, 90_064 + 100 * turn)))
        eventually("there is a hole", lambda: service.value("kvindexer_sources_with_gap") == 1)
        watch.sees("KvIndexerIngestLag")


def test_every_alert_is_brought_about_by_a_test_of_this_file() -> None:
    text = Path(__file__).read_text()
    assert {name for name in ALERTS if f'"{name}"' not in text} == set()
