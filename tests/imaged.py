"""deploy/docker/Dockerfile, followed without a container engine: each step in a folder that stands for the root.

Understands only what that file uses and refuses the rest, so a step of the image can't be left out here unseen. The
base image is a virtual environment of a Python of this machine at `usr/local`, where the official images have theirs.
Not shown by it: the base image itself, the other architecture, and what an engine adds (a read-only root, limits).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from string import Template
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
DOCKERFILE: Final = ROOT / "deploy" / "docker" / "Dockerfile"
IGNORED: Final = ROOT / ".dockerignore"
USER: Final = 65532

_OURS: Final = re.compile(r"(?<![\w./:-])/(?=(?:src|opt)\b)")  # paths of the image that stand for folders here
_INHERITED: Final = ("VIRTUAL_ENV", "PYTHON", "KVINDEXER_")  # of our own environment, nothing of these goes in


def identity() -> dict[str, Any]:
    """How a process becomes the user of the image. Only root can; anybody else is unprivileged already."""
    return {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}


def interpreter() -> str:
    """Find a Python that the user of the image may run: one in the home of root is closed to it."""
    usable = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    for path in (os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3"):
        command = ["/usr/bin/env", path, "-c", usable]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False, **identity()).returncode == 0:
            return path
    raise FileNotFoundError("no Python >= 3.11 with venv that user 65532 may run: install one, or don't test as root")


class Step(NamedTuple):
    """One instruction: its name in capitals, and the rest of it on one line."""

    name: str
    rest: str


def steps(text: str) -> list[Step]:
    """Read the instructions; comments are gone, and lines that go on are one."""
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
    whole = re.sub(r"\\\n\s*", "", lines)
    return [Step(*line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


class Built:
    """The last stage of the image, and how it would be run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"  # every stage has this path while it is built: scripts name their interpreter
        self.env: dict[str, str] = {}
        self.command: list[str] = []
        self.user = ""
        self.cwd = self.root
        self._folder = folder
        self._stage = ""

    def build(self) -> None:
        """Follow the Dockerfile from its first line to its last."""
        for step in steps(DOCKERFILE.read_text()):
            self._follow(step)

    def _follow(self, step: Step) -> None:
        match step:
            case Step("FROM", rest):
                self._begin(rest)
            case Step("COPY", rest):
                self._copy(*shlex.split(rest))
            case Step("RUN", rest):
                self._run(rest)
            case Step("ENV", rest):
                self.env |= {key: self._here(value) for key, value in _pairs(rest)}
            case Step("WORKDIR", rest):
                self.cwd = Path(self._here(rest))
                self.cwd.mkdir(parents=True, exist_ok=True)
            case Step("USER", rest):
                self.user = rest
            case Step("ENTRYPOINT" | "CMD", rest):
                self.command += json.loads(rest)
            case Step("LABEL" | "ARG" | "EXPOSE", _) | Step("HEALTHCHECK", "NONE"):
                pass  # say something, do nothing
            case _:
                raise NotImplementedError(" ".join(step))

    def _begin(self, rest: str) -> None:
        base, _, stage = rest.partition(" AS ")
        if self._stage:
            self.root.rename(self._folder / self._stage)
        if (self._folder / base).exists():
            shutil.copytree(self._folder / base, self.root, symlinks=True)
        else:
            subprocess.run([interpreter(), "-m", "venv", self.root / "usr/local"], check=True)
        self._stage = stage or "last"
        self.env = {"PATH": f"{self.root}/usr/local/bin:/usr/bin:/bin"}
        self.cwd = self.root

    def _copy(self, *words: str) -> None:
        *sources, target = words
        into = self.cwd / self._here(target)
        if sources[0].startswith("--from="):
            stage, (source,) = sources[0].removeprefix("--from="), sources[1:]
            shutil.copytree(self._folder / stage / source.lstrip("/"), into, symlinks=True)
            return
        for source in sources:
            if source not in context():
                raise FileNotFoundError(f"{source} is not in the context: .dockerignore")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / source, into)

    def _run(self, command: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_INHERITED)}
        # A command is one of our own file; the shell is the one that an engine would use.
        subprocess.run(["/bin/sh", "-c", self._here(command)], cwd=self.cwd, env={**kept, **self.env}, check=True)

    def _here(self, text: str) -> str:
        return _OURS.sub(f"{self.root}/", Template(text).safe_substitute(self.env))


def context() -> list[str]:
    """The names in the root of the checkout that .dockerignore lets through."""
    first, *others = [line for line in IGNORED.read_text().splitlines() if line and not line.startswith("#")]
    if first != "*":
        raise NotImplementedError("a .dockerignore that doesn't begin with nothing")
    allowed = [line[1:] for line in others if line.startswith("!")]
    return sorted(path.name for path in ROOT.iterdir() if any(fnmatch(path.name, one) for one in allowed))


def _pairs(rest: str) -> Iterator[tuple[str, str]]:
    for word in shlex.split(rest):
        key, equals, value = word.partition("=")
        if not equals:
            raise NotImplementedError(f"ENV {rest}")
        yield key, value
