"""The house: arrows point inwards, and its picture is the one that the code draws."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvindexer"
CORE = (
    "types",
    "errors",
    "events/wire",
    "events/stream",
    "events/flags",
    "events/held",
    "events/states",
    "tokenization/blocks",
    "tokenization/extras",
    "index",
    "tiering",
)
ALLOWED_OUTSIDE = {"msgspec", "xxhash"}
"""Third-party libraries of the core: codecs and hashing, no framework, no I/O."""
IO_MODULES = {"asyncio", "socket", "threading", "subprocess", "os", "time", "logging", "pathlib", "io"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def core_files() -> list[Path]:
    found: list[Path] = []
    for room in CORE:
        place = PACKAGE / room
        found += place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    return found


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_rooms_do_no_io_and_import_no_shell(path: Path) -> None:
    core = {f"kvindexer.{room.replace('/', '.')}" for room in CORE}
    for name in imports(path):
        top = name.split(".")[0]
        if top == "kvindexer":
            assert any(name == room or name.startswith(f"{room}.") for room in core), f"imports the shell: {name}"
        else:
            assert top in ALLOWED_OUTSIDE or top in sys.stdlib_module_names, f"imports a framework: {name}"
            assert top not in IO_MODULES, f"does I/O: {name}"


def test_only_the_composition_root_knows_everybody() -> None:
    """The API knows nothing of sockets, the sockets nothing of the API."""
    for path in (PACKAGE / "api").glob("*.py"):
        assert not any(name.startswith(("zmq", "kvindexer.events.subscriber")) for name in imports(path)), path
    for path in (PACKAGE / "events").glob("*.py"):
        assert not any(name.startswith("kvindexer.api") for name in imports(path)), path


def test_the_client_knows_nothing_of_what_answers_it() -> None:
    """It takes from the core how blocks are named, and nothing else; the service doesn't take anything from it."""
    allowed = ("kvindexer.client", "kvindexer.errors", "kvindexer.types", "kvindexer.tokenization.")
    for path in (PACKAGE / "client").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            if top == "kvindexer":
                assert name.startswith(allowed), f"{path.name} imports {name}"
            else:
                assert top in {"httpx", "msgspec"} | sys.stdlib_module_names, f"{path.name} imports {name}"
    for path in PACKAGE.rglob("*.py"):
        if "client" not in path.relative_to(PACKAGE).parts[:1]:
            assert not any(name.startswith("kvindexer.client") for name in imports(path)), path


def test_the_architecture_page_is_the_one_that_the_code_draws() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    render = runpy.run_path(str(ROOT / "scripts" / "architecture-page"))["rendered"]
    assert render(page) == page, "run scripts/architecture-page"


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for part in page.read_text().split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_reliability_page_names_exists() -> None:
    known = {path.name for path in (ROOT / "tests").glob("*.py")}
    for path in (ROOT / "tests").glob("test_*.py"):
        known |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = {word for word in page.split("`") if word.startswith("test_")}
    assert len(named) > 20
    assert named <= known


_EACH_BY_ITSELF = """
import os, sys, pkgutil, importlib
for name in ("fastapi", "pydantic_settings", "redis.asyncio", "httpx", "uvicorn", "zmq", "rich", "lightkube"):
    importlib.import_module(name)
import kvindexer
names = [found.name for found in pkgutil.walk_packages(kvindexer.__path__, "kvindexer.", onerror=print)]
failed = []
for name in names:
    if name.endswith("__main__"):
        continue
    child = os.fork()
    if not child:
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(len(names), *failed)
"""


def test_every_module_can_be_the_first_that_is_imported() -> None:
    """No two of them need each other."""
    ran = subprocess.run([sys.executable, "-c", _EACH_BY_ITSELF], capture_output=True, text=True, check=True)
    count, *failed = ran.stdout.split()
    assert int(count) > 200
    assert not failed, ran.stderr
