"""What is made from the chart is of today, and the chart's own files agree with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from charts import CHART, EXAMPLES, KUSTOMIZE, PAGE, ROOT, SCHEMA, generated, table
from kvindexer import __version__

VALUES: Final[dict[str, Any]] = yaml.safe_load((CHART / "values.yaml").read_text())
FREE: Final = {"config", "commonLabels", "resources", "labels", "annotations", "podLabels", "podAnnotations"}
FREE_TOO: Final = {"nodeSelector", "affinity", "roles", "certificates"}
"""Maps whose names are the user's."""


@pytest.mark.parametrize("path", sorted(generated()), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_made_is_of_today(path: Path) -> None:
    assert path.read_text() == generated()[path], "run scripts/chart, and commit what it changes"


def test_every_value_is_in_the_schema_and_every_name_of_the_schema_has_a_value() -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["properties"].pop("global")
    schema["properties"]["config"]["properties"] = {}
    assert _names(VALUES) == _schema_names(schema)


def test_every_value_has_its_line_in_the_page() -> None:
    """A comment above a value is its description; a map that the chart owns is described by its parts."""
    described = {key for key, _, _ in table()}
    for name in _names(VALUES):
        assert name in described or any(other.startswith(f"{name}.") for other in described), name
    assert all(meaning.endswith((".", ":")) and len(meaning) >= 5 for _, _, meaning in table())


def test_the_schema_is_strict_where_names_are_ours() -> None:
    def walk(schema: dict[str, Any], path: str) -> None:
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
            for name, inner in schema["properties"].items():
                walk(inner, f"{path}.{name}")

    walk(json.loads(SCHEMA.read_text()), "")


def test_the_versions_are_one() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert chart["version"] == __version__
    for path in (EXAMPLES / "epp" / "Chart.yaml",):
        (dependency,) = yaml.safe_load(path.read_text())["dependencies"]
        assert dependency["version"] == __version__
        assert (path.parent / dependency["repository"].removeprefix("file://")).resolve() == CHART


def test_files_that_kustomize_names_are_there() -> None:
    for folder in ("sidecar", "example"):
        content = yaml.safe_load((KUSTOMIZE / folder / "kustomization.yaml").read_text())
        files = [*content.get("resources", ()), *content.get("components", ())]
        files += [patch["path"] for patch in content.get("patches", ()) if "path" in patch]
        files += [name for one in content.get("configMapGenerator", ()) for name in one["files"]]
        assert files
        assert all((KUSTOMIZE / folder / name).exists() for name in files)


def test_the_page_names_values_that_there_are() -> None:
    """Those that it shows as `--set`, and those in its prose."""
    names = {
        *_names(VALUES),
        *(f"config.{name}" for name in json.loads(SCHEMA.read_text())["properties"]["config"]["properties"]),
    }
    page = PAGE.read_text()
    shown = re.findall(r"--set(?:-json|-string)? '?([a-zA-Z.]+)=", page)
    assert len(shown) >= 5
    assert [name for name in shown if name not in names] == []


def _names(values: dict[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in values.items():
        found.add(f"{path}{name}")
        if isinstance(value, dict) and name not in FREE | FREE_TOO:
            found |= _names(value, f"{path}{name}.")
    return found


def _schema_names(schema: dict[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for name, inner in schema.get("properties", {}).items():
        found.add(f"{path}{name}")
        found |= _schema_names(inner, f"{path}{name}.")
    return found
