"""Pods are found, followed and forgotten, whatever the API server does: real HTTP, a fleet, a fake API server."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from discovering import (
    MODEL,
    EngineHttp,
    EnginePod,
    engine_http,
    expected,
    finding,
    followed,
    free_port,
    models,
    reasons,
)
from kube_api import V1, V1ALPHA2, KubeApi, old_pool, pod, pool, restarted
from kvindexer.errors import ConflictError
from kvindexer.events import listing
from kvindexer.events.discovery import engines, finder, pools, watching
from kvindexer.events.fleet import LiveFleet
from kvindexer.types import SourceSpec
from live import agrees, connected, held, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RETRY_MIN_S", 0.02)
    monkeypatch.setattr(finder, "EVERY_S", 0.1)
    monkeypatch.setattr(pools, "ABSENT_S", 0.1)
    monkeypatch.setattr(engines, "RETRY_MIN_S", 0.02)
    monkeypatch.setattr(engines, "RETRY_MAX_S", 0.1)
    monkeypatch.setattr(listing, "RETRY_S", 0.05)
    monkeypatch.setattr(listing, "REFRESH_S", 0.05)


@pytest.fixture
def api() -> KubeApi:
    return KubeApi()


async def equal(fleet: LiveFleet, api: KubeApi) -> None:
    """Wait until the sources are exactly the pods."""
    await until("the sources are the pods", lambda: followed(fleet) == expected(api))


# Pods come and go


def test_pods_are_followed_as_they_come_go_and_are_started_again(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        b = api.put("pods", pod("b", "127.77.0.2", annotations=MODEL))
        api.put("pods", pod("pending", "127.77.0.3", annotations=MODEL, phase="Pending"))
        await equal(fleet, api)
        lives = followed(fleet)
        assert set(lives) == {"tcp://127.77.0.1:5557", "tcp://127.77.0.2:5557"}
        api.put("pods", restarted(b, running=False))
        await equal(fleet, api)
        api.put("pods", restarted(b))
        await equal(fleet, api)
        assert followed(fleet)["tcp://127.77.0.2:5557"] != lives["tcp://127.77.0.2:5557"]
        api.delete("pods", "a")
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        await until("a is another one", lambda: followed(fleet)["tcp://127.77.0.1:5557"] not in lives.values())
        api.put("pods", pod("b", "127.77.0.9", annotations=MODEL, deleting=True))
        await equal(fleet, api)
        assert set(followed(fleet)) == {"tcp://127.77.0.1:5557"}
        assert fleet.finding().relists == 0

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path)


def test_what_a_pod_held_is_gone_with_its_container_before_anything_is_heard_of_the_next_one(
    api: KubeApi, tmp_path: Path
) -> None:
    """Also without a replay socket, where nothing on the wire tells the lives apart."""
    port = free_port()
    said = {**MODEL, "kvindexer.io/event-port": str(port), "kvindexer.io/block-size": "4"}
    with api, EnginePod("127.77.1.1", port, free_port()) as one:
        before = api.put("pods", pod("a", one.address, annotations=said))

        async def scenario(fleet: LiveFleet) -> None:
            await until("followed", lambda: len(fleet.reports()) == 1)
            await connected(one.engine)
            one.engine.run_request([1] * 30)
            await agrees(fleet, one.engine)
            assert held(fleet, one.engine)
            api.put("pods", restarted(before))
            life = next(iter(followed(fleet).values()))
            await until("another life", lambda: life not in followed(fleet).values() and followed(fleet) != {})
            assert not held(fleet, one.engine)
            assert fleet.reports()[0].epoch == 1
            new = one.restart()
            await connected(new)
            new.run_request([2] * 30)
            await agrees(fleet, new)

        finding(scenario, api, tmp_path)


def test_several_namespaces_and_many_pages(api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvindexer.events.discovery.cluster.PAGE", 3)

    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        assert len(followed(fleet)) == 20
        assert max(len(asked.params.get("continue", "")) for asked in api.asked) > 0

    with api:
        for number in range(10):
            for place, namespace in enumerate(("ns", "other", "foreign")):
                address = f"127.77.{place}.{number}" if namespace != "foreign" else None
                found = pod(f"p{number}", address, annotations=MODEL, namespace=namespace)
                api.put("pods", found)
        finding(scenario, api, tmp_path, discovery_namespaces=("ns", "other"))


# The API server


@pytest.mark.parametrize("as_event", [True, False])
def test_410_is_answered_with_a_new_list_and_missed_deletions_are_made_up_for(
    api: KubeApi, tmp_path: Path, *, as_event: bool
) -> None:
    api.gone_as_event = as_event

    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        await until("watched", lambda: api.watching == 1)
        api.down()
        api.delete("pods", "a")
        api.put("pods", pod("c", "127.77.0.3", annotations=MODEL))
        api.compact()
        api.up()
        await equal(fleet, api)
        api.expire_watches()
        await until("read anew", lambda: fleet.finding().relists >= 2)
        api.put("pods", pod("d", "127.77.0.4", annotations=MODEL))
        await equal(fleet, api)
        assert reasons(fleet) == []

    with api:
        for number, name in enumerate("ab", 1):
            api.put("pods", pod(name, f"127.77.0.{number}", annotations=MODEL))
        finding(scenario, api, tmp_path)


def test_a_watch_goes_on_from_where_the_one_before_ended(api: KubeApi, tmp_path: Path) -> None:
    """Ended by the server or cut off: no list is read again; a bookmark saves it from being too old."""

    async def scenario(fleet: LiveFleet) -> None:
        await until("watched", lambda: api.watching == 1)
        for end in (api.end_watches, api.cut):
            watches = api.count("watch")
            end()
            await until("watched again", lambda count=watches: api.count("watch") > count)  # type: ignore[misc]
            api.put("pods", pod("a", f"127.77.0.{api.count('watch')}", annotations=MODEL))
            await equal(fleet, api)
        await until("watched", lambda: api.watching == 1)
        (pods,) = fleet._finder._watched  # type: ignore[attr-defined]
        before = pods._version
        api.compact()
        api.bookmark()
        await until("the bookmark is heard", lambda: pods._version != before)
        api.end_watches()
        await until("watched again", lambda: api.watching == 1)
        api.put("pods", pod("z", "127.77.0.99", annotations=MODEL))
        await equal(fleet, api)
        assert api.count("list") == 1

    with api:
        finding(scenario, api, tmp_path)


def test_a_watch_that_ends_at_once_again_and_again_is_not_begun_as_often(api: KubeApi, tmp_path: Path) -> None:
    """The end of a watch is no error, and still no reason to hammer the API server."""
    api.watch_s = 0.0

    async def scenario(fleet: LiveFleet) -> None:
        began_at = time.monotonic()
        await until("watched", lambda: api.count("watch") == 8)
        least_s = sum(min(0.4, watching.RETRY_MIN_S * 2**n) / 2 for n in range(1, 7))
        assert time.monotonic() - began_at >= least_s  # pauses double; they can't have been shorter
        assert api.count("list") == 1
        assert reasons(fleet) == []

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path)


def test_the_last_set_stays_while_the_api_server_is_away(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        known = followed(fleet)
        for refuse, reason in (
            (500, "server_error"),
            (429, "server_error"),
            (401, "unauthorized"),
            (403, "forbidden"),
        ):
            api.statuses[""] = refuse
            api.cut()
            await until(reason, lambda word=reason: word in reasons(fleet))  # type: ignore[misc]
            assert followed(fleet) == known
        api.statuses.clear()
        await until("well", lambda: reasons(fleet) == [])
        api.down()
        await until("unreachable", lambda: reasons(fleet) == ["unreachable"])
        api.delete("pods", "a")
        assert followed(fleet) == known
        api.up()
        await equal(fleet, api)
        await until("well", lambda: reasons(fleet) == [])
        errors = fleet.finding().errors
        assert {"cut", "server_error", "unauthorized", "forbidden", "unreachable"} <= set(errors)

    with api:
        for number, name in enumerate("ab", 1):
            api.put("pods", pod(name, f"127.77.0.{number}", annotations=MODEL))
        finding(scenario, api, tmp_path)


def test_an_api_server_that_falls_silent_is_noticed_and_asked_again(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await until("watched", lambda: api.watching == 1)
        api.paused = True
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        await until("silence is told", lambda: reasons(fleet) == ["no_pods", "timeout"])
        api.paused = False
        await equal(fleet, api)
        await until("well", lambda: reasons(fleet) == [])

    with api:
        finding(scenario, api, tmp_path, discovery_watch_s=0.2, discovery_timeout_s=0.3)


def test_a_right_to_list_alone_is_told_and_used(api: KubeApi, tmp_path: Path) -> None:
    api.statuses["watch"] = 403

    async def scenario(fleet: LiveFleet) -> None:
        for number in range(3):
            api.put("pods", pod("a", f"127.77.0.{number}", annotations=MODEL))
            await equal(fleet, api)
        await until("told", lambda: "forbidden" in reasons(fleet))

    with api:
        finding(scenario, api, tmp_path, discovery_retry_max_s=0.05)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"items": 1}', b"\xff", b'{"items": [], "metadata": {}}'])
def test_an_answer_that_is_none_is_a_problem_and_no_end(api: KubeApi, tmp_path: Path, body: bytes) -> None:
    api.garbage = body

    async def scenario(fleet: LiveFleet) -> None:
        await until("told", lambda: reasons(fleet) == ["unreadable"])
        api.garbage = None
        await equal(fleet, api)

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path)


# Ready


def test_a_fleet_is_not_ready_before_the_first_pods_are_in_sync_and_pods_that_come_later_change_nothing(
    api: KubeApi, tmp_path: Path
) -> None:
    port, replay = free_port(), free_port()
    said = {
        **MODEL, "kvindexer.io/event-port": str(port), "kvindexer.io/replay-port": str(replay)
    }  # fmt: skip
    api.paused = True

    async def scenario(fleet: LiveFleet) -> None:
        await until("asked", lambda: len(api.asked) == 1)
        assert not fleet.ready
        api.paused = False
        await until("found", lambda: len(fleet.sources()) == 1)
        assert not fleet.ready  # nobody is there yet
        with EnginePod("127.77.2.1", port, replay):
            await until("ready", lambda: fleet.ready)
            api.put("pods", pod("late", "127.77.2.2", annotations=said))
            await until("found", lambda: len(fleet.sources()) == 2)
            assert fleet.ready

    with api:
        api.put("pods", pod("a", "127.77.2.1", annotations=said))
        api.paused = True
        finding(scenario, api, tmp_path)


def test_an_api_server_that_is_away_at_the_start_holds_up_readiness_until_the_deadline_only(
    api: KubeApi, tmp_path: Path
) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        assert not fleet.ready
        await until("ready all the same", lambda: fleet.ready)
        assert not fleet.finding().informed
        api.up()
        await until("found", lambda: fleet.finding().informed)
        await equal(fleet, api)

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        api.down()
        finding(scenario, api, tmp_path, sync_deadline_s=0.3)


# What is wrong with pods


def test_pods_that_are_wrong_are_told_once_and_the_rest_is_followed(
    api: KubeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(fleet: LiveFleet) -> None:
        await until(
            "told", lambda: reasons(fleet) == ["bad_annotation", "duplicate", "not_followed", "unknown_annotation"]
        )
        assert set(followed(fleet)) == {"tcp://127.77.0.1:5557", "tcp://127.77.0.5:5557"}
        for _ in range(5):
            fleet._finder._wake.set()  # type: ignore[attr-defined]
            await until("looked again", lambda: not fleet._finder._wake.is_set())  # type: ignore[attr-defined]
        assert caplog.text.count("bad_annotation: kvindexer.io/ranks is 'many'") == 1
        assert caplog.text.count("ns/twin: duplicate") == 1
        api.delete("pods", "good")
        await until("the other one takes its place", lambda: "duplicate" not in reasons(fleet))
        assert set(followed(fleet)) == {"tcp://127.77.0.1:5557", "tcp://127.77.0.5:5557"}

    with api:
        api.put("pods", pod("good", "127.77.0.1", annotations=MODEL))
        api.put("pods", pod("twin", "127.77.0.1", annotations=MODEL))
        api.put("pods", pod("bad", "127.77.0.2", annotations={**MODEL, "kvindexer.io/ranks": "many"}))
        api.put("pods", pod("far", "10.1.1.1", annotations=MODEL))
        api.put("pods", pod("typo", "127.77.0.5", annotations={**MODEL, "kvindexer.io/rank": "2"}))
        finding(scenario, api, tmp_path, allowed_endpoints=("tcp://127.*",))


def test_a_selector_that_chooses_no_pod_is_told(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await until("told", lambda: reasons(fleet) == ["no_pods"])
        (problem,) = fleet.finding().problems
        assert "app=elsewhere" in problem.message
        assert not problem.serious  # everything may be scaled to nothing
        assert fleet.ready

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path, discovery_selector="app=elsewhere")


# By hand


def by_hand(address: str, **fields: str) -> SourceSpec:
    endpoint = f"tcp://{address}:5557"
    return SourceSpec(instance=fields.pop("instance", "mine"), model="m", block_size=4, endpoint=endpoint, **fields)  # type: ignore[arg-type]


def test_what_the_settings_name_is_followed_as_they_name_it(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await until("told", lambda: reasons(fleet) == ["registered"])
        assert [spec.instance for spec in fleet.sources().values()] == ["mine"]
        assert not fleet.finding().problems[0].serious
        assert fleet.finding().followed == 0

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path, sources=(by_hand("127.77.0.1"),))


def test_a_registration_takes_a_found_pod_over_and_gives_it_back(api: KubeApi, tmp_path: Path) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        with pytest.raises(ConflictError, match="found by discovery"):
            fleet.unregister("127.77.0.1:8000")
        assert fleet.register(by_hand("127.77.0.1"))
        await until("told", lambda: reasons(fleet) == ["registered"])
        assert [spec.instance for spec in fleet.sources().values()] == ["mine"]
        api.put("pods", pod("b", "127.77.0.2", annotations=MODEL))
        await until("b", lambda: len(fleet.sources()) == 2)
        assert fleet.unregister("mine") == [by_hand("127.77.0.1")]
        await equal(fleet, api)

    with api:
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path)


# InferencePools


def test_the_pods_of_pools_of_both_kinds_are_followed_as_the_pools_change(api: KubeApi, tmp_path: Path) -> None:
    def labelled(name: str, address: str, app: str) -> None:
        found = pod(name, address, annotations=MODEL, labels={"app": app})
        del found["metadata"]["labels"]["llm-d.ai/inference-serving"]
        api.put("pods", found)

    def instances(fleet: LiveFleet) -> set[str]:
        return {spec.instance for spec in fleet.sources().values()}

    async def scenario(fleet: LiveFleet) -> None:
        await until("both", lambda: instances(fleet) == {"127.77.0.1:8000", "127.77.0.2:9000"})
        api.put(V1, pool("new", {"app": "c"}))
        await until("another selector", lambda: instances(fleet) == {"127.77.0.3:8000", "127.77.0.2:9000"})
        api.put(V1, pool("new", {"app": "c"}, (8100,)))
        await until("another port", lambda: instances(fleet) == {"127.77.0.3:8100", "127.77.0.2:9000"})
        api.put(V1, {"metadata": {"name": "new"}, "spec": {"selector": {"matchLabels": {}}}})
        await until("told", lambda: reasons(fleet) == ["bad_pool"])
        assert instances(fleet) == {"127.77.0.3:8100", "127.77.0.2:9000"}
        api.delete(V1, "new")
        await until("gone", lambda: instances(fleet) == {"127.77.0.2:9000"})
        await until("told", lambda: reasons(fleet) == ["no_pool"])
        api.put(V1ALPHA2, old_pool("new", {"app": "a"}, 7000))
        await until("back as the other kind", lambda: instances(fleet) == {"127.77.0.1:7000", "127.77.0.2:9000"})
        await until("well", lambda: reasons(fleet) == [])

    with api:
        labelled("a", "127.77.0.1", "a")
        labelled("b", "127.77.0.2", "b")
        labelled("c", "127.77.0.3", "c")
        api.put(V1, pool("new", {"app": "a"}))
        api.put(V1ALPHA2, old_pool("old", {"app": "b"}, 9000))
        finding(scenario, api, tmp_path, discovery_selector="", discovery_pools=("new", "ns/old"))


def test_a_cluster_without_pools_is_told_and_pods_by_label_are_followed_all_the_same(
    api: KubeApi, tmp_path: Path
) -> None:
    async def scenario(fleet: LiveFleet) -> None:
        await equal(fleet, api)
        await until("told", lambda: reasons(fleet) == ["not_found"])
        api.groups |= {V1}
        api.put(V1, pool("p", {"app": "x"}))
        await until("well", lambda: reasons(fleet) == [])

    with api:
        api.groups = {"pods"}
        api.put("pods", pod("a", "127.77.0.1", annotations=MODEL))
        finding(scenario, api, tmp_path, discovery_pools=("p",))


# What engines are asked


def test_an_engine_says_its_model_when_it_is_up(api: KubeApi, tmp_path: Path) -> None:
    http = free_port()
    said = {"kvindexer.io/event-port": "5557", "kvindexer.io/http-port": str(http)}

    async def scenario(fleet: LiveFleet) -> None:
        await until("told", lambda: reasons(fleet) == ["engine_silent"])
        assert fleet.finding().waiting == 1
        assert fleet.ready  # an engine that is not up holds nothing
        with engine_http("127.77.3.1", http) as server:
            server.status, server.models = 503, models("base", "adapter")
            await until("asked", lambda: server.asked > 2)
            assert followed(fleet) == {}
            server.status = 200
            await until("followed", lambda: [spec.model for spec in fleet.sources().values()] == ["base"])
            assert (reasons(fleet), fleet.finding().waiting) == ([], 0)
            asked = server.asked
            api.put("pods", restarted(found))
            await until("asked again in another life", lambda: server.asked > asked)

    with api:
        found = api.put("pods", pod("a", "127.77.3.1", annotations=said))
        finding(scenario, api, tmp_path)


def test_an_engine_without_a_model_is_a_problem_until_it_has_one(api: KubeApi, tmp_path: Path) -> None:
    http = free_port()
    said = {"kvindexer.io/event-port": "5557", "kvindexer.io/http-port": str(http)}
    with api, engine_http("127.77.3.1", http) as server:

        async def scenario(fleet: LiveFleet) -> None:
            await until("told", lambda: reasons(fleet) == ["no_model"])
            server.models = models("m")
            await until("followed", lambda: len(fleet.sources()) == 1)
            await until("well", lambda: reasons(fleet) == [])

        api.put("pods", pod("a", "127.77.3.1", annotations=said))
        finding(scenario, api, tmp_path)


def test_an_engine_that_lists_its_publishers_is_followed_by_its_list(api: KubeApi, tmp_path: Path) -> None:
    http, port, replay = free_port(), free_port(), free_port()
    said = {"kvindexer.io/http-port": str(http), "kvindexer.io/block-size": "4"}
    with api, EnginePod("127.77.4.1", port, replay) as one, engine_http("127.77.4.1", http) as server:
        _list(server, port, replay)

        async def scenario(fleet: LiveFleet) -> None:
            await until("followed", lambda: [report.source for report in fleet.reports()] == [one.engine.endpoint])
            await connected(one.engine)
            one.engine.run_request([1] * 30)
            await agrees(fleet, one.engine)
            (spec,) = fleet.sources().values()
            assert (spec.instance, spec.model) == (f"127.77.4.1:{http}", "m")
            await until("ready", lambda: fleet.ready)
            mine = SourceSpec(instance="mine", model="m", block_size=4, endpoint=one.engine.endpoint)
            assert fleet.register(mine)  # what is listed gives way, too
            assert list(fleet.sources().values()) == [mine]
            fleet.unregister("mine")
            await until("back", lambda: [each.instance for each in fleet.sources().values()] == [spec.instance])
            api.delete("pods", "a")
            await until("gone", lambda: fleet.reports() == [])

        api.put("pods", pod("a", "127.77.4.1", annotations=said))
        finding(scenario, api, tmp_path)


def _list(server: EngineHttp, port: int, replay: int) -> None:
    server.models = models("m")
    server.listed = {"0": {"endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://*:{replay}", "topic": ""}}
