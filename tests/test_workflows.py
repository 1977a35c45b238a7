"""The workflows, as far as they can be read: schema, rules, least rights, pins, and the tag that starts a release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parent.parent
GITHUB: Final = ROOT / ".github"
SCRIPTS: Final = Path(sysconfig.get_path("scripts"))
PATHS: Final = sorted((GITHUB / "workflows").iterdir())
WORKFLOWS: Final[dict[str, dict[str, Any]]] = {path.stem: yaml.safe_load(path.read_text()) for path in PATHS}
JOBS: Final = {f"{name}.{job}": body for name, flow in WORKFLOWS.items() for job, body in flow["jobs"].items()}
STEPS: Final[list[dict[str, Any]]] = list(chain.from_iterable(job["steps"] for job in JOBS.values()))
ZIZMOR: Final = ("zizmor", "--offline", "--strict-collection", "--persona", "auditor", "--no-progress")


def says(name: str, *arguments: str | Path) -> tuple[int, str]:
    run = subprocess.run([SCRIPTS / name, *arguments], capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


# The rules of others ---------------------------------------------------------------------------------------------


def test_they_follow_the_schema() -> None:
    code, said = says("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *PATHS)
    assert code == 0, said
    code, said = says("check-jsonschema", "--builtin-schema", "vendor.dependabot", GITHUB / "dependabot.yml")
    assert code == 0, said


def test_the_auditor_finds_nothing() -> None:
    code, said = says(*ZIZMOR, GITHUB)
    assert code == 0, said
    assert all(re.search(rf"completed \S*{path.name}", said) for path in PATHS), said


@pytest.mark.parametrize(
    ("pattern", "replacement", "finding"),
    [
        (r"@[0-9a-f]{40} # v\S+", "@v1", "unpinned-uses"),
        (r"^permissions: \{\}$", "permissions: write-all", "excessive-permissions"),
        (r"persist-credentials: false", "persist-credentials: true", "artipacked"),
        (r'"\$GITHUB_REF_NAME" >notes', r"${{ github.ref_name }} >notes", "template-injection"),
    ],
)
def test_the_auditor_would_find_something(tmp_path: Path, pattern: str, replacement: str, finding: str) -> None:
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    text = (GITHUB / "workflows" / "release.yml").read_text()
    bad = re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert bad != text
    (folder / "release.yml").write_text(bad)
    code, said = says(*ZIZMOR, tmp_path)
    assert code != 0
    assert finding in said


# Ours ------------------------------------------------------------------------------------------------------------


def test_every_action_is_pinned_by_its_commit_with_its_version_beside_it() -> None:
    lines = [line for path in PATHS for line in path.read_text().splitlines() if "uses:" in line]
    pins = [re.fullmatch(r"\s*(?:- )?uses: ([\w/-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", line) for line in lines]
    assert all(pins), lines
    assert len({pin[1] for pin in pins if pin}) == len({pin.groups() for pin in pins if pin}), "one version of each"


def test_no_job_has_rights_that_it_does_not_name() -> None:
    assert all(flow["permissions"] == {} for flow in WORKFLOWS.values())
    assert all("permissions" in job for job in JOBS.values())
    writes = {
        name: {key for key, value in job["permissions"].items() if value == "write"} for name, job in JOBS.items()
    }
    pushes = {"packages", "id-token", "attestations"}
    assert {name: rights for name, rights in writes.items() if rights} == {
        "release.package": {"id-token", "attestations"},
        "release.image": pushes,
        "release.chart": pushes,
        "release.release": {"contents"},
    }


def test_who_may_push_waits_for_the_tests_and_for_whoever_guards_the_environment() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["check"]["steps"]]
    for name in jobs.keys() - {"check"}:
        needs = jobs[name]["needs"]
        assert "check" in needs
        assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys()
    assert {name for name, job in jobs.items() if job.get("environment") == "release"} == {
        "image",
        "chart",
        "release",
    }


def test_every_python_that_we_name_is_tested_and_no_other() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [one.rpartition(" ")[2] for one in classifiers if re.search(r"Python :: 3\.\d+$", one)]
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert ".ci/run" in [step.get("run") for step in WORKFLOWS["ci"]["jobs"]["test"]["steps"]]


def test_the_release_is_for_both_architectures_with_sbom_provenance_and_signature() -> None:
    said = "\n".join(step["run"] for step in WORKFLOWS["release"]["jobs"]["image"]["steps"] if "run" in step)
    for part in ("--platform linux/amd64,linux/arm64", "--sbom true", "--provenance mode=max", "cosign sign --yes"):
        assert part in said


def test_all_jobs_end_by_themselves() -> None:
    assert all(0 < job["timeout-minutes"] <= 60 for job in JOBS.values())


def test_the_commands_are_bash_and_take_no_text_from_expressions() -> None:
    for run in [step["run"] for step in STEPS if "run" in step]:
        assert "${{" not in run
        checked = subprocess.run(["/bin/bash", "-n"], input=run, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_files_that_the_commands_name_are_there() -> None:
    text = "\n".join(path.read_text() for path in PATHS)
    named = set(re.findall(r"(?<![\w/])((?:deploy|scripts|\.ci)/[\w/-]+|requirements[\w-]*\.lock)", text))
    assert len(named) >= 4
    assert all((ROOT / name).exists() for name in named)


# What a tag must be ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What scripts/release-notes reads, fit for version 1.2.3."""
    for name in (
        "pyproject.toml",
        "deploy/helm/kvindexer/Chart.yaml",
        "deploy/docker/Dockerfile",
        "scripts/release-notes",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    change(tmp_path / "pyproject.toml", r'^version = ".*"', 'version = "1.2.3"')
    change(tmp_path / "deploy/helm/kvindexer/Chart.yaml", r"^(version|appVersion): .*", r'\1: "1.2.3"')
    change(tmp_path / "deploy/docker/Dockerfile", r"^(FROM python:\S+?)(@\S+)? AS", rf"\1@sha256:{'0' * 64} AS")
    (tmp_path / "CHANGELOG.md").write_text("# C\n\n## [Unreleased]\n\n## [1.2.3]\n\n- one\n\n## [1.2.2]\n\n- two\n")
    return tmp_path


def change(path: Path, pattern: str, replacement: str) -> None:
    path.write_text(re.sub(pattern, replacement, path.read_text(), flags=re.MULTILINE))


def notes(checkout: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(checkout / "scripts" / "release-notes"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout, run.stderr


def test_a_tag_that_fits_has_its_notes(checkout: Path) -> None:
    assert notes(checkout, "v1.2.3") == (0, "- one\n", "")


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "said"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4", "pyproject.toml has version 1.2.4"),
        ("deploy/helm/kvindexer/Chart.yaml", '^version: "1.2.3"', "version: 1.2.4", "Chart.yaml has version 1.2.4"),
        ("deploy/helm/kvindexer/Chart.yaml", "^appVersion.*", "", "Chart.yaml has appVersion not at all"),
        ("deploy/docker/Dockerfile", "@sha256:0+", "", "without a digest; docker buildx imagetools inspect python:"),
        ("CHANGELOG.md", "1.2.3", "1.2.4", "CHANGELOG.md has no section [1.2.3]"),
        ("CHANGELOG.md", "- one", "", "CHANGELOG.md has no section [1.2.3]"),
    ],
)
def test_a_tag_that_does_not_fit_says_why(
    checkout: Path, file: str, pattern: str, replacement: str, said: str
) -> None:
    change(checkout / file, pattern, replacement)
    code, out, err = notes(checkout, "v1.2.3")
    assert (code, out) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2", "v1.2.3;x", "v1.2.3rc1", ""])
def test_what_is_no_tag_of_a_version_is_refused(checkout: Path, tag: str) -> None:
    assert notes(checkout, tag)[2].startswith("usage")
