"""docs/offload.md: every curl line on the page works, and answers what the page says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from api_server import Api, batch, serving, stored
from kvindexer.settings import Settings
from kvindexer.tiering.advice import RULES
from kvindexer.types import SourceSpec

PAGE = (Path(__file__).parent.parent / "docs" / "offload.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [text for language, text in BLOCKS if not language and text.startswith("curl")]
PROMPT = list(range(1, 13))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Api]:
    """The fleet of the page."""
    with serving() as api:
        for number, name in enumerate(("pod-a", "pod-b"), 11):
            api.fleet.register(
                SourceSpec(instance=name, model="m", block_size=4, endpoint=f"tcp://10.0.0.{number}:5557")
            )
        api.add("shared", type="store", tier="remote", readers=("pod-b",))
        api.store("tcp://10.0.0.11:5557", PROMPT)
        event = stored(PROMPT)
        second = {**event, "block_hashes": [1001], "parent_block_hash": 1000, "token_ids": PROMPT[4:8]}
        api.fleet.apply("tcp://10.0.0.11:5557", batch({**second, "extra_keys": [None], "medium": "CPU"}))
        api.store("tcp://10.0.0.12:5557", PROMPT[:8])
        api.fleet.apply("tcp://shared:5557", batch({**second, "extra_keys": [None], "medium": None}))
        api.fleet.apply(
            "tcp://10.0.0.12:5557", batch({"type": "BlockRemoved", "block_hashes": [1001], "medium": "GPU"})
        )
        yield api


def parts(command: str) -> tuple[str, str | None]:
    """Path and body of a curl line."""
    program, flag, address, *rest = shlex.split(command)
    assert program == "curl"
    assert flag in ("-s", "-sN")
    url = urlsplit(f"http://{address}")
    assert url.port == Settings().port
    assert rest[:1] in ([], ["-d"])
    return f"{url.path}?{url.query}" if url.query else url.path, rest[1] if rest else None


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:50])
def test_a_line_of_the_page_works_and_answers_what_the_page_says(fleet: Api, command: str) -> None:
    path, body = parts(command)
    if "/v1/changes" in path:
        with fleet.client.stream("GET", path) as response:
            assert response.status_code == 200
            lines = iter(response.iter_lines())
            assert "event: reset" in (next(lines) for _ in range(10))
        return
    response = fleet.client.get(path) if body is None else fleet.client.post(path, content=body)
    assert response.status_code == 200, response.text
    following = BLOCKS[[text for _, text in BLOCKS].index(command) + 1]
    if following[0] == "json":
        assert response.json() == json.loads(following[1])


def test_the_page_has_examples_of_all_its_routes() -> None:
    paths = {parts(command)[0].partition("?")[0] for command in COMMANDS}
    assert paths == {"/v1/blocks/locate", "/v1/offload/plan", "/v1/tiers", "/v1/changes"}


def test_the_table_of_advice_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| .* \| (drop|offload|keep) \| `(\w+)` \|$", PAGE, re.MULTILINE)
    in_code: list[Any] = [tuple(rule.verdict) for rule in RULES if not rule.bottom]
    assert rows == in_code


def test_the_limits_of_the_page_are_settings() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Limits")[2], re.MULTILINE))
    assert len(named) >= 4
    assert named <= set(Settings.model_fields)
