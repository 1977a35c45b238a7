"""The steps of the image, each of them done here: what comes out holds what is locked, and serves as nobody."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from imaged import ROOT, USER, Built, identity
from kvindexer import __version__
from test_image import locked

pytestmark = pytest.mark.proof

START_S = 30
INVENTORY = """
import json, platform
from importlib.metadata import distributions
print(json.dumps([platform.python_version(), {one.metadata["Name"]: one.version for one in distributions()}]))
"""


@pytest.fixture(scope="module")
def image() -> Iterator[Built]:
    """Built once, and then without the right to write for anybody."""
    folder = Path(tempfile.mkdtemp(prefix="kvindexer-image-"))
    folder.chmod(0o755)  # the folders of pytest are closed to other users, and it runs as one
    try:
        built = Built(folder)
        built.build()
        allow(folder, "a-w,a+rX")
        yield built
    finally:
        allow(folder, "u+w")
        shutil.rmtree(folder)


def allow(folder: Path, mode: str) -> None:
    subprocess.run(["/bin/chmod", "-R", mode, folder], check=True)


def run(image: Built, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in the environment of the image, which has nothing of ours."""
    return subprocess.run(
        ["/usr/bin/env", *command],
        cwd=image.cwd,
        env=image.env,
        capture_output=True,
        text=True,
        check=False,
        **identity(),
    )


def test_it_holds_exactly_what_is_locked_and_the_service(image: Built) -> None:
    python, installed = json.loads(run(image, "python", "-c", INVENTORY).stdout)
    asked = {
        name: next(iter(one.specifier)).version
        for name, (one, _) in locked(ROOT / "requirements-image.lock").items()
        if one.marker is None or one.marker.evaluate({"python_full_version": python})
    }
    found = {canonicalize_name(name): version for name, version in installed.items()}
    assert found == asked | {"kvindexer": __version__}


def test_it_says_its_version(image: Built) -> None:
    said = run(image, image.command[0], "--version")
    assert (said.returncode, said.stdout.strip()) == (0, f"kvindexer {__version__}")


def test_no_installer_is_left(image: Built) -> None:
    assert run(image, "python", "-m", "pip", "--version").returncode != 0
    assert not [path for path in image.root.rglob("pip*") if path.parent.name == "bin"]


def test_the_user_is_the_one_that_we_try_it_as(image: Built) -> None:
    assert image.user == f"{USER}:{USER}"


def test_it_cannot_write_where_it_runs(image: Built) -> None:
    said = run(image, "python", "-c", "open('x', 'w')")
    assert "PermissionError" in said.stderr


def test_it_serves_and_ends_as_it_should(image: Built, tmp_path: Path) -> None:
    """The default command and a port: it starts, answers, and a SIGTERM ends it with 0."""
    log = tmp_path / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            ["/usr/bin/env", *image.command, "--port", "0"],
            cwd=image.cwd,
            env=image.env,
            stderr=written,
            **identity(),
        )
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"serving on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        with urllib.request.urlopen(f"{found[1]}/health", timeout=5) as answer:  # noqa: S310 - it said http itself
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
