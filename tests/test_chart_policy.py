"""Rights and policies of the chart, exactly: who may read what, and who may talk to whom at which port."""

from __future__ import annotations

from typing import Any, Final

import pytest

from charts import NAMESPACE, RELEASE, Object, objects, one

NAME: Final = f"{RELEASE}-kvindexer"
INDEXER: Final = {
    "app.kubernetes.io/name": "kvindexer",
    "app.kubernetes.io/instance": RELEASE,
    "app.kubernetes.io/component": "indexer",
}
PODS: Final = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
POOLS: Final = {
    "apiGroups": ["inference.networking.k8s.io"],
    "resources": ["inferencepools"],
    "verbs": ["get", "list", "watch"],
}
REVIEWS: Final = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
REVIEW: Final = {"audience": "kvindexer", "roles": {"system:serviceaccounts:llm-d": ["query"]}}
SIDECAR: Final = {"mode": "sidecar", "sidecar": {"serviceAccountName": "epp", "podLabels": {"app": "epp"}}}

Rights = dict[str, tuple[list[Object], list[tuple[str, str]]]]


def rights(values: dict[str, Any]) -> Rights:
    """Namespace (or `everywhere`) -> rules, and the accounts that have them."""
    found = objects(values)
    made: Rights = {}
    for role in found:
        if role["kind"] in {"Role", "ClusterRole"}:
            where = role["metadata"].get("namespace", "everywhere")
            (binding,) = [
                each
                for each in found
                if each["kind"] == f"{role['kind']}Binding"
                and each["metadata"].get("namespace", "everywhere") == where
            ]
            assert binding["roleRef"] == {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": role["kind"],
                "name": role["metadata"]["name"],
            }
            assert {subject["kind"] for subject in binding["subjects"]} == {"ServiceAccount"}
            accounts = [(subject["namespace"], subject["name"]) for subject in binding["subjects"]]
            assert where not in made
            made[where] = (role["rules"], accounts)
    return made


OWN: Final = [(NAMESPACE, NAME)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {NAMESPACE: ([PODS], OWN)}),
        ({"discovery": {"namespaces": ["a", "b"]}}, {"a": ([PODS], OWN), "b": ([PODS], OWN)}),
        ({"discovery": {"pools": ["qwen"]}}, {NAMESPACE: ([PODS, POOLS], OWN)}),
        (
            {"discovery": {"namespaces": ["a"], "pools": ["b/llama", "a/qwen", "b/other"]}},
            {"a": ([PODS, POOLS], OWN), "b": ([PODS, POOLS], OWN)},
        ),
        ({"discovery": {"enabled": False}}, {}),
        ({"rbac": {"create": False}, "auth": {"kubernetes": REVIEW}}, {}),
        (
            {"auth": {"kubernetes": REVIEW}, "discovery": {"enabled": False}},
            {"everywhere": ([REVIEWS], OWN)},
        ),
        ({"auth": {"kubernetes": REVIEW}}, {NAMESPACE: ([PODS], OWN), "everywhere": ([REVIEWS], OWN)}),
        ({"auth": {"existingSecret": "t"}}, {NAMESPACE: ([PODS], OWN)}),
        ({"serviceAccount": {"create": False, "name": "x"}}, {NAMESPACE: ([PODS], [(NAMESPACE, "x")])}),
        (SIDECAR, {NAMESPACE: ([PODS], [(NAMESPACE, "epp")])}),
        ({"mode": "statefulset"}, {NAMESPACE: ([PODS], OWN)}),
    ],
)
def test_rights_are_these_and_no_others(values: dict[str, Any], expected: Rights) -> None:
    assert rights(values) == expected


def test_a_sidecar_has_no_account_of_its_own() -> None:
    assert not [found for found in objects(SIDECAR) if found["kind"] == "ServiceAccount"]


def policy(values: dict[str, Any], name: str = NAME) -> Object:
    spec: Object = one(objects(values), "NetworkPolicy", name)["spec"]
    return spec


def at(ports: list[Any], protocol: str = "TCP") -> list[Object]:
    """Ports as rules have them; a pair is a range."""
    return [
        {"protocol": protocol, "port": port[0], "endPort": port[1]}
        if isinstance(port, tuple)
        else {"protocol": protocol, "port": port}
        for port in ports
    ]


def namespace(name: str, **more: Any) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}, **more}


ENGINES: Final = namespace(NAMESPACE, podSelector={"matchLabels": {"llm-d.ai/inference-serving": "true"}})
NAMES: Final = {
    "to": [namespace("kube-system"), {"ipBlock": {"cidr": "169.254.20.10/32"}}],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}
NAMED: Final = ["kv-events", "kv-replay"]
API_SERVER: Final = {"ports": at([443, 6443])}


def test_without_further_values_the_door_is_open_to_the_namespace_and_to_prometheus() -> None:
    test = {**INDEXER, "app.kubernetes.io/component": "test"}
    spec = policy({})
    assert spec["podSelector"] == {"matchLabels": INDEXER}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [
        {"from": [{"podSelector": {}}], "ports": at([8090])},
        {"from": [namespace("monitoring")], "ports": at([9090])},
        {"from": [{"podSelector": {"matchLabels": test}}], "ports": at([8090, 9090])},
    ]
    assert spec["egress"] == [NAMES, {"to": [ENGINES], "ports": at([5557, 5657, *NAMED, 8000])}, API_SERVER]


def test_ports_follow_the_settings_of_service_and_engines() -> None:
    values = {
        "ports": {"http": 80, "probe": 81},
        "discovery": {"eventPort": 6000, "replayPort": 7000, "httpPort": 8200},
        "networkPolicy": {"engines": {"ranks": 8, "extraPorts": [9000]}, "callers": [namespace("gateways")]},
        "tests": {"enabled": False},
    }
    spec = policy(values)
    assert spec["ingress"] == [
        {"from": [namespace("gateways")], "ports": at([80])},
        {"from": [namespace("monitoring")], "ports": at([81])},
    ]
    assert spec["egress"][1] == {"to": [ENGINES], "ports": at([(6000, 6007), (7000, 7007), *NAMED, 8200, 9000])}


def test_pods_may_name_their_replay_port_themselves() -> None:
    """It is reached at the usual port, another one, or not at all; the setting of all pods goes before."""
    for values, ports in (
        ({}, [5557, 5657]),
        ({"networkPolicy": {"engines": {"replayPort": 5558}}}, [5557, 5558]),
        ({"networkPolicy": {"engines": {"replayPort": None}}}, [5557]),
        ({"discovery": {"replayPort": 7000}}, [5557, 7000]),
    ):
        assert policy(values)["egress"][1]["ports"] == at([*ports, *NAMED, 8000])


@pytest.mark.parametrize(
    ("discovery", "expected"),
    [
        (
            {"namespaces": ["a", "b"], "selector": "x=1"},
            [("a", {"matchLabels": {"x": "1"}}), ("b", {"matchLabels": {"x": "1"}})],
        ),
        ({"selector": "x == 1, y=z"}, [(NAMESPACE, {"matchLabels": {"x": "1", "y": "z"}})]),
        ({"selector": "x in (1, 2)"}, [(NAMESPACE, {})]),
        ({"selector": "x!=1"}, [(NAMESPACE, {})]),
        ({"selector": "x=1,y!=2"}, [(NAMESPACE, {})]),
        ({"selector": "x=1,!y"}, [(NAMESPACE, {})]),
        ({"selector": "x=1,y"}, [(NAMESPACE, {})]),
        ({"selector": "x"}, [(NAMESPACE, {})]),
        ({"selector": "x=1", "pools": ["p", "other/q"]}, [(NAMESPACE, {}), ("other", {})]),
        ({"enabled": False}, [(NAMESPACE, {})]),
    ],
)
def test_engines_are_those_that_discovery_looks_for(
    discovery: dict[str, Any], expected: list[tuple[str, Object]]
) -> None:
    """Where a policy can't say the same it lets out to more pods, never to fewer: at these ports alone."""
    assert policy({"discovery": discovery})["egress"][1]["to"] == [
        namespace(name, podSelector=selector) for name, selector in expected
    ]


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("redis://redis", [6379]),
        ("redis://user@redis:6380/0", [6380]),
        ("rediss://redis.db.svc:6379/1?ssl_cert_reqs=none", [6379]),
        ("redis+sentinel://s1,s2:26380/mymaster/0", [26379, 26380, 6379]),
        ("redis+cluster://r1:7000,r2:7001,r3:7000", [7000, 7001]),
        ("redis://[2001:db8::1]:6390/0", [6390]),
        ("redis://[2001:db8::1]/0", [6379]),
    ],
)
def test_the_way_to_the_store_is_open_at_its_ports(url: str, ports: list[int]) -> None:
    assert policy({"store": {"url": url}})["egress"][2] == {"ports": at(ports)}
    there = [namespace("databases")]
    narrowed = policy({"store": {"url": url}, "networkPolicy": {"store": there}})
    assert narrowed["egress"][2] == {"ports": at(ports), "to": there}


def test_the_small_valkey_is_for_the_indexer_alone() -> None:
    store = {**INDEXER, "app.kubernetes.io/component": "store"}
    rule = {"to": [{"podSelector": {"matchLabels": store}}], "ports": at([6379])}
    values = {"valkey": {"enabled": True}}
    assert policy(values)["egress"][2] == rule
    spec = policy(values, f"{NAME}-valkey")
    assert spec["podSelector"] == {"matchLabels": store}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"from": [{"podSelector": {"matchLabels": INDEXER}}], "ports": at([6379])}]
    assert "egress" not in spec, "it calls nobody"
    beside = policy({**SIDECAR, **values}, f"{NAME}-valkey")
    assert beside["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "epp"}}}]


def test_what_settings_name_by_address_is_reached() -> None:
    values: dict[str, Any] = {
        "config": {
            "sources": [
                {"instance": "a", "endpoint": "tcp://a:6001", "replay": "tcp://10.0.0.1:6002"},
                {"instance": "b", "endpoint": "http://b", "replay_endpoint": "tcp://b:6002"},
            ],
            "tokenizers": {"m": {"engines": ["https://render", "http://r:8100/x"]}, "n": {"path": "/n"}},
            "otlp_endpoint": "http://collector:4318",
        },
    }
    assert policy(values)["egress"][2] == {"ports": at([6001, 6002, 80, 443, 8100, 4318])}
    there = [namespace("far")]
    values["networkPolicy"] = {"engines": {"static": there}}
    assert policy(values)["egress"][2]["to"] == there


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({}, True),
        ({"discovery": {"enabled": False}}, False),
        ({"discovery": {"enabled": False}, "auth": {"kubernetes": REVIEW}}, True),
    ],
)
def test_the_way_to_the_api_server_is_open_to_who_asks_it(values: dict[str, Any], asked: bool) -> None:  # noqa: FBT001 - a case
    assert (API_SERVER in policy(values)["egress"]) is asked


def test_the_ports_of_events_are_closed_to_all_but_the_indexer() -> None:
    """On both sides the same ports; what engines serve stays open."""
    values: dict[str, Any] = {
        "discovery": {"namespaces": ["a", "b"], "replayPort": 5657},
        "networkPolicy": {"protectEngines": {"enabled": True, "openPorts": [8000, 5600]}, "engines": {"ranks": 2}},
    }
    found = [each for each in objects(values) if each["metadata"]["name"] == f"{NAME}-engines"]
    assert [each["metadata"]["namespace"] for each in found] == ["a", "b"]
    events = at([(5557, 5558), (5657, 5658), *NAMED])
    assert policy(values)["egress"][1]["ports"][:4] == events
    for each in found:
        assert each["spec"] == {
            "podSelector": {"matchLabels": {"llm-d.ai/inference-serving": "true"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [namespace(NAMESPACE, podSelector={"matchLabels": INDEXER})], "ports": events},
                {"ports": at([8000, 5600])},
            ],
        }
    (beside,) = [
        each["spec"]["ingress"][0]["from"]
        for each in objects({**SIDECAR, "networkPolicy": {"protectEngines": {"enabled": True}}})
        if each["metadata"]["name"] == f"{NAME}-engines"
    ]
    assert beside == [namespace(NAMESPACE, podSelector={"matchLabels": {"app": "epp"}})]


def test_the_pod_of_a_scheduler_is_left_alone() -> None:
    """A policy for it would close what the scheduler needs."""
    assert not [found for found in objects(SIDECAR) if found["kind"] == "NetworkPolicy"]


def test_further_rules_come_as_they_are() -> None:
    values = {
        "networkPolicy": {"extraIngress": [{"ports": [{"port": 1}]}], "extraEgress": [{"ports": [{"port": 2}]}]}
    }
    spec = policy(values)
    assert (spec["ingress"][-1], spec["egress"][-1]) == ({"ports": [{"port": 1}]}, {"ports": [{"port": 2}]})
