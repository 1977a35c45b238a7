"""docs/schedulers.md: every curl line on the page works, and answers what the page says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from api_server import Api, serving
from kvindexer.settings import Settings
from kvindexer.types import SourceSpec

PAGE = Path(__file__).parent.parent / "docs" / "schedulers.md"
PROMPT = list(range(1, 14))


class Example(NamedTuple):
    """A line to paste, and the answer that the page shows below it."""

    command: str
    answer: object | None


def examples() -> list[Example]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: list[Example] = []
    for language, text in fenced:
        if language == "json":
            found[-1] = Example(found[-1].command, json.loads(text))
        else:
            found.append(Example(text, None))
    return found


@pytest.fixture(scope="module")
def fleet() -> Iterator[Api]:
    """The fleet of the page."""
    with serving() as api:
        for number, name in enumerate(("pod-a", "pod-b", "pod-c"), 11):
            api.fleet.register(
                SourceSpec(instance=name, model="m", block_size=4, endpoint=f"tcp://10.0.0.{number}:5557")
            )
        api.store("tcp://10.0.0.11:5557", PROMPT[:4])
        api.store("tcp://10.0.0.11:5557", PROMPT[:12], medium="CPU")
        api.store("tcp://10.0.0.12:5557", PROMPT[:8])
        yield api


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.command[:60])
def test_a_line_of_the_page_does_what_the_page_says(fleet: Api, example: Example) -> None:
    program, flag, address, *rest = shlex.split(example.command)
    assert (program, flag, rest[:1]) == ("curl", "-s", ["-d"] if rest else [])
    url = urlsplit(f"http://{address}")
    assert url.port == Settings().port
    client = fleet.client
    response = client.post(url.path, content=rest[1]) if rest else client.get(f"{url.path}?{url.query}")
    assert response.status_code == 200, response.text
    if example.answer is not None:
        assert response.json() == example.answer


def test_the_page_has_examples_of_all_its_routes() -> None:
    commands = "".join(example.command for example in examples())
    routes = ("/v1/match", "/v1/match/batch", "/v1/keys", "/v1/routed", "/v1/feedback", "/v1/explain")
    assert all(f"localhost:8090{path} " in commands for path in routes)
    assert "localhost:8090/v1/heat/prewarm?" in commands


def test_the_limits_of_the_page_are_settings() -> None:
    limits = PAGE.read_text(encoding="utf-8").partition("## Limits")[2]
    named = set(re.findall(r"`(max_\w+)`", limits))
    assert len(named) >= 5
    assert named <= set(Settings.model_fields)
