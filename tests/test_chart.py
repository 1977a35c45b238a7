"""The chart, for many values: it lints, Kubernetes takes what it makes, and what a reviewer looks at is always so."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
import yaml

from charts import (
    CHART,
    NAMESPACE,
    RELEASE,
    Object,
    containers,
    lint,
    objects,
    one,
    parsed,
    pod_specs,
    settings_file,
    texts,
)
from kubernetes_objects import check
from kvindexer.access.tokens import read_tokens
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.access import is_loopback

NAME: Final = f"{RELEASE}-kvindexer"
SECRETS: Final = "/run/secrets/kvindexer"
RULE: Final = {"enabled": True, "runbookBaseUrl": "https://git.example/kvindexer/blob/v0.1.0/"}
SIDECAR: Final = {"mode": "sidecar", "sidecar": {"serviceAccountName": "epp", "podLabels": {"app": "epp"}}}
SET: Final = {"mode": "statefulset"}
REVIEW: Final = {
    "audience": "kvindexer",
    "roles": {"system:serviceaccounts:llm-d": ["query"], "ann": {"roles": ["admin"]}},
}
TLS: Final = {"existingSecret": "tls", "clientCASecret": "ca"}
SOURCES: Final = [
    {"instance": "a", "model": "m", "block_size": 16, "endpoint": "tcp://10.0.0.1:6001", "replay": "tcp://a:6002"}
]

MATRIX: Final[dict[str, dict[str, Any]]] = {
    "as it is": {},
    "three replicas": {"replicas": 3},
    "scaled": {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 9}},
    "names": {"nameOverride": "cache-index", "fullnameOverride": "index", "commonLabels": {"team": "serving"}},
    "digest": {"image": {"digest": f"sha256:{'0' * 64}"}, "imagePullSecrets": [{"name": "pull"}]},
    "ports": {"ports": {"http": 8000, "probe": 8001}, "service": {"port": 80, "type": "LoadBalancer"}},
    "every address of IPv6": {"host": "::"},
    "namespaces": {"discovery": {"namespaces": ["a", "b"], "replayPort": 5657}},
    "sets": {"discovery": {"selector": "app in (vllm, sglang),!canary"}},
    "pools": {"discovery": {"selector": "", "pools": ["qwen", "other/llama"]}},
    "a model": {"discovery": {"model": "m", "tenant": "t", "blockSize": 64, "httpPort": 8200}},
    "no discovery": {"discovery": {"enabled": False}, "config": {"sources": SOURCES}},
    "redis": {"store": {"url": "redis://redis:6380/1", "existingSecret": "redis", "existingSecretKey": "pass"}},
    "redis with TLS": {"store": {"url": "rediss://redis/0?ssl_check_hostname=false", "caSecret": "ca"}},
    "sentinels": {"store": {"url": "redis+sentinel://s-1:26379,s-2:26380/mymaster/0"}},
    "cluster": {"store": {"url": "redis+cluster://redis", "namespace": "blue"}, "replicas": 3},
    "valkey": {"valkey": {"enabled": True}, "replicas": 2},
    "valkey that lasts": {
        "valkey": {"enabled": True, "existingSecret": "v", "persistence": {"enabled": True, "storageClass": "fast"}}
    },
    "everybody": {"auth": {"enabled": False}},
    "tokens": {"auth": {"existingSecret": "tokens", "existingSecretKey": "file"}, "tests": {"tokenSecret": "query"}},
    "review": {"auth": {"kubernetes": REVIEW}},
    "review without discovery": {"auth": {"kubernetes": REVIEW}, "discovery": {"enabled": False}},
    "TLS": {"tls": {"existingSecret": "tls"}},
    "certificates": {"tls": TLS, "auth": {"certificates": {"router": ["query"], "*": ["register"]}}},
    "certificates among others": {
        "tls": TLS,
        "auth": {"certificates": {"router": ["query"]}, "existingSecret": "t", "kubernetes": REVIEW},
    },
    "neither token nor rights": {"discovery": {"enabled": False}, "rbac": {"create": False}},
    "an account of others": {"serviceAccount": {"create": False, "name": "theirs"}},
    "settings": {
        "config": {
            "drain_s": 10.5,
            "shutdown_grace_s": 20,
            "max_entries": 123456789,
            "otlp_endpoint": "http://collector:4318",
            "tokenizers": {"m": {"engines": ["http://10.0.0.9:8100", "https://render"]}, "n": {"path": "/models/n"}},
            "tier_weights": {"gpu": 1.0, "cpu": 0.25},
            "allowed_endpoints": ["tcp://*", "http*://*"],
        },
    },
    "more of the pod": {
        "extraEnv": [
            {"name": "KVINDEXER_TOKENIZER_API_KEY", "valueFrom": {"secretKeyRef": {"name": "k", "key": "k"}}},
            {"name": "TZ", "value": "UTC"},
        ],
        "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClass": {"create": True},
        "topologySpread": {"zone": "DoNotSchedule", "host": ""},
        "terminationGracePeriodSeconds": 60,
    },
    "drains": {"replicas": 4, "podDisruptionBudget": {"minAvailable": 3}, "priorityClass": {"name": "high"}},
    "drains by share": {"podDisruptionBudget": {"maxUnavailable": "25%"}, "topologySpread": {"zone": "", "host": ""}},
    "watched": {
        "metrics": {"serviceMonitor": {"enabled": True}, "prometheusRule": RULE, "dashboard": {"enabled": True}}
    },
    "watched by pod": {"metrics": {"podMonitor": {"enabled": True, "labels": {"release": "p"}, "interval": "30s"}}},
    "policies narrowed": {
        "networkPolicy": {
            "callers": [{"podSelector": {"matchLabels": {"app": "epp"}}}],
            "engines": {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ranks": 8, "extraPorts": [7000]},
            "apiServer": {"to": [{"ipBlock": {"cidr": "10.96.0.1/32"}}], "ports": [443]},
            "protectEngines": {"enabled": True, "openPorts": [8000, 5600]},
            "extraEgress": [{"ports": [{"port": 1}]}],
            "extraIngress": [{"ports": [{"port": 2}]}],
        }
    },
    "no policies, no tests": {"networkPolicy": {"enabled": False}, "tests": {"enabled": False}},
    "no budget": {"podDisruptionBudget": {"enabled": False}},
    "set": SET,
    "set of three with redis": {**SET, "replicas": 3, "store": {"url": "redis://redis"}},
    "set with everything": {
        **SET,
        "valkey": {"enabled": True},
        "autoscaling": {"enabled": True},
        "metrics": {"serviceMonitor": {"enabled": True}},
        "tls": {"existingSecret": "tls"},
    },
    "sidecar": SIDECAR,
    "sidecar that asks nobody": {"mode": "sidecar", "discovery": {"enabled": False}},
    "sidecar with rights": {"mode": "sidecar", "rbac": {"create": False}, "sidecar": {"readiness": False}},
    "sidecar with a store": {
        **SIDECAR,
        "valkey": {"enabled": True},
        "networkPolicy": {"protectEngines": {"enabled": True}},
    },
    "sidecar, watched": {**SIDECAR, "metrics": {"podMonitor": {"enabled": True}, "prometheusRule": RULE}},
    "sidecar behind tokens": {**SIDECAR, "auth": {"existingSecret": "tokens"}, "ports": {"http": 8099}},
}

LINTED: Final = ("as it is", "pools", "certificates among others", "watched", "set", "sidecar with a store")
"""It looks at templates more than at values, and takes as long as ten renderings."""

every = pytest.mark.parametrize("case", MATRIX)


@cache
def rendered(case: str) -> dict[str, str]:
    """By template."""
    return texts(MATRIX[case])


@cache
def release(case: str) -> list[Object]:
    """Read once: nobody changes it."""
    return parsed(rendered(case))


def fullname(case: str) -> str:
    return str(MATRIX[case].get("fullnameOverride", NAME))


@cache
def settings(case: str) -> Settings:
    """What the service would start with."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        for path, text in {
            "store/password": "secret",
            "tokens/tokens.yaml": "tokens: [{name: a, token: 0123456789abcdef, roles: [query]}]",
            "store-ca/ca.crt": "",
            "tls/tls.crt": "",
            "tls/tls.key": "",
            "client-ca/ca.crt": "",
        }.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
        file = folder / "config.yaml"
        file.write_text(settings_file(release(case), fullname(case)).replace(SECRETS, made))
        return load_settings(file, {}, {"KVINDEXER_REPLICA": f"{fullname(case)}-0"})


@every
def test_kubernetes_takes_every_object(case: str) -> None:
    assert release(case)
    for found in release(case):
        check(found)


@pytest.mark.parametrize("case", LINTED)
def test_lint_has_nothing_to_say(case: str) -> None:
    assert lint(MATRIX[case]) == []


@every
def test_no_two_objects_have_one_name(case: str) -> None:
    names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in release(case)]
    assert len(names) == len(set(names))


@every
def test_every_object_says_whose_it_is(case: str) -> None:
    """By the labels that Kubernetes recommends, and those of the user."""
    for found in release(case):
        labels = found["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert MATRIX[case].get("commonLabels", {}).items() <= labels.items()


@every
def test_selectors_choose_the_pods_that_they_are_for(case: str) -> None:
    """And of Services, budgets and workloads never those of another component."""
    for found in release(case):
        if found["kind"] in {"Deployment", "StatefulSet"}:
            assert (
                found["spec"]["selector"]["matchLabels"].items()
                <= found["spec"]["template"]["metadata"]["labels"].items()
            )
    pods = [
        (found["kind"], found["metadata"]["name"], found["spec"]["template"]["metadata"]["labels"])
        for found in release(case)
        if found["kind"] in {"Deployment", "StatefulSet"}
    ]
    pods += [
        ("Pod", found["metadata"]["name"], found["metadata"]["labels"])
        for found in release(case)
        if found["kind"] == "Pod"
    ]
    for found in release(case):
        if found["kind"] in {"Service", "PodDisruptionBudget"}:
            selector = found["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            chosen = [name for _, name, labels in pods if selector.items() <= labels.items()]
            expected = found["metadata"]["name"].removesuffix("-headless")
            assert chosen == [expected], found["metadata"]["name"]


@every
def test_pods_are_restricted(case: str) -> None:
    """The restricted level of Pod Security, and a root file system that nobody writes to."""
    for where, spec in pod_specs(release(case)):
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True, where
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        for container in containers(spec):
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, where
            assert container["resources"]["limits"]["memory"], where
            assert container["resources"]["requests"]["cpu"], where
        allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec.get("volumes", ())), where


@every
def test_only_who_asks_the_api_server_has_a_token_for_it(case: str) -> None:
    values = MATRIX[case]
    asks = values.get("discovery", {}).get("enabled", True) or "kubernetes" in values.get("auth", {})
    for where, spec in pod_specs(release(case)):
        indexer = any(container["name"] == "kvindexer" for container in spec["containers"])
        assert spec["automountServiceAccountToken"] is (asks and indexer), where
    for found in release(case):
        if found["kind"] == "ServiceAccount":
            assert found["automountServiceAccountToken"] is False


@every
def test_variables_of_services_are_not_taken_for_settings(case: str) -> None:
    for where, spec in pod_specs(release(case)):
        assert spec["enableServiceLinks"] is False, where


@every
def test_mounts_are_of_volumes_and_every_volume_is_mounted(case: str) -> None:
    claims = {
        found["metadata"]["name"]: [one["metadata"]["name"] for one in found["spec"].get("volumeClaimTemplates", ())]
        for found in release(case)
        if found["kind"] == "StatefulSet"
    }
    for where, spec in pod_specs(release(case)):
        volumes = [volume["name"] for volume in spec.get("volumes", ())]
        volumes += claims.get(where.removeprefix("StatefulSet/"), [])
        mounted = {mount["name"] for container in containers(spec) for mount in container.get("volumeMounts", ())}
        assert sorted(mounted) == sorted(volumes), where
        for container in containers(spec):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(paths) == len(set(paths)), where
            for mount in container.get("volumeMounts", ()):
                assert mount.get("readOnly") or mount["mountPath"] in {"/tmp", "/data"}, where  # noqa: S108 - of a pod


@every
def test_objects_that_pods_name_are_those_of_the_release_or_were_given(case: str) -> None:
    own = {(found["kind"], found["metadata"]["name"]) for found in release(case)}
    given = json.dumps(MATRIX[case])
    for where, spec in pod_specs(release(case)):
        for volume in spec.get("volumes", ()):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in own, where
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                assert ("Secret", name) in own or f'"{name}"' in given, where
        for container in containers(spec):
            for variable in container.get("env", ()):
                if key := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert ("Secret", key["name"]) in own or f'"{key["name"]}"' in given, where
        account = spec.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in own or account == "theirs", where


@every
def test_the_service_takes_its_settings(case: str) -> None:
    read = settings(case)
    assert read.replica.endswith("-0")
    sidecar = MATRIX[case].get("mode") == "sidecar"
    assert is_loopback(read.host) is sidecar
    assert not is_loopback(read.probe_host)
    discovers = MATRIX[case].get("discovery", {}).get("enabled", True)
    assert read.discovery == ("kubernetes" if discovers else "none")
    for name, value in MATRIX[case].get("config", {}).items():
        if isinstance(value, str | int | float):
            assert getattr(read, name) == value


@every
def test_ports_are_those_that_the_service_listens_on(case: str) -> None:
    read = settings(case)
    for _, spec in pod_specs(release(case)):
        for container in spec["containers"]:
            if container["name"] == "kvindexer":
                ports = {port["name"]: port["containerPort"] for port in container["ports"]}
                assert ports == {"http": read.port, "probe": read.probe_port}
                for probe, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
                    assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "probe"}


@every
def test_the_end_is_not_cut_short(case: str) -> None:
    """SIGKILL comes after the farewell, the open requests, the closing of connections, and the last writes."""
    read = settings(case)
    needed_s = read.drain_s + 2 * read.shutdown_grace_s
    needed_s += read.otlp_timeout_s if read.otlp_endpoint else 0
    for _, spec in pod_specs(release(case)):
        if any(container["name"] == "kvindexer" for container in spec["containers"]):
            assert spec["terminationGracePeriodSeconds"] >= needed_s + 5


@every
def test_the_notes_show_the_first_query(case: str) -> None:
    notes = rendered(case)["kvindexer/templates/NOTES.txt"]
    values = MATRIX[case]
    port = values.get("ports", {}).get("http", 8090)
    scheme = "https" if "tls" in values else "http"
    assert f"{scheme}://127.0.0.1:{port}/v1/match" in notes
    assert ("WARNING: auth.enabled is false" in notes) is (values.get("auth", {}).get("enabled") is False)
    assert ("$TOKEN" in notes) is ("TOKEN=" in notes)
    assert "%!" not in notes
    assert "<no value>" not in "".join(rendered(case).values())


def test_a_change_of_settings_rolls_the_pods() -> None:
    def checksum(values: dict[str, Any]) -> str:
        found = one(objects(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(found["checksum/kvindexer-config"])

    assert checksum({}) == checksum({"replicas": 2})
    sums = [checksum({"config": {"max_sources": number}}) for number in (1, 2)]
    sums += [checksum({"discovery": {"selector": "a=b"}}), checksum({"ports": {"http": 1}}), checksum({})]
    assert len(set(sums)) == len(sums)


def test_numbers_stay_numbers() -> None:
    """Helm reads whole numbers as floats, and would write a million as 1e+06, which YAML takes for text."""
    text = settings_file(objects({"config": {"max_entries": 100_000_000}}), NAME)
    assert "max_entries: 100000000\n" in text


def test_a_pod_fits_into_its_memory() -> None:
    """250 MB for a million entries (docs/benchmarks.md), and a quarter of the limit for all else."""
    found = one(objects(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert found["resources"]["limits"]["memory"] == "2Gi"
    entries = yaml.safe_load(settings_file(objects(), NAME))["max_entries"]
    assert entries / 1e6 * 250e6 <= 0.75 * 2**31


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, False),
        ({"config": {"max_entries": 9_000_000}}, True),
        ({"config": {"max_entries": 9_000_000}, "resources": {"limits": {"memory": "4Gi"}}}, False),
        ({"config": {"max_entries": None}}, True),
        ({"resources": {"limits": {"memory": "1000M"}}}, True),
        ({"resources": {"limits": {"memory": None}}}, False),
    ],
)
def test_the_notes_warn_of_more_entries_than_memory(values: dict[str, Any], warned: bool) -> None:  # noqa: FBT001 - a case
    notes = texts(values)["kvindexer/templates/NOTES.txt"]
    assert ("WARNING: config.max_entries" in notes) is warned


def test_rolling_updates_wait_for_readiness() -> None:
    spec = one(objects({"replicas": 3}), "Deployment")["spec"]
    assert spec["replicas"] == 3
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert spec["minReadySeconds"] == 5


def test_the_scaler_alone_says_how_many() -> None:
    for mode, kind in (("deployment", "Deployment"), ("statefulset", "StatefulSet")):
        found = objects({"mode": mode, "autoscaling": {"enabled": True}})
        assert "replicas" not in one(found, kind)["spec"]
        spec = one(found, "HorizontalPodAutoscaler")["spec"]
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": kind, "name": NAME}
        assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({}, {"maxUnavailable": 1}),
        ({"maxUnavailable": 2}, {"maxUnavailable": 2}),
        ({"maxUnavailable": "25%"}, {"maxUnavailable": "25%"}),
        ({"minAvailable": 3}, {"minAvailable": 3}),
        ({"minAvailable": "50%"}, {"minAvailable": "50%"}),
    ],
)
def test_drains_of_nodes_wait_and_end(budget: dict[str, Any], expected: dict[str, Any]) -> None:
    """By one bound; pods that are not ready hold up nobody."""
    spec = one(objects({"replicas": 4, "podDisruptionBudget": budget}), "PodDisruptionBudget")["spec"]
    spec.pop("selector")
    assert spec == {**expected, "unhealthyPodEvictionPolicy": "AlwaysAllow"}


def test_a_set_gives_names_that_stay() -> None:
    found = objects({"mode": "statefulset"})
    spec = one(found, "StatefulSet")["spec"]
    (headless,) = [each for each in found if each["metadata"]["name"] == spec["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None"
    (container,) = spec["template"]["spec"]["containers"]
    assert container["env"][0] == {
        "name": "KVINDEXER_REPLICA",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
    }
    assert "replica" not in yaml.safe_load(settings_file(found, NAME))  # the file would win over the variable


def test_replicas_are_spread() -> None:
    (deployment,) = [one(release("as it is"), "Deployment")]
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert {each["whenUnsatisfiable"] for each in spread} == {"ScheduleAnyway"}


def test_the_grace_follows_the_settings() -> None:
    def grace_s(config: dict[str, Any]) -> float:
        spec = one(objects({"config": config}), "Deployment")["spec"]["template"]["spec"]
        return float(spec["terminationGracePeriodSeconds"])

    seconds = [grace_s(config) for config in ({"drain_s": 0}, {}, {"drain_s": 10.5}, {"shutdown_grace_s": 60})]
    assert all(before < after for before, after in pairwise(seconds))
    assert all(math.isfinite(one) for one in seconds)
    defaults = Settings()
    assert grace_s({}) == grace_s({"drain_s": defaults.drain_s, "shutdown_grace_s": defaults.shutdown_grace_s})
    traced = grace_s({"otlp_endpoint": "http://c:4318"})
    assert traced == grace_s({"otlp_endpoint": "http://c:4318", "otlp_timeout_s": defaults.otlp_timeout_s})
    assert traced > grace_s({})


def test_made_tokens_are_a_file_that_the_service_takes(tmp_path: Path) -> None:
    """One a role, long, different from each other and from those of the next release."""
    secret, other = (one(objects(), "Secret")["stringData"] for _ in range(2))
    file = tmp_path / "tokens.yaml"
    file.write_text(secret["tokens.yaml"])
    known = {identity.name: identity.grant.roles for identity, _ in read_tokens(file).values()}
    assert known == {"query": {"query"}, "register": {"query", "register"}, "admin": {"admin"}}
    tokens = [secret[role] for role in known] + [other[role] for role in known]
    assert len(set(tokens)) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9]{43}", token) for token in tokens)
    assert all(secret[role] in secret["tokens.yaml"] for role in known)


def test_alerts_link_to_their_runbooks() -> None:
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    made = one(release("watched"), "PrometheusRule")["spec"]["groups"]
    own = [rule for group in rules["groups"] for rule in group["rules"]]
    shown = [rule for group in made for rule in group["rules"]]
    assert [rule.get("expr") for rule in shown] == [rule.get("expr") for rule in own]
    for rule, before in zip(shown, own, strict=True):
        if "alert" in rule:
            link = before["annotations"]["runbook_url"]
            assert rule["annotations"]["runbook_url"] == f"{RULE['runbookBaseUrl']}{link}"
            assert rule["annotations"] | {"runbook_url": ""} == before["annotations"] | {"runbook_url": ""}


def test_the_dashboard_arrives_as_it_is() -> None:
    found = one(release("watched"), "ConfigMap", f"{NAME}-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["kvindexer.json"]) == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_prometheus_finds_the_port_of_metrics() -> None:
    for case in ("watched", "set with everything"):
        spec = one(release(case), "ServiceMonitor")["spec"]
        wanted = spec["selector"]["matchLabels"].items()
        (service,) = [
            found
            for found in release(case)
            if found["kind"] == "Service" and wanted <= found["metadata"]["labels"].items()
        ]
        (endpoint,) = spec["endpoints"]
        (port,) = [port for port in service["spec"]["ports"] if port["name"] == endpoint["port"]]
        assert (port["targetPort"], endpoint["path"]) == ("probe", "/metrics")
        assert spec["namespaceSelector"] == {"matchNames": [NAMESPACE]}
    own = one(release("watched by pod"), "PodMonitor")["spec"]
    labels = one(release("watched by pod"), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert own["selector"]["matchLabels"].items() <= labels.items()
    assert own["podMetricsEndpoints"][0]["port"] == "probe"
