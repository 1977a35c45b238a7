"""What pods mean: annotations, settings, lives, names, claims; nothing here does I/O."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kube_api import V1, V1ALPHA2, old_pool, pod, pool, restarted
from kvindexer.errors import SettingsError
from kvindexer.events.discovery import reading
from kvindexer.events.discovery.collection import Reason
from kvindexer.events.discovery.plan import Chosen, Plan, Planner
from kvindexer.events.discovery.pods import Pod, read_pool
from kvindexer.events.discovery.reading import Answer, Ask, Follow, Idle, Reading, Refused, read_pod
from kvindexer.events.discovery.selectors import Requirement, parse_selector
from kvindexer.settings import Settings, load_settings

PAGE = Path(__file__).parent.parent / "docs" / "discovery.md"
RULES = Settings(discovery="kubernetes")
NAMED = {"kvindexer.io/model": "m"}


def read(found: dict[str, Any], answer: Answer | None = None, **settings: Any) -> Reading:
    return read_pod(as_pod(found), Settings(discovery="kubernetes", **settings), (), answer)


def as_pod(found: dict[str, Any]) -> Pod:
    return msgspec.json.decode(msgspec.json.encode(found), type=Pod)


def plan_of(chosen: list[Chosen], **settings: Any) -> Plan:
    return Planner(Settings(discovery="kubernetes", **settings)).plan(chosen, {})


def one(reading: Reading) -> Any:
    """The one source of a pod."""
    assert isinstance(reading, Follow), reading
    (spec,) = reading.specs
    return spec


def refusal(reading: Reading) -> tuple[str, str]:
    assert isinstance(reading, Refused), reading
    return reading.problem.reason, reading.problem.message


# A pod as llm-d's guides make it


def test_a_pod_is_named_as_schedulers_know_it() -> None:
    """By address and port; its own names, with and without llm-d's rank, are aliases."""
    spec = one(read(pod("decode-0", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})))
    assert (spec.instance, spec.endpoint, spec.replay) == ("10.0.0.7:8000", "tcp://10.0.0.7:5556", None)
    assert spec.aliases == ("decode-0", "decode-0-rank-0", "ns/decode-0", "ns/decode-0-rank-0")
    assert (spec.model, spec.block_size, spec.tenant, spec.type, spec.rank) == ("m", 16, "default", "vllm", 0)


def test_what_a_pod_says_goes_before_what_the_settings_say_and_that_before_what_the_engine_says() -> None:
    settings = {"discovery_event_port": 6000, "discovery_replay_port": 6100, "discovery_model": "of-settings"}
    answer = Answer("of-engine", lists=True)
    said = {"kvindexer.io/model": "of-pod", "kvindexer.io/event-port": "7000", "kvindexer.io/replay-port": "7100"}
    ports = {"kv-events": 6500, "kv-replay": 6600}
    rows = [
        (said, ports, settings, ("of-pod", "tcp://10.0.0.7:7000", "tcp://10.0.0.7:7100")),
        ({}, ports, settings, ("of-settings", "tcp://10.0.0.7:6500", "tcp://10.0.0.7:6600")),
        ({}, {}, settings, ("of-settings", "tcp://10.0.0.7:6000", "tcp://10.0.0.7:6100")),
        ({}, {}, {}, ("of-engine", "http://10.0.0.7:8000", None)),
        ({"kvindexer.io/replay-port": "none"}, ports, settings, ("of-settings", "tcp://10.0.0.7:6500", None)),
    ]
    for said_by_pod, declared, chosen, expected in rows:
        spec = one(read(pod("a", "10.0.0.7", annotations=said_by_pod, ports=declared), answer, **chosen))
        assert (spec.model, spec.endpoint, spec.replay) == expected


def test_an_engine_without_a_list_publishes_where_engines_do_by_default() -> None:
    spec = one(read(pod("a", "10.0.0.7"), Answer("m", lists=False)))
    assert spec.endpoint == "tcp://10.0.0.7:5557"


def test_an_engine_is_asked_only_for_what_nobody_says() -> None:
    assert read(pod("a", "10.0.0.7", uid="u", annotations=NAMED))[2:] == ("http://10.0.0.7:8000", False, True)
    reading = read(pod("a", "10.0.0.7"), discovery_event_port=5557)
    assert isinstance(reading, Ask)
    assert (reading.for_model, reading.for_ports) == (True, False)
    assert isinstance(read(pod("a", "10.0.0.7"), discovery_event_port=5557, discovery_model="m"), Follow)


def test_labels_are_read_where_there_is_no_annotation() -> None:
    labels = {"kvindexer.io/model": "of-label", "kvindexer.io/tenant": "acme", "llm-d.ai/engine-type": "sglang"}
    spec = one(read(pod("a", "10.0.0.7", labels=labels, annotations={"kvindexer.io/event-port": "5557"})))
    assert (spec.model, spec.tenant, spec.type) == ("of-label", "acme", "sglang")
    annotations = {**NAMED, "kvindexer.io/event-port": "5557"}
    assert one(read(pod("a", "10.0.0.7", labels=labels, annotations=annotations))).model == "m"
    older = {"inference.networking.k8s.io/engine-type": "sglang"}
    assert one(read(pod("a", "10.0.0.7", labels=older, annotations=annotations))).type == "sglang"


def test_every_field_of_a_source_that_is_not_a_place_can_be_annotated() -> None:
    said = {
        "block-size": "64", "topic": "kv@", "lora": "l", "report-mode": "full", "offload-blocks-per-chunk": "4",
        "offload-connector": "true", "speculative-blocks": "1", "clear-lower-tiers": "true", "durable-tiers": "disk",
        "block-bytes": "1024", "type": "sglang", "tenant": "acme", "aliases": "x, y", "instance": "the-pod",
    }  # fmt: skip
    annotations = {f"kvindexer.io/{name}": text for name, text in said.items()} | NAMED
    spec = one(read(pod("a", "10.0.0.7", annotations=annotations, ports={"kv-events": 5556})))
    assert (spec.block_size, spec.topic, spec.lora, spec.report_mode) == (64, "kv@", "l", "full")
    assert (spec.offload_blocks_per_chunk, spec.offload_connector, spec.speculative_blocks) == (4, True, 1)
    assert (spec.clear_lower_tiers, spec.durable_tiers, spec.block_bytes) == (True, ("disk",), 1024)
    assert (spec.type, spec.tenant, spec.instance) == ("sglang", "acme", "the-pod")
    assert {"a", "10.0.0.7:8000", "x", "y"} <= set(spec.aliases)


def test_addresses_of_either_kind() -> None:
    spec = one(read(pod("a", "fd00::7", annotations=NAMED, ports={"kv-events": 5556})))
    assert (spec.instance, spec.endpoint) == ("[fd00::7]:8000", "tcp://[fd00::7]:5556")


# Ranks


def test_ranks_publish_one_port_further_each() -> None:
    said = {**NAMED, "kvindexer.io/ranks": "3", "kvindexer.io/replay-port": "5660"}
    reading = read(pod("a", "10.0.0.7", annotations=said, ports={"kv-events": 5556}))
    assert isinstance(reading, Follow)
    assert [(spec.instance, spec.rank, spec.endpoint, spec.replay) for spec in reading.specs] == [
        ("10.0.0.7:8000", rank, f"tcp://10.0.0.7:{5556 + rank}", f"tcp://10.0.0.7:{5660 + rank}") for rank in range(3)
    ]


def test_several_http_ports_are_several_instances_as_the_endpoint_picker_counts_them() -> None:
    found = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    reading = read_pod(as_pod(found), RULES, (8000, 8001))
    assert isinstance(reading, Follow)
    assert [(spec.instance, spec.rank, spec.endpoint, spec.aliases) for spec in reading.specs] == [
        ("10.0.0.7:8000", 0, "tcp://10.0.0.7:5556", ("a-rank-0", "ns/a-rank-0")),
        ("10.0.0.7:8001", 1, "tcp://10.0.0.7:5557", ("a-rank-1", "ns/a-rank-1")),
    ]


def test_the_ports_of_a_pool_are_its_pods_http_ports_unless_they_say_otherwise() -> None:
    found = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    plan = plan_of([Chosen([as_pod(found)]), Chosen([as_pod(found)], (9000,))])
    assert [spec.instance for spec in plan.wanted.values()] == ["10.0.0.7:9000"]
    found["metadata"]["annotations"]["kvindexer.io/http-port"] = "7000"
    plan = plan_of([Chosen([as_pod(found)], (9000,))])
    assert [spec.instance for spec in plan.wanted.values()] == ["10.0.0.7:7000"]


# Lives


def test_only_pods_whose_engine_runs_and_that_have_an_address_are_followed() -> None:
    for found in (
        pod("a", None, annotations=NAMED),
        pod("a", "10.0.0.7", annotations=NAMED, phase="Pending"),
        pod("a", "10.0.0.7", annotations=NAMED, phase="Succeeded"),
        pod("a", "10.0.0.7", annotations=NAMED, phase="Failed"),
        pod("a", "10.0.0.7", annotations=NAMED, running=False),
        pod("a", "10.0.0.7", annotations=NAMED, deleting=True),
        pod("a", "10.0.0.7", annotations={**NAMED, "kvindexer.io/follow": "false"}),
        {"metadata": {"name": "a"}},
    ):
        assert read(found) == Idle()


def test_a_pod_that_is_not_ready_is_followed() -> None:
    """Its engine may publish already, and what it holds then is held when it is ready."""
    found = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    found["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    found["status"]["containerStatuses"][0]["ready"] = False
    assert isinstance(read(found), Follow)


def test_a_pod_that_is_made_again_and_a_container_that_is_started_again_are_other_lives() -> None:
    found = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    again = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    lives = {one(read(each)).life for each in (found, again, restarted(found), restarted(restarted(found)))}
    assert len(lives) == 4
    assert one(read(found)) == one(read(found))


def test_the_life_is_that_of_the_engines_container_not_of_its_neighbours() -> None:
    found = pod("a", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556})
    found["spec"]["containers"].insert(0, {"name": "proxy"})
    side = {"name": "proxy", "containerID": "containerd://side-1", "state": {"running": {}}, "restartCount": 0}
    found["status"]["containerStatuses"].append(side)
    before = one(read(found)).life
    side["containerID"] = "containerd://side-2"
    assert one(read(found)).life == before
    named = {**NAMED, "kvindexer.io/container": "proxy", "kvindexer.io/event-port": "5556"}
    found["metadata"]["annotations"] = named
    assert one(read(found)).life.endswith("/side-2")
    found["metadata"]["annotations"] = {**named, "kvindexer.io/container": "nobody"}
    assert read(found) == Idle()


# What is wrong


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("follow", "maybe", "true or false"),
        ("event-port", "0", "a number from 1 to 65535"),
        ("event-port", "70000", "a number from 1 to 65535"),
        ("event-port", "five", "a number from 1 to 65535"),
        ("replay-port", "", "a number from 1 to 65535"),
        ("http-port", "8000,8000", "one port, or different ones"),
        ("http-port", "", "one port, or different ones"),
        ("ranks", "0", "a number from 1 to 1024"),
        ("ranks", "-1", "a number from 1 to 1024"),
        ("block-size", "big", "a whole number"),
        ("block-size", "0", "greater than 0"),
        ("type", "llama", "'vllm', 'sglang'"),
        ("report-mode", "loud", "'normal' or 'full'"),
        ("durable-tiers", "attic", "names of tiers"),
        ("offload-connector", "perhaps", "true or false"),
    ],
)
def test_an_annotation_that_can_not_be_says_its_name_its_value_and_what_was_expected(
    name: str, text: str, expected: str
) -> None:
    found = pod("a", "10.0.0.7", annotations={**NAMED, f"kvindexer.io/{name}": text}, ports={"kv-events": 5556})
    reason, message = refusal(read(found))
    assert reason == "bad_annotation"
    assert f"kvindexer.io/{name}" in message
    assert text in message
    assert expected in message


def test_ranks_need_room_between_the_ports() -> None:
    said = {**NAMED, "kvindexer.io/ranks": "2", "kvindexer.io/replay-port": "5557"}
    assert (
        "more than 1 ports away" in refusal(read(pod("a", "1.1.1.1", annotations=said, ports={"kv-events": 5556})))[1]
    )
    said = {**NAMED, "kvindexer.io/ranks": "2", "kvindexer.io/event-port": "65535"}
    assert "room for 2 ranks" in refusal(read(pod("a", "1.1.1.1", annotations=said)))[1]
    said = {**NAMED, "kvindexer.io/ranks": "3", "kvindexer.io/http-port": "8000,8001"}
    assert "as many as there are HTTP ports" in refusal(read(pod("a", "1.1.1.1", annotations=said)))[1]


def test_an_engine_that_names_no_model_is_a_problem_with_a_way_out() -> None:
    reading = read(pod("a", "10.0.0.7"), Answer(None, lists=False))
    assert refusal(reading) == ("no_model", "http://10.0.0.7:8000/v1/models names no model")


def test_a_name_that_means_nothing_is_told_and_stops_nothing() -> None:
    found = pod("a", "10.0.0.7", annotations={**NAMED, "kvindexer.io/eventport": "1"}, ports={"kv-events": 5556})
    reading = read(found)
    assert isinstance(reading, Follow)
    (note,) = reading.notes
    assert (note.reason, note.serious) == ("unknown_annotation", False)
    assert "kvindexer.io/eventport" in note.message


def test_of_two_pods_at_one_place_the_older_one_is_followed_and_the_other_one_is_a_problem() -> None:
    old = pod("old", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556}, created="2026-01-01T00:00:00Z")
    new = pod("new", "10.0.0.7", annotations=NAMED, ports={"kv-events": 5556}, created="2026-01-02T00:00:00Z")
    for order in ([old, new], [new, old]):
        plan = plan_of([Chosen([as_pod(found) for found in order])])
        assert plan.owners == {"tcp://10.0.0.7:5556": "ns/old"}
        (problem,) = plan.problems
        assert (problem.reason, problem.where) == ("duplicate", "ns/new")
        assert "ns/old" in problem.message


def test_two_pods_with_one_name_are_a_problem_too() -> None:
    said = {**NAMED, "kvindexer.io/instance": "same", "kvindexer.io/event-port": "5556"}
    pods = [as_pod(pod(name, f"10.0.0.{name}", annotations=said)) for name in ("1", "2", "3")]
    plan = plan_of([Chosen(pods)])
    assert list(plan.wanted) == ["tcp://10.0.0.1:5556"]
    assert [problem.reason for problem in plan.problems] == ["duplicate", "duplicate"]


def test_pods_past_the_bound_are_left_out_the_newest_first() -> None:
    pods = [as_pod(pod(f"p{n}", f"10.0.0.{n}", annotations=NAMED, ports={"kv-events": 1})) for n in range(1, 5)]
    plan = plan_of([Chosen(pods)], discovery_max_pods=2)
    assert list(plan.owners.values()) == ["ns/p1", "ns/p2"]
    assert [problem.reason for problem in plan.problems] == ["too_many_pods"]


# Pools and selectors


def test_pools_of_both_kinds_are_read() -> None:
    assert read_pool(pool("p", {"b": "2", "a": "1"}, (8000, 8001))["spec"]) == (
        (("a", "1"), ("b", "2")),
        (8000, 8001),
    )
    assert read_pool(old_pool("p", {"a": "1"}, 9000)["spec"]) == ((("a", "1"),), (9000,))


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        {},
        {"selector": {}},
        {"selector": {"matchLabels": {}}},
        {"selector": "app=x"},
        {"selector": {"a": 1}},
    ],
)
def test_a_pool_that_selects_nothing_or_everything_is_none(spec: object) -> None:
    with pytest.raises(ValueError, match=r"it has no|its selector"):
        read_pool(spec)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("a=b", (("a", "=", ("b",)),)),
        ("a==b, x/c!=d", (("a", "=", ("b",)), ("x/c", "!=", ("d",)))),
        ("t in (a, b),!z,w", (("t", "in", ("a", "b")), ("z", "!", ()), ("w", "exists", ()))),
        ("t notin (a)", (("t", "notin", ("a",)),)),
    ],
)
def test_selectors_are_read_as_kubectl_does(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_selector(text) == tuple(Requirement(*parts) for parts in expected)


@pytest.mark.parametrize("text", ["a=b=c", "a b", "a in (x", "(a)", "a in b", "=b", "a=-", "a,(b", "ä=b"])
def test_a_selector_with_a_slip_stops_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="discovery_selector"):
        Settings(discovery="kubernetes", discovery_selector=text)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"discovery_namespaces": ("Not_A_Name",)}, "discovery_namespaces"),
        ({"discovery_pools": ("a/b/c",)}, "discovery_pools"),
        ({"discovery_selector": " "}, "discovery_selector"),
        ({"discovery_event_port": 5557, "discovery_replay_port": 5557}, "discovery_replay_port"),
    ],
)
def test_settings_that_contradict_each_other_stop_the_start(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError, match=key):
        Settings(discovery="kubernetes", **settings)


# Whatever people write

words = st.text("abmk-./0158:,=#\0é ", max_size=12)
names = st.sampled_from(
    ["model", "event-port", "replay-port", "http-port", "ranks", "follow", "container", "instance", "aliases",
     "tenant", "block-size", "type", "durable-tiers", "whatever"]
)  # fmt: skip
numbers = st.sampled_from(["0", "1", "2", "5557", "65535", "65536", "8000,8001", "none", "-1", "²", "m", "default"])
said = st.dictionaries(names.map("kvindexer.io/{}".format), words | numbers, max_size=6)


@st.composite
def pods(draw: st.DrawFn) -> Pod:
    number = draw(st.integers(0, 5))
    return as_pod(
        pod(
            f"p{number}",
            draw(st.sampled_from([None, "10.0.0.1", "10.0.0.2", "fd00::1"])),
            uid=f"u{number}",
            annotations=draw(said),
            labels=draw(said),
            ports=draw(st.dictionaries(st.sampled_from(["kv-events", "kv-replay", "http"]), st.integers(1, 65535))),
            phase=draw(st.sampled_from(["Running", "Running", "Running", "Pending", ""])),
            running=draw(st.booleans()),
            created="2026-01-01T00:00:00Z",
        )
    )


@settings(max_examples=60)
@given(st.lists(pods(), max_size=6, unique_by=lambda each: each.uid), st.randoms(use_true_random=False))
def test_whatever_pods_say_the_plan_is_sound_and_does_not_depend_on_their_order(
    chosen: list[Pod], dice: random.Random
) -> None:
    planner = Planner(RULES)
    questions = planner.plan([Chosen(chosen)], {}).questions
    answers = {life: Answer("m", lists=False) for life in questions}
    first = planner.plan([Chosen(chosen)], answers)
    assert planner.plan([Chosen(dice.sample(chosen, len(chosen)))], answers) == first
    assert Planner(RULES).plan([Chosen(chosen)], answers) == first  # what was read before has no say
    holders = [(spec.tenant, spec.model, spec.instance, spec.rank, spec.type) for spec in first.wanted.values()]
    assert len(set(holders)) == len(holders)
    assert all(spec.endpoint == endpoint and spec.life for endpoint, spec in first.wanted.items())
    assert set(first.owners) == set(first.wanted)


# The page


def blocks(section: str) -> list[Any]:
    """The YAML of one section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def test_the_pod_of_the_page_becomes_the_source_that_the_page_says(tmp_path: Path) -> None:
    example, configuration = blocks("A complete example")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration))
    loaded = load_settings(tmp_path / "config.yaml", {}, {})
    example["status"] = pod("x", "10.0.0.7")["status"]
    example["status"]["containerStatuses"][0]["name"] = example["spec"]["containers"][0]["name"]
    found = as_pod(example)
    question = read_pod(found, loaded)
    assert isinstance(question, Ask)
    assert question[2:] == ("http://10.0.0.7:8000", True, False)
    spec = one(read_pod(found, loaded, (), Answer("Qwen/Qwen3-32B", lists=False)))
    assert (spec.instance, spec.model) == ("10.0.0.7:8000", "Qwen/Qwen3-32B")
    assert (spec.endpoint, spec.replay) == ("tcp://10.0.0.7:5556", "tcp://10.0.0.7:5657")


def test_the_page_lists_every_annotation_and_every_reason() -> None:
    text = PAGE.read_text()
    (listed,) = re.findall(r"^\| annotation \| meaning \|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    named = {name for row in listed.split("\n") for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == {*reading._PLACING, *reading._MEANING}
    (listed,) = re.findall(r"^\| reason \| serious \| meaning \|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    shown = {name for row in listed.split("\n") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    sources = "".join(path.read_text() for path in Path(reading.__file__).parent.glob("*.py"))
    assert shown == set(re.findall(r"FindingProblem\(\s*\"(\w+)\"", sources)) | set(get_args(Reason)) - {
        "ended",
        "expired",
    }


def test_the_rights_of_the_page_are_those_that_are_used() -> None:
    """What the fake API server is asked in the other tests: lists and watches of pods and pools."""
    role, more = blocks("Rights")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    groups = [V1.partition("/")[0], V1ALPHA2.partition("/")[0]]
    assert more == [{"apiGroups": groups, "resources": ["inferencepools"], "verbs": ["get", "list", "watch"]}]


def test_what_pods_mean_is_found_out_without_io() -> None:
    """And only one module knows the client library."""
    folder = Path(reading.__file__).parent
    for path in folder.glob("*.py"):
        names = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert not names & {"lightkube", "httpx2"} or path.stem == "cluster", path
        if path.stem in {"selectors", "pods", "reading", "plan", "collection"}:
            assert not names & {"asyncio", "httpx", "logging", "os", "pathlib", "socket", "time"}, path
