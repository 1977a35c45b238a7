"""docs/security.md and SECURITY.md: every command runs, every configuration loads, every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml

from kvindexer.access.doors import DOORS
from kvindexer.access.identity import ROLES
from kvindexer.access.tokens import digest_of, read_tokens
from kvindexer.access.transport import open_transport
from kvindexer.events.curve import open_curve
from kvindexer.settings import load_settings

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
POLICY: Final = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
BLOCKS: Final = [
    (kind, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
    for indent, kind, text in re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the page have made."""
    made = tmp_path_factory.mktemp("security")
    (config,) = (text for kind, text in BLOCKS if kind == "yaml" and text.startswith("host:"))
    (made / "kvindexer.yaml").write_text(config)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for kind, text in BLOCKS:
        if kind == "sh":
            subprocess.run(
                ["/bin/sh", "-euc", text], cwd=made, check=True, capture_output=True, env={**os.environ, "PATH": path}
            )
    return made


def test_the_commands_make_what_the_service_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    settings = load_settings(Path("kvindexer.yaml"), {}, {})
    assert settings.closed
    tokens = read_tokens(folder / "tokens.yaml")
    for name in ("scheduler", "registrar"):
        secret = (folder / f"{name}.token").read_bytes().strip()
        assert tokens[digest_of(secret)].identity.name == name
    assert (folder / "tokens.yaml").stat().st_mode & 0o077 == 0
    transport = open_transport(settings)
    assert transport is not None
    open_curve(settings.curve_secret_key_file)


def test_the_client_s_certificate_is_one_of_the_authority(folder: Path) -> None:
    verify = ["openssl", "verify", "-CAfile", "ca.pem", "client.pem", "server.pem"]
    assert subprocess.run(verify, cwd=folder, check=False, capture_output=True).returncode == 0


def test_every_configuration_is_one() -> None:
    loaded = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    assert len(loaded) == 3
    (sources,) = (content for content in loaded if "sources" in content)
    assert load_settings(None, sources, {}).sources[0].curve_server_key
    assert {kind for kind, _ in BLOCKS} == {"sh", "yaml"}


def test_roles_and_routes_of_the_page_are_those_of_the_doors() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert set(rows) == set(ROLES)
    for path, door in DOORS.items():
        named = [role for role in ("query", "register") if f"`{path}`" in rows[role]]
        assert named in ([], [door.role])
    salted = {path for path, door in DOORS.items() if door.shows == "every salt"}
    said = PAGE[PAGE.index("routes that show blocks of all salts") :].partition(") are shut")[0]
    named_there = set(re.findall(r"`(/[^`]+)`", said))
    assert {path for path in salted if "/heat/" not in path} == named_there - {"/v1/heat/..."}


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/security.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target
    assert "@" not in re.sub(r"https://\S+|\"rq:[^\"]+\"", "", POLICY), "no invented address"
