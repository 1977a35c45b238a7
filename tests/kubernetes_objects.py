"""Whether objects are as Kubernetes takes them: the schemas of several versions, and shapes of kinds that have none.

Unknown fields are errors, as with `kubectl apply --validate=strict`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

import kubernetes_validate.utils  # type: ignore[import-untyped]  # has no marker for its types

Object = dict[str, Any]

VERSIONS: Final = ("1.29", kubernetes_validate.utils.latest_version())
"""The oldest that the chart is for, and the newest that there are schemas of."""

kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
"""Else a file of a megabyte is read for every object."""

_META: Final = {"name", "namespace", "labels", "annotations"}


def check(found: Object) -> None:
    """Fail if a cluster would refuse it."""
    assert set(found["metadata"]) <= _META, found["metadata"]
    if found["apiVersion"].startswith("monitoring.coreos.com/"):
        MONITORING[found["kind"]](found)
    else:
        _built_in(json.dumps(found, sort_keys=True))


@cache
def _built_in(text: str) -> None:
    """Every object once: most of them are the same for most values."""
    for version in VERSIONS:
        kubernetes_validate.utils.validate(json.loads(text), version, strict=True)


def _service_monitor(found: Object) -> None:
    _monitor(found, "endpoints")


def _pod_monitor(found: Object) -> None:
    _monitor(found, "podMetricsEndpoints")


def _monitor(found: Object, endpoints: str) -> None:
    """As the Prometheus operator's API reference describes ServiceMonitor and PodMonitor."""
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    spec = found["spec"]
    assert set(spec) == {"namespaceSelector", "selector", endpoints}
    assert set(spec["namespaceSelector"]) == {"matchNames"}
    assert set(spec["selector"]) == {"matchLabels"}
    assert spec["selector"]["matchLabels"]
    for endpoint in spec[endpoints]:
        assert set(endpoint) == {"port", "path", "interval"}
        assert all(isinstance(value, str) for value in endpoint.values())


def _prometheus_rule(found: Object) -> None:
    """As the Prometheus operator's API reference describes PrometheusRule."""
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(found["spec"]) == {"groups"}
    names = [group["name"] for group in found["spec"]["groups"]]
    assert len(names) == len(set(names))
    for group in found["spec"]["groups"]:
        assert set(group) <= {"name", "interval", "rules", "labels", "limit"}
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"}
            assert ("alert" in rule) != ("record" in rule)
            assert isinstance(rule["expr"], str | int)
            texts = {**rule.get("labels", {}), **rule.get("annotations", {})}
            assert all(isinstance(value, str) for value in texts.values())


MONITORING: Final = {
    "ServiceMonitor": _service_monitor,
    "PodMonitor": _pod_monitor,
    "PrometheusRule": _prometheus_rule,
}
