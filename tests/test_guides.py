"""docs/guides and docs/operations.md: every block says by a mark how it is checked, and is checked that way.

| mark | what is done with it |
| --- | --- |
| sh run | run, all of a page in one shell in their order, with a real service, engines and a Redis |
| sh cluster | helm and kubectl: values are rendered, named objects must be in what was rendered |
| sh elsewhere | for other machines: must be shell, and JSON arguments JSON |
| yaml settings | loaded as the service loads its file |
| yaml values | values of the chart: rendered, and every object validated |
| yaml manifest | validated as Kubernetes does |
| yaml elsewhere | somebody else's: must be YAML |
| text, json | what is printed |
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

import charts
import kubernetes_objects
from kvindexer.settings import load_settings
from kvindexer.testing.redis_server import server_binary
from servers import HOST, Cluster

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = [*sorted((ROOT / "docs" / "guides").glob("*.md")), ROOT / "docs" / "operations.md"]
MARKS: Final = {
    *("sh run", "sh cluster", "sh elsewhere"),
    *("yaml settings", "yaml values", "yaml manifest", "yaml elsewhere"),
    *("text", "json"),
}
GUIDES: Final = {"kubernetes", "llm-d", "tiered-offload", "replicas", "upgrades", "troubleshooting"}
RELEASE: Final = "kvindexer"
"""What every page calls the release, so that its objects have that name."""
PATIENCE_S: Final = 120
PORTS: Final = re.compile(r"(?<![\d.])(809\d|909\d|6379|555\d|565\d|800\d)(?!\d)")
"""Ports of the pages; each becomes a free one."""
NODES: Final = re.compile(r"localhost:(7000|7001|7002)")
"""Nodes of the Redis Cluster of the pages, which runs already."""


class Block(NamedTuple):
    """Some lines between fences."""

    page: str
    mark: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    fenced = re.findall(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [
        Block(page.stem, mark.strip(), "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True)))
        for indent, mark, text in fenced
    ]


def marked(mark: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.mark == mark]


def shown(block: Block) -> str:
    return f"{block.page}: {block.text.splitlines()[0][:50]}"


def commands(text: str) -> list[list[str]]:
    """The commands of a block, each as its words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(r"(?:'[^']*'|[^\n'])+", joined):
        words = shlex.split(line, comments=True)
        if words:
            found.append(words)
    return found


def test_every_guide_is_there_and_every_block_says_how_it_is_checked() -> None:
    assert {page.stem for page in PAGES} == GUIDES | {"operations"}
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(blocks_of(page)), page.name
        assert {block.mark for block in blocks_of(page)} <= MARKS, page.name
    assert all(marked(mark) for mark in ("sh run", "sh cluster", "yaml settings", "yaml values", "yaml manifest"))


def test_the_readme_and_the_pages_lead_to_every_guide() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/guides/{name}.md" in readme for name in GUIDES)


def test_the_words_of_the_pages_are_those_of_the_service() -> None:
    """Reasons, states and settings in the first columns of tables, and every metric."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "kvindexer").rglob("*.py"))
    known = set(re.findall(r"\w+", source))
    metrics = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    words: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        first_cells = " ".join(re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE))
        words.update(re.findall(r"`([a-z_]+)`", first_cells))
        assert all(f"`{name}" in metrics for name in re.findall(r"`(kvindexer_\w+)", text)), page.name
    assert len(words) > 20
    assert words <= known, words - known


# Commands that run


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(replicas=False) as made:
        yield made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


QUICK: Final = {"kubernetes", "tiered-offload"}
"""Pages whose commands take a few seconds; the others are run by `make proof`."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page in QUICK else [pytest.mark.proof])
        for page in sorted({block.page for block in marked("sh run")})
    ],
)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As they stand there, but for ports: `set -e`, so that the first one that fails is seen."""
    script = "".join(block.text for block in marked("sh run") if block.page == page)
    assert script
    free: dict[str, str] = {}
    script = PORTS.sub(lambda found: free.setdefault(found[0], str(free_port())), script)
    if NODES.search(script):
        nodes = dict(zip(("7000", "7001", "7002"), request.getfixturevalue("cluster").servers, strict=True))
        script = NODES.sub(lambda found: f"{HOST}:{nodes[found[1]].port}", script)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "valkey-server").symlink_to(server_binary())
    (tools / "kvindexer").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kvindexer "$@"\n')
    (tools / "kvindexer").chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    place = tmp_path / "place"
    place.mkdir()
    for block in marked("yaml settings"):
        if block.page == page and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
            (place / name[1]).write_text(PORTS.sub(lambda found: free.setdefault(found[0], found[0]), block.text))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEXER_")}
    path = f"{tools}{os.pathsep}{environ['PATH']}"
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            ["/bin/bash", "-euo", "pipefail", "-c", script],
            cwd=place,
            env={**environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # all that the page has left running
            process.wait()
    assert code == 0, (tmp_path / "said").read_text()[-3000:]


# Commands of a cluster


def rendered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a release, each as a cluster would take it."""
    loaded = charts.chart()
    try:
        loaded.validate_schema(dict(values))
        found = charts.parsed(loaded.render(dict(values), name=RELEASE, namespace="llm-d"))
    except Exception as error:
        raise AssertionError(f"the chart refuses {values}: {error}") from error
    for each in found:
        kubernetes_objects.check(each)
    return found


def values_of(words: list[str], files: Mapping[str, str]) -> dict[str, Any]:
    """What helm would make of -f and --set."""
    values: dict[str, Any] = {}
    for flag, word in pairwise(words):
        if flag in ("-f", "--values"):
            values = merged(values, yaml.safe_load(files[word]))
        if flag == "--set":
            path, _, value = word.partition("=")
            for name in reversed(path.split(".")):
                value = {name: yaml.safe_load(value) if isinstance(value, str) else value}  # type: ignore[assignment]
            values = merged(values, value)  # type: ignore[arg-type]
    return values


def merged(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


KINDS: Final = {"deployment": "Deployment", "deploy": "Deployment", "statefulset": "StatefulSet"} | {
    "service": "Service",
    "secret": "Secret",
    "configmap": "ConfigMap",
    "poddisruptionbudget": "PodDisruptionBudget",
}
HELM: Final = {"install", "upgrade", "rollback", "test", "history", "template", "uninstall"}
KUBECTL: Final = {"apply", "rollout", "get", "exec", "port-forward", "logs", "create", "label", "delete", "wait"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_cluster_name_what_there_is(page: Path) -> None:
    """The values render and its objects validate; kubectl asks for objects that these, or the page's, are."""
    files: dict[str, str] = {}
    there: set[tuple[str, str]] = set()
    for block in blocks_of(page):
        if block.mark.startswith("yaml ") and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
            files[name[1]] = block.text
        if block.mark == "yaml manifest":
            there |= {(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(block.text)}
        if block.mark != "sh cluster":
            continue
        for line in commands(block.text):
            words = line[: line.index("|")] if "|" in line else line
            if words[0] == "helm":
                assert words[1] in HELM, words
                if words[1] in ("install", "upgrade"):
                    assert words[2:4] == [RELEASE, "deploy/helm/kvindexer"], words
                    there |= {(each["kind"], each["metadata"]["name"]) for each in rendered(values_of(words, files))}
                else:
                    assert words[2] == RELEASE, words
            elif words[0] == "kubectl":
                _check_kubectl(words, files, there)
            else:
                assert words[0] in ("curl", "kvindexer"), words


def _check_kubectl(words: list[str], files: Mapping[str, str], there: set[tuple[str, str]]) -> None:
    own = words[: words.index("--")] if "--" in words else words
    verbs = [word for word in own[1:] if word in KUBECTL]
    assert verbs, words
    for flag, word in pairwise(own):
        if flag == "-f":
            assert word in files, word
    for kind, name in re.findall(r"\b([a-z]+)/([\w.-]+)", " ".join(own)):
        if kind in KINDS:
            assert (KINDS[kind], name) in there, (kind, name, sorted(there))
    for kind, name in pairwise(own):
        if kind == "secret" and verbs == ["get"]:
            assert ("Secret", name) in there, name
            there_are_keys = [word for word in own if word.startswith("jsonpath=")]
            assert there_are_keys, own


def test_the_readmes_way_to_kubernetes_renders() -> None:
    """Its blocks have no marks; the one that installs is checked like those of the guides."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (install,) = [words for text in fenced if "helm install" in text for words in commands(text)]
    assert install[:4] == ["helm", "install", RELEASE, "deploy/helm/kvindexer"]
    assert rendered(values_of(install, {}))


@pytest.mark.parametrize("block", marked("yaml values"), ids=shown)
def test_values_render_and_their_objects_are_valid(block: Block) -> None:
    assert rendered(yaml.safe_load(block.text))


@pytest.mark.parametrize("block", marked("yaml manifest"), ids=shown)
def test_a_manifest_is_valid(block: Block) -> None:
    for each in yaml.safe_load_all(block.text):
        kubernetes_objects.check(each)
        for _, spec in charts.pod_specs([each]):
            for container in charts.containers(spec):
                for word in container.get("args", ()):
                    if word.startswith("{"):
                        json.loads(word)


@pytest.mark.parametrize("block", marked("yaml settings"), ids=shown)
def test_settings_can_be_loaded(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "kvindexer.yaml"
    file.write_text(block.text)
    load_settings(file, {}, {})


@pytest.mark.parametrize("block", [*marked("yaml elsewhere"), *marked("sh elsewhere"), *marked("json")], ids=shown)
def test_what_is_for_elsewhere_can_be_read(block: Block) -> None:
    if block.mark == "json":
        json.loads(block.text)
    elif block.mark == "yaml elsewhere":
        assert list(yaml.safe_load_all(block.text))
    else:
        for words in commands(block.text):
            for word in words:
                if word.startswith("{"):
                    json.loads(word)
