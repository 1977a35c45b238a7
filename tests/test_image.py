"""The image and the lock files, as far as they can be read: lint, pins, users, and nothing that isn't locked."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from imaged import DOCKERFILE, ROOT, Built, Step, context, steps

SCRIPTS = Path(sysconfig.get_path("scripts"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE_EXTRAS: Final = ("tokenizers", "kubernetes", "otel")
LOCKS = sorted(ROOT.glob("requirements*.lock"))
INSTRUCTIONS = steps(DOCKERFILE.read_text())
LAST_STAGE = INSTRUCTIONS[max(at for at, step in enumerate(INSTRUCTIONS) if step.name == "FROM") :]


def every(name: str, among: list[Step] = INSTRUCTIONS) -> list[str]:
    return [step.rest for step in among if step.name == name]


def locked(path: Path) -> dict[NormalizedName, tuple[Requirement, int]]:
    """By name: the requirement, and how many files of it are allowed."""
    blocks = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    lines = [line for line in blocks if line and not line.lstrip().startswith("#")]
    requirements = [(Requirement(line.partition("--hash")[0]), line.count("--hash=sha256:")) for line in lines]
    found = {canonicalize_name(one.name): (one, files) for one, files in requirements}
    assert len(found) == len(lines), "one version of each package, whatever the Python"
    return found


# The Dockerfile --------------------------------------------------------------------------------------------------


def test_the_linter_finds_nothing() -> None:
    run = subprocess.run([SCRIPTS / "hadolint", "--failure-threshold", "style", DOCKERFILE], check=False)
    assert run.returncode == 0


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    """A linter that says nothing about anything proves nothing."""
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("python:3.12-slim-trixie", "python"))
    run = subprocess.run([SCRIPTS / "hadolint", bad], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode != 0
    assert "DL3006" in run.stdout  # an image without a tag


def test_the_base_is_named_once_with_its_tag_and_perhaps_its_digest() -> None:
    stages = {rest.partition(" AS ")[2] for rest in every("FROM")}
    bases = [rest.split()[0] for rest in every("FROM") if rest.split()[0] not in stages]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases[0])
    version = bases[0].removeprefix("python:").partition("-")[0]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_it_runs_as_the_user_of_the_chart_and_not_as_root() -> None:
    assert every("USER", LAST_STAGE) == ["65532:65532"]
    assert every("ENTRYPOINT", LAST_STAGE) == ['["kvindexer"]']
    assert every("CMD", LAST_STAGE) == ['["serve"]']
    after = [step.name for step in LAST_STAGE[[step.name for step in LAST_STAGE].index("USER") :]]
    assert not {"RUN", "COPY", "USER"} & set(after[1:])


def test_no_setting_is_a_variable_of_the_image() -> None:
    """It would outrank the configuration file of whoever runs it."""
    assert "KVINDEXER_" not in " ".join(every("ENV"))


def test_the_last_stage_has_no_installer_and_takes_only_what_was_installed() -> None:
    assert every("COPY", LAST_STAGE) == ["--from=build /opt/kvindexer /opt/kvindexer"]
    (run,) = every("RUN", LAST_STAGE)
    assert run.startswith("python -m pip uninstall ")
    assert run.endswith(" pip")


def test_every_installation_is_of_locked_wheels_or_without_an_index() -> None:
    installs = [
        part for run in every("RUN") for part in run.split("&&") if re.search(r"pip .*\b(install|wheel)\b", part)
    ]
    assert len(installs) == 4
    for part in installs:
        assert "--no-index" in part or {"--require-hashes", "--only-binary"} <= set(part.split()), part
    assert not re.search(r"apt|apk|curl|wget|gcc", " ".join(every("RUN")))


def test_only_what_the_image_is_made_of_reaches_the_builder() -> None:
    sent = {word for rest in every("COPY") if "--from" not in rest for word in rest.split()[:-1]}
    assert set(context()) == sent


def test_the_labels_that_registries_read_are_there() -> None:
    (labels,) = every("LABEL")
    names = {"title", "description", "licenses", "version", "revision", "source"}
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels)) == names
    assert f'licenses="{PROJECT["license"]}"' in labels


def test_compose_builds_this_image() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    builds = [service["build"] for service in services.values() if "build" in service]
    assert builds
    for build in builds:
        assert (ROOT / "deploy/compose" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE


def test_a_step_that_is_not_understood_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the image could do what the test of its steps leaves out."""
    strange = tmp_path / "Dockerfile"
    strange.write_text("ADD https://example.com/x /x\n")
    monkeypatch.setattr("imaged.DOCKERFILE", strange)
    with pytest.raises(NotImplementedError, match="ADD"):
        Built(tmp_path).build()


# The lock files --------------------------------------------------------------------------------------------------


def test_there_is_a_lock_file_for_each_use() -> None:
    names = {path.name.removeprefix("requirements").removesuffix(".lock") for path in LOCKS}
    assert names == {"", "-build", "-dev", "-image"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_package_has_one_version_and_the_hashes_of_its_files(path: Path) -> None:
    for requirement, files in locked(path).values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert requirement.url is None
        assert files > 0, requirement


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_no_lock_file_names_an_index_or_a_host(path: Path) -> None:
    assert not re.search(r"://|--index|--extra|--find-links|--trusted", path.read_text())


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_all_lock_files_agree_with_that_of_the_tests(path: Path) -> None:
    """What is tested is what is shipped."""
    tested = locked(ROOT / "requirements-dev.lock")
    both = [(one, tested[name][0]) for name, (one, _) in locked(path).items() if name in tested]
    assert both
    for shipped, known in both:
        assert shipped.specifier == known.specifier
    assert locked(path).keys() <= tested.keys() or path.name == "requirements-build.lock"


@pytest.mark.parametrize(
    ("path", "extras"),
    [
        ("requirements.lock", ()),
        ("requirements-image.lock", IMAGE_EXTRAS),
        ("requirements-dev.lock", ("dev", *IMAGE_EXTRAS)),
    ],
)
def test_the_lock_files_hold_what_the_project_asks_for(path: str, extras: tuple[str, ...]) -> None:
    """Whoever adds a dependency has to run scripts/lock."""
    found = locked(ROOT / path)
    asked = PROJECT["dependencies"] + [one for extra in extras for one in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, asked):
        (specifier,) = found[canonicalize_name(requirement.name)][0].specifier
        assert specifier.version in requirement.specifier, f"{requirement}: run scripts/lock"
