"""Values that contradict each other, or that nobody knows, end `helm install` with a message that says what to do."""

from __future__ import annotations

import re
from typing import Any, Final

import pytest

from charts import CHART, Refused, objects, texts
from kvindexer.settings import Settings

SIDECAR: Final = {"mode": "sidecar", "sidecar": {"serviceAccountName": "epp"}}
REVIEW: Final = {"audience": "kvindexer", "roles": {"ann": ["query"]}}
PROTECT: Final = {"protectEngines": {"enabled": True}}

CONTRADICTIONS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a setting that a value decides": (
        {"config": {"discovery_selector": "a=b"}},
        "config.discovery_selector: set discovery.selector instead",
    ),
    "a secret in a ConfigMap": ({"config": {"store_password": "x"}}, "set store.existingSecret instead"),
    "a key in a ConfigMap": ({"config": {"tokenizer_api_key": "x"}}, "set extraEnv, as KVINDEXER_TOKENIZER_API_KEY"),
    "a variable that a value decides": (
        {"extraEnv": [{"name": "KVINDEXER_STORE_PASSWORD", "value": "x"}]},
        "extraEnv KVINDEXER_STORE_PASSWORD: set store.existingSecret instead",
    ),
    "a variable that a setting hides": (
        {"config": {"max_sources": 1}, "extraEnv": [{"name": "KVINDEXER_MAX_SOURCES", "value": "2"}]},
        "extraEnv KVINDEXER_MAX_SOURCES: config.max_sources wins over it",
    ),
    "loopback": ({"host": "127.0.0.1"}, "at 127.0.0.1 neither callers nor the kubelet reach the pod"),
    "loopback by name": ({"host": "localhost"}, "at localhost neither"),
    "loopback of IPv6": ({**SIDECAR, "host": "::1"}, "in sidecar mode the service binds to loopback by itself"),
    "one port twice": ({"ports": {"http": 9090}}, "ports.probe: 9090 is ports.http already"),
    "one port twice beside a scheduler": (
        {"mode": "sidecar", "sidecar": {"serviceAccountName": "epp", "probePort": 8090}},
        "sidecar.probePort: 8090 is ports.http already",
    ),
    "nothing to look for": ({"discovery": {"selector": ""}}, "give a label selector, or discovery.pools"),
    "replay at the port of events": (
        {"discovery": {"replayPort": 5557}},
        "5557 must be at least 1 ports away from discovery.eventPort 5557",
    ),
    "ranks that reach replay": (
        {"discovery": {"replayPort": 5560}, "networkPolicy": {"engines": {"ranks": 8}}},
        "5560 must be at least 8 ports away",
    ),
    "ranks of replay that reach events": (
        {"discovery": {"replayPort": 5550}, "networkPolicy": {"engines": {"ranks": 8}}},
        "5550 must be at least 8 ports away",
    ),
    "places, and nobody who looks": ({"discovery": {"enabled": False, "pools": ["a"]}}, "nobody would look there"),
    "two stores": (
        {"store": {"url": "redis://r"}, "valkey": {"enabled": True}},
        "valkey.enabled: there is a store.url, too",
    ),
    "a password of another store": (
        {"store": {"existingSecret": "s"}, "valkey": {"enabled": True}},
        "the password of the Valkey beside the service is valkey.existingSecret",
    ),
    "a password of no store": ({"store": {"existingSecret": "s"}}, "there is no store.url that the password is for"),
    "an authority without TLS": (
        {"store": {"url": "redis://r", "caSecret": "ca"}},
        "store.caSecret: store.url does not begin with rediss",
    ),
    "a password in the URL": (
        {"store": {"url": "redis://:hunter2@r:6379"}},
        "store.url: has a password, which would stand in a ConfigMap",
    ),
    "more memory than there is": (
        {"valkey": {"enabled": True, "maxmemory": "1gb"}},
        "valkey.maxmemory: 1gb does not fit into valkey.resources.limits.memory 1Gi",
    ),
    "open and closed": (
        {"auth": {"enabled": False, "existingSecret": "t"}},
        "auth.enabled: false, and a way for callers to say who they are",
    ),
    "nobody may do anything": (
        {"auth": {"kubernetes": {"audience": "a"}}},
        "auth.kubernetes.roles: nobody has a role",
    ),
    "roles without audience": (
        {"auth": {"kubernetes": {"roles": {"a": ["query"]}}}},
        "auth.kubernetes.audience: there are roles",
    ),
    "certificates of whom": (
        {"auth": {"certificates": {"a": ["query"]}}},
        "auth.certificates: needs tls.clientCASecret",
    ),
    "client certificates without TLS": (
        {"tls": {"clientCASecret": "ca"}},
        "tls.clientCASecret: needs tls.existingSecret",
    ),
    "fewer than fewest": (
        {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}},
        "autoscaling.minReplicas: 5 is more than maxReplicas 4",
    ),
    "a share of nothing": (
        {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}},
        "autoscaling.enabled: needs resources.requests.cpu",
    ),
    "both budgets": (
        {"podDisruptionBudget": {"minAvailable": 1, "maxUnavailable": 1}, "replicas": 3},
        "give minAvailable or maxUnavailable, not both",
    ),
    "no drain": (
        {"podDisruptionBudget": {"minAvailable": 2}, "replicas": 2},
        "minAvailable: 2 of 2 replicas would let no node be drained",
    ),
    "no drain by share": ({"podDisruptionBudget": {"minAvailable": "100%"}}, "100% of 1 replicas"),
    "no drain of a scaled one": (
        {"podDisruptionBudget": {"minAvailable": 2}, "replicas": 9, "autoscaling": {"enabled": True}},
        "minAvailable: 2 of 2 replicas",
    ),
    "none may be away": (
        {"podDisruptionBudget": {"maxUnavailable": 0}},
        "maxUnavailable: 0 would let no node be drained",
    ),
    "killed too early": (
        {"terminationGracePeriodSeconds": 19},
        "terminationGracePeriodSeconds: 19 s are less than the 20 s that",
    ),
    "a class of no priority": ({"priorityClass": {"create": True, "value": 0}}, "priorityClass.value: is 0"),
    "scraped twice": (
        {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "would both scrape every pod",
    ),
    "links to nowhere": ({"metrics": {"prometheusRule": {"enabled": True}}}, "runbookBaseUrl: give the address"),
    "protected without discovery": (
        {"networkPolicy": PROTECT, "discovery": {"enabled": False}},
        "it is not known which pods are engines",
    ),
    "protected pools": (
        {"networkPolicy": PROTECT, "discovery": {"pools": ["a"]}},
        "needs a discovery.selector of the form name=value,...",
    ),
    "protected sets": (
        {"networkPolicy": PROTECT, "discovery": {"selector": "a in (b, c)"}},
        "needs a discovery.selector of the form name=value,...",
    ),
    "protected from the sidecar": ({**SIDECAR, "networkPolicy": PROTECT}, "protectEngines: needs sidecar.podLabels"),
    "protected and open": (
        {
            "networkPolicy": {"protectEngines": {"enabled": True, "openPorts": [5560]}, "engines": {"ranks": 4}},
        },
        "openPorts: 5560 is a port of events or replay",
    ),
    "a sidecar that is scaled": ({**SIDECAR, "autoscaling": {"enabled": True}}, "there is no workload to scale"),
    "a sidecar of three": ({**SIDECAR, "replicas": 3}, "replicas: 3, and in sidecar mode each pod"),
    "a sidecar with a service": (
        {**SIDECAR, "metrics": {"serviceMonitor": {"enabled": True}}},
        "use metrics.podMonitor",
    ),
    "a sidecar that is not found": (
        {**SIDECAR, "metrics": {"podMonitor": {"enabled": True}}},
        "it needs sidecar.podLabels",
    ),
    "a sidecar of priority": (
        {**SIDECAR, "priorityClass": {"create": True}},
        "in sidecar mode the pod is the scheduler's",
    ),
    "a sidecar without rights": (
        {"mode": "sidecar"},
        "sidecar.serviceAccountName: name the ServiceAccount of the pods",
    ),
    "a sidecar that looks tokens up": (
        {"mode": "sidecar", "discovery": {"enabled": False}, "auth": {"kubernetes": REVIEW}},
        "sidecar.serviceAccountName: name the ServiceAccount of the pods",
    ),
    "a sidecar with an account": (
        {**SIDECAR, "serviceAccount": {"name": "own"}},
        "serviceAccount.name: in sidecar mode the account is the scheduler's",
    ),
    "no account": ({"serviceAccount": {"create": False}}, "serviceAccount.name: none is to be made"),
    "an account of another mode": (
        {"sidecar": {"serviceAccountName": "epp"}},
        "sidecar.serviceAccountName: is for mode: sidecar, and it is deployment",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_named(case: str) -> None:
    values, said = CONTRADICTIONS[case]
    with pytest.raises(Refused) as caught:
        texts(values)
    message = " ".join(str(caught.value).split())
    assert "These values of kvindexer can't be used:" in message
    assert said in message
    assert message.count(" - ") == 1, "one mistake, one line"
    assert "hunter2" not in message


def refusal(values: dict[str, Any]) -> str:
    """What is said of the values."""
    try:
        texts(values)
    except Refused as refused:
        return str(refused)
    return ""


def test_every_refusal_has_its_case() -> None:
    """By the words that each begins with, as the template has them."""
    template = (CHART / "templates" / "_validate.tpl").read_text()
    written = re.findall(r'append \$wrong (?:\(printf )?"([^"]+)"', template)
    assert len(written) >= 40
    said = "\n".join(refusal(values) for values, _ in CONTRADICTIONS.values())
    for text in written:
        assert re.search(re.sub(r"%[sdv]", ".+", re.escape(text)), said), text


@pytest.mark.parametrize(
    ("maxmemory", "limit", "fits"),
    [
        ("512mb", "1Gi", True),
        ("1gb", "1.5Gi", True),
        ("1g", "1Gi", True),
        ("1073741823", "1Gi", True),
        ("1073741824", "1Gi", False),
        ("2000m", "2G", False),
        ("600mb", "512Mi", False),
        ("8gb", None, True),
        ("8gb", "1Ti", True),  # not a unit that is known here: nothing is claimed
    ],
)
def test_memory_is_compared_whatever_its_unit(maxmemory: str, limit: str | None, fits: bool) -> None:  # noqa: FBT001 - a case
    resources = {"limits": {"memory": limit}}
    said = refusal({"valkey": {"enabled": True, "maxmemory": maxmemory, "resources": resources}})
    assert (said == "") is fits


def test_all_mistakes_are_named_at_once() -> None:
    values = {"priorityClass": {"create": True, "value": 0}, "host": "127.0.0.1", "store": {"existingSecret": "s"}}
    with pytest.raises(Refused) as caught:
        texts(values)
    assert str(caught.value).count("\n  - ") == 3


def test_a_refusal_is_not_repeated_for_a_subchart_that_is_not_a_sidecar() -> None:
    """Without a contradiction there is nothing: the template that checks makes no object."""
    assert texts({})["kvindexer/templates/validate.yaml"].strip() == ""


UNKNOWN: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a misspelled setting": ({"config": {"drian_s": 1}}, "drian_s"),
    "a misspelled value": ({"replica": 3}, "replica"),
    "a misspelled value inside": ({"discovery": {"namespace": "a"}}, "namespace"),
    "another mode": ({"mode": "daemonset"}, "/mode"),
    "no replica": ({"replicas": 0}, "/replicas"),
    "replicas as text": ({"replicas": "3"}, "/replicas"),
    "a port that is none": ({"ports": {"http": 70000}}, "/ports/http"),
    "another database": ({"store": {"url": "memcached://m"}}, "/store/url"),
    "a role that is none": ({"auth": {"kubernetes": {"roles": {"a": ["root"]}}}}, "/auth/kubernetes/roles/a"),
    "a digest that is none": ({"image": {"digest": "latest"}}, "/image/digest"),
    "a spread that is none": ({"topologySpread": {"zone": "Maybe"}}, "/topologySpread/zone"),
    "a variable without a name": ({"extraEnv": [{"value": "x"}]}, "/extraEnv/0"),
    "a peer that is none": ({"networkPolicy": {"callers": [{"pods": {}}]}}, "/networkPolicy/callers/0"),
    "callers that are nobody, which is everybody": ({"networkPolicy": {"callers": []}}, "/networkPolicy/callers"),
    "a namespace that is none": ({"discovery": {"namespaces": ["A_b"]}}, "/discovery/namespaces/0"),
    "memory that is none": ({"valkey": {"maxmemory": "lots"}}, "/valkey/maxmemory"),
    "a share that is none": ({"podDisruptionBudget": {"minAvailable": "half"}}, "/podDisruptionBudget/minAvailable"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_nobody_knows_is_refused_by_the_schema(case: str) -> None:
    values, said = UNKNOWN[case]
    with pytest.raises(Refused) as caught:
        objects(values)
    assert said in str(caught.value)
    assert "values of kvindexer can't be used" not in str(caught.value)


def test_values_that_decide_settings_name_settings_that_there_are() -> None:
    template = (CHART / "templates" / "_validate.tpl").read_text()
    owned = re.findall(
        r"^(\w+): .+$", template.partition('"kvindexer.owned"')[2].partition("{{- end")[0], re.MULTILINE
    )
    assert len(owned) > 25
    assert set(owned) <= set(Settings.model_fields)
    config = (CHART / "templates" / "_config.tpl").read_text()
    written = set(re.findall(r'set \$settings "(\w+)"', config))
    assert written - {"drain_s"} == set(owned) - {"replica", "store_password", "tokenizer_api_key"}
