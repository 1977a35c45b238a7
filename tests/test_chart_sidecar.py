"""The indexer beside a scheduler: one container, by Helm's templates, by values of llm-d's chart, by kustomize."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from charts import EXAMPLES, KUSTOMIZE, Object, Refused, objects, one, parent, parsed, parts, settings_file
from kubernetes_objects import check
from kvindexer.settings import load_settings
from kvindexer.settings.access import is_loopback

VALUES: Final[dict[str, Any]] = yaml.safe_load((EXAMPLES / "sidecar" / "values.yaml").read_text())
ROUTER_PORTS: Final = {9002, 9003, 9090, 8000, 8001, 8081, 15020, 15021, 19000}
"""Of llm-d's router: ext-proc, health, metrics; its tokenizer, latency predictors, Envoy, agentgateway beside it."""

MERGE_KEYS: Final = {"initContainers": "name", "containers": "name", "volumes": "name"}
"""Of the lists of a pod that a strategic merge joins (patchMergeKey in Kubernetes' API)."""


def merged(target: Any, patch: Any) -> Any:
    """A strategic merge: maps are joined, lists too where they have a merge key, everything else is replaced."""
    if not isinstance(target, dict) or not isinstance(patch, dict):
        return copy.deepcopy(patch)
    made = dict(target)
    for name, value in patch.items():
        if name in MERGE_KEYS and isinstance(made.get(name), list):
            key = MERGE_KEYS[name]
            entries = {each[key]: each for each in made[name]}
            entries |= {each[key]: merged(entries.get(each[key]), each) for each in value}
            made[name] = list(entries.values())
        else:
            made[name] = merged(made.get(name), value)
    return made


def pod_of(found: list[Object]) -> Object:
    spec: Object = one(found, "Deployment")["spec"]["template"]["spec"]
    return spec


def documents(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


def test_it_is_a_native_sidecar_that_listens_on_loopback(tmp_path: Path) -> None:
    """Started before the scheduler, restarted for itself, ended after it; all but its probes is for the pod alone."""
    container = parts(VALUES).container
    assert container["restartPolicy"] == "Always"
    file = tmp_path / "config.yaml"
    file.write_text(settings_file(objects(VALUES), "kvindexer"))
    settings = load_settings(file, {}, {})
    assert is_loopback(settings.host)
    assert settings.auth is None
    assert settings.drain_s == 0
    assert container["ports"] == [{"name": "kvindexer-probe", "containerPort": settings.probe_port}]
    for probe, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "kvindexer-probe"}
    assert not {settings.port, settings.probe_port} & ROUTER_PORTS


def test_what_it_needs_does_not_hang_on_the_rest_of_the_pod() -> None:
    """It says itself as whom it runs, its volumes have names of their own, and Secrets need no group of the pod."""
    found = parts({**VALUES, "store": {"url": "redis://r", "existingSecret": "s"}})
    assert found.container["securityContext"]["runAsUser"] == 65532
    assert all(volume["name"].startswith("kvindexer-") for volume in found.volumes)
    modes = [volume["secret"]["defaultMode"] for volume in found.volumes if "secret" in volume]
    assert modes == [0o444]
    assert {mount["name"] for mount in found.container["volumeMounts"]} == {
        volume["name"] for volume in found.volumes
    }


def test_readiness_of_the_scheduler_can_be_left_out_of_it() -> None:
    without = parts({**VALUES, "sidecar": {**VALUES["sidecar"], "readiness": False}}).container
    assert "readinessProbe" not in without
    assert "livenessProbe" in without


def test_no_workload_is_made() -> None:
    kinds = {found["kind"] for found in objects(VALUES)}
    assert kinds == {"ConfigMap", "Role", "RoleBinding", "PodMonitor"}


def test_its_metrics_are_found_in_the_scheduler_s_pods() -> None:
    spec = one(objects(VALUES), "PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == VALUES["sidecar"]["podLabels"]
    assert spec["podMetricsEndpoints"][0]["port"] == parts(VALUES).container["ports"][0]["name"]


def test_a_chart_of_others_takes_it_in() -> None:
    found = parsed(parent(EXAMPLES / "epp", {}))
    for each in found:
        if "labels" in each["metadata"]:
            check(each)
    pod = pod_of(found)
    own = yaml.safe_load((EXAMPLES / "epp" / "values.yaml").read_text())["kvindexer"]
    expected = parts(own)
    (container,) = pod["initContainers"]
    assert container == expected.container
    assert pod["volumes"] == expected.volumes
    (volume,) = [volume for volume in pod["volumes"] if "configMap" in volume]
    assert one(found, "ConfigMap", volume["configMap"]["name"])
    assert one(found, "RoleBinding")["subjects"][0]["name"] == pod["serviceAccountName"]
    assert one(found, "Deployment")["spec"]["template"]["metadata"]["annotations"] == expected.annotations


def test_a_change_of_settings_rolls_the_scheduler_s_pods() -> None:
    sums = [parts({**VALUES, "config": {"max_sources": number}}).annotations for number in (1, 2)]
    assert sums[0] != sums[1]
    assert list(sums[0]) == ["checksum/kvindexer-config"]


@pytest.mark.parametrize("values", [{"mode": "deployment"}, {"mode": "sidecar"}])
def test_templates_refuse_values_that_are_not_for_them(values: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"need mode: sidecar|sidecar\.serviceAccountName"):
        parts(values)


def test_values_for_the_router_carry_the_same_container() -> None:
    router = yaml.safe_load((EXAMPLES / "llm-d-router" / "values.yaml").read_text())["router"]
    expected = parts(VALUES)
    assert router["tokenizer"]["initContainers"] == [expected.container]
    assert router["tokenizer"]["enabled"] is True
    assert router["epp"]["volumes"] == expected.volumes
    assert router["epp"]["podAnnotations"] == expected.annotations
    (volume,) = [volume for volume in expected.volumes if "configMap" in volume]
    assert one(objects(VALUES), "ConfigMap", volume["configMap"]["name"])


def test_kustomize_makes_the_same_pod() -> None:
    """Its patch, merged into a Deployment of others, adds the chart's container and volumes, and nothing else."""
    folder = KUSTOMIZE / "sidecar"
    component = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (patch,) = component["patches"]
    scheduler = one(documents(KUSTOMIZE / "example" / "scheduler.yaml"), "Deployment")
    made = merged(
        scheduler, yaml.safe_load((folder / patch["path"]).read_text()) | {"metadata": scheduler["metadata"]}
    )
    values = {
        "mode": "sidecar",
        "fullnameOverride": "kvindexer",
        "image": {"tag": "latest"},
        "discovery": {"replayPort": 5657},
        "sidecar": {"serviceAccountName": "epp"},
    }
    expected = parts(values)
    pod = made["spec"]["template"]["spec"]
    assert pod["initContainers"] == [expected.container]
    before = scheduler["spec"]["template"]["spec"]
    assert pod["volumes"] == [*before["volumes"], *expected.volumes]
    assert {**pod, "initContainers": None, "volumes": None} == {**before, "initContainers": None, "volumes": None}
    check({**made, "metadata": {"name": "any"}})

    (generator,) = component["configMapGenerator"]
    (volume,) = [volume for volume in expected.volumes if "configMap" in volume]
    assert generator == {"name": volume["configMap"]["name"], "files": ["config.yaml"]}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == yaml.safe_load(settings_file(objects(values), "kvindexer"))
    role, binding = documents(folder / "rbac.yaml")
    assert role["rules"] == one(objects(values), "Role")["rules"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    overlay = yaml.safe_load((KUSTOMIZE / "example" / "kustomization.yaml").read_text())
    (given,) = overlay["patches"]
    assert given["target"] == {"kind": "RoleBinding", "name": binding["metadata"]["name"]}
    (change,) = yaml.safe_load(given["patch"])
    assert (change["op"], change["path"]) == ("replace", "/subjects/0")
    assert change["value"] == {
        "kind": "ServiceAccount",
        "name": pod["serviceAccountName"],
        "namespace": overlay["namespace"],
    }


def test_merging_twice_is_merging_once() -> None:
    """The merge of this file is by name, as Kubernetes' is."""
    patch = {"spec": {"volumes": [{"name": "a", "emptyDir": {}}], "args": [1]}}
    target = {"spec": {"volumes": [{"name": "b"}, {"name": "a", "x": 1}], "args": [2], "kept": True}}
    made = merged(target, patch)
    assert made["spec"]["volumes"] == [{"name": "b"}, {"name": "a", "x": 1, "emptyDir": {}}]
    assert (made["spec"]["args"], made["spec"]["kept"]) == ([1], True)
    assert merged(made, patch) == made
