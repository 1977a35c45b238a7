"""The chart as Helm's own engine sees it: rendered, linted, as part of another chart, and what is made from it.

Kept up by `scripts/chart`, and compared by tests/test_chart_pages.py: the names of settings in the schema, the table
of values in docs/helm.md, the rendered examples, and the parts for kustomize.

Invariant: nothing here asks a cluster, and a rendering depends on the values alone but for generated secrets.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import helm_python
import yaml

from kvindexer.settings import Settings

ROOT: Final = Path(__file__).parent.parent
CHART: Final = ROOT / "deploy" / "helm" / "kvindexer"
EXAMPLES: Final = ROOT / "deploy" / "examples"
KUSTOMIZE: Final = ROOT / "deploy" / "kustomize"
PAGE: Final = ROOT / "docs" / "helm.md"
SCHEMA: Final = CHART / "values.schema.json"
RELEASE: Final = "kvi"
NAMESPACE: Final = "llm-d"

Object = dict[str, Any]

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C where it is there: ten times as fast."""

_GENERATED: Final = "# Made by scripts/chart; change the values beside it, or the chart, and run it again.\n"


class Refused(Exception):  # noqa: N818 - what tests expect is that values are refused
    """The values can't be used; the text is what a user of Helm sees."""


@cache
def chart() -> helm_python.Chart:
    """The chart of this checkout, loaded once."""
    return helm_python.Chart.load(CHART)


def texts(values: Mapping[str, Any] | None = None, **options: Any) -> dict[str, str]:
    """What each template became, by its path in the chart."""
    return _rendered(chart(), values or {}, **options)


def objects(values: Mapping[str, Any] | None = None, **options: Any) -> list[Object]:
    """All objects of a release, hooks among them."""
    return parsed(texts(values, **options))


def parsed(rendered: Mapping[str, str]) -> list[Object]:
    """The objects in rendered templates."""
    found = [
        one
        for path, text in sorted(rendered.items())
        if not path.endswith("NOTES.txt")
        for one in yaml.load_all(text, Loader=_LOADER)
    ]
    return [one for one in found if one is not None]


def one(found: list[Object], kind: str, name: str = "") -> Object:
    """The only object of its kind, or of that name."""
    (only,) = [each for each in found if each["kind"] == kind and name in ("", each["metadata"]["name"])]
    return only


def settings_file(found: list[Object], name: str) -> str:
    """What the service would read."""
    return str(one(found, "ConfigMap", name)["data"]["config.yaml"])


def pod_specs(found: list[Object]) -> Iterator[tuple[str, Object]]:
    """All pods that the objects are, or would make."""
    for each in found:
        where = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield where, each["spec"]
        elif "template" in each.get("spec", {}):
            yield where, each["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    """All containers of a pod."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


def lint(values: Mapping[str, Any]) -> list[str]:
    """What `helm lint --strict` has to say."""
    report = helm_python.lint(CHART, dict(values), strict=True, namespace=NAMESPACE)
    return [*report["errors"], *(found["error"] for found in report["messages"] if found["severity"] > 1)]


def parent(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Another chart that has this one as a dependency, rendered."""
    with TemporaryDirectory() as made:
        whole = Path(made) / folder.name
        shutil.copytree(folder, whole)
        shutil.copytree(CHART, whole / "charts" / CHART.name)
        with helm_python.Chart.load(whole) as loaded:
            return _rendered(loaded, values)


class Parts(NamedTuple):
    """What another pod takes."""

    annotations: dict[str, str]
    container: Object
    volumes: list[Object]


def parts(values: Mapping[str, Any]) -> Parts:
    """What the named templates give for these values."""
    template = (
        "{{- $context := .Subcharts.kvindexer }}\n"
        'annotations: {{- include "kvindexer.sidecar.annotations" $context | nindent 2 }}\n'
        'containers: {{- include "kvindexer.sidecar.container" $context | nindent 2 }}\n'
        'volumes: {{- include "kvindexer.sidecar.volumes" $context | nindent 2 }}\n'
    )
    with TemporaryDirectory() as made:
        folder = Path(made) / "parts"
        (folder / "templates").mkdir(parents=True)
        dependency = "dependencies: [{name: kvindexer, version: 0.1.0}]\n"
        (folder / "Chart.yaml").write_text(f"apiVersion: v2\nname: parts\nversion: 0.1.0\n{dependency}")
        (folder / "templates" / "parts.yaml").write_text(template)
        found = yaml.safe_load(parent(folder, {"kvindexer": dict(values)})["parts/templates/parts.yaml"])
    (container,) = found["containers"]
    return Parts(found["annotations"], container, found["volumes"])


@cache
def generated() -> dict[Path, str]:
    """All files that follow from the chart or from the settings, as they should be."""
    made = {SCHEMA: schema_text(), PAGE: page_text(PAGE.read_text())}
    for name in ("deployment", "statefulset", "sidecar"):
        values = yaml.safe_load((EXAMPLES / name / "values.yaml").read_text())
        made[EXAMPLES / name / "rendered.yaml"] = _joined(texts(values))
    made[EXAMPLES / "epp" / "rendered.yaml"] = _joined(parent(EXAMPLES / "epp", {}))
    made[EXAMPLES / "llm-d-router" / "values.yaml"] = router_values()
    return made | kustomize_parts()


def schema_text() -> str:
    """The schema with the names of today's settings."""
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["config"]["properties"] = {name: {} for name in Settings.model_fields}
    return json.dumps(schema, indent=2) + "\n"


def page_text(page: str) -> str:
    """docs/helm.md with today's table of values."""
    rows = "\n".join(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in table())
    head = "| value | default | meaning |\n| --- | --- | --- |\n"
    return re.sub(re.escape(head) + r"(?:\|.*\n)*", lambda _: f"{head}{rows}\n", page)


def table() -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each value, by the comments of values.yaml."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, meaning in _comments():
        value = values
        for name in path:
            value = value[name]
        shown = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
        yield ".".join(path), f"`{shown}`" if value not in ("", None) else "none", meaning.replace("|", "\\|")


def _comments() -> Iterator[tuple[tuple[str, ...], str]]:
    path: list[str] = []
    said: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            said.append(text.removeprefix("#").strip())
        elif found := re.fullmatch(r"( *)([A-Za-z]\w*):.*", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if said:
                yield tuple(path), " ".join(said)
            said = []
        else:
            said = []


def router_values() -> str:
    """Values for llm-d's router chart, which takes init containers where it takes its tokenizer."""
    own = yaml.safe_load((EXAMPLES / "sidecar" / "values.yaml").read_text())
    found = parts(own)
    (model,) = own["config"]["tokenizers"]
    values = {
        "router": {
            "epp": {"podAnnotations": found.annotations, "volumes": found.volumes},
            "tokenizer": {"enabled": True, "modelName": model, "initContainers": [found.container]},
        }
    }
    said = (
        "# For llm-d's router charts, beside values of your own: the container of ../sidecar/values.yaml, put into\n"
        "# the router's pods by `router.tokenizer.initContainers`, which counts while the tokenizer is enabled.\n"
    )
    return _GENERATED + said + yaml.safe_dump(values, sort_keys=False, width=120)


def kustomize_parts() -> dict[Path, str]:
    """The patch, the settings and the rights for those who own no chart."""
    folder = KUSTOMIZE / "sidecar"
    values = {
        "mode": "sidecar",
        "fullnameOverride": "kvindexer",
        "image": {"tag": "latest"},
        "discovery": {"replayPort": 5657},
        "sidecar": {"serviceAccountName": "epp"},
    }
    found, release = parts(values), objects(values)
    pod = {"spec": {"initContainers": [found.container], "volumes": found.volumes}}
    patch = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "any"}, "spec": {"template": pod}}
    rights = [one(release, "Role"), one(release, "RoleBinding")]
    for each in rights:
        each["metadata"] = {"name": each["metadata"]["name"]}
    rights[1]["subjects"][0]["namespace"] = "default"
    header = _GENERATED.replace("the values beside it, or the chart,", "the chart")
    account = "# The account is the scheduler's: an overlay says its name and namespace, as ../example does.\n"
    return {
        folder / "patch.yaml": header + yaml.safe_dump(patch, sort_keys=False, width=120),
        folder / "config.yaml": header + settings_file(release, "kvindexer"),
        folder / "rbac.yaml": header + account + yaml.safe_dump_all(rights, sort_keys=False, width=120),
    }


def _rendered(loaded: helm_python.Chart, values: Mapping[str, Any], **options: Any) -> dict[str, str]:
    try:
        loaded.validate_schema(dict(values))
        return loaded.render(dict(values), name=RELEASE, namespace=NAMESPACE, **options)
    except (helm_python.HelmValuesError, helm_python.HelmRenderError) as error:
        raise Refused(str(error)) from None


def _joined(rendered: Mapping[str, str]) -> str:
    documents = [
        f"# {path}\n{text.strip()}\n"
        for path, text in sorted(rendered.items())
        if not path.endswith("NOTES.txt") and text.strip()
    ]
    return _GENERATED + "---\n" + "---\n".join(documents)
