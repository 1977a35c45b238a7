"""README.md: the curl lines work in the order of the page, and answer what the page says where it says so."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from api_server import Api, serving
from kvindexer.settings import Settings
from tokenizing import make_tokenizer

PAGE = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROMPT = list(range(1, 65))
"""What "[1, 2, 3, ...]" stands for."""
COMMANDS = re.findall(r"^curl .*?'(?=\n)", PAGE, re.MULTILINE | re.DOTALL)
ROUTES = ("/register", "/v1/match", "/v1/routed", "/v1/feedback", "/v1/heat/prewarm", "/query", "/v1/explain")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tokenizers={"m": {"path": str(make_tokenizer(tmp_path))}}) as running:
        yield running


def asked(command: str) -> tuple[str, str | None]:
    """Path and body of a curl line."""
    program, flag, address, *rest = shlex.split(command.replace("[1, 2, 3, ...]", json.dumps(PROMPT)))
    assert (program, flag) == ("curl", "-s")
    url = urlsplit(f"http://{address}")
    assert url.port == Settings().port
    assert rest[:1] in ([], ["-d"])
    return f"{url.path}?{url.query}" if url.query else url.path, rest[1] if rest else None


def shown(start: str) -> Any:
    """The first JSON on the page that begins like this."""
    found, _ = json.JSONDecoder().raw_decode(PAGE, PAGE.index(start))
    return found


def test_the_lines_of_the_page_work_in_its_order(api: Api) -> None:
    answers: dict[str, Any] = {}
    for command in COMMANDS:
        path, body = asked(command)
        if path == "/v1/match" and not answers.get(path):
            api.store("tcp://10.0.0.11:5557", PROMPT[:32], block_size=16)
            api.store("tcp://10.0.0.11:5557", PROMPT[:48], block_size=16, medium="CPU")
        response = api.client.get(path) if body is None else api.client.post(path, content=body)
        assert response.status_code in (200, 201), f"{command}: {response.text}"
        answers.setdefault(path.partition("?")[0], response.json())
    assert set(answers) == set(ROUTES)
    answers["/v1/match"]["matches"][0]["verified_ms"] = 812.0
    assert answers["/v1/match"] == shown('{"model": "m", "blocks": 4')
    assert answers["/query"] == shown('{"default": {"pod-a"')
    assert answers["/v1/routed"]["instance"] == "pod-a"
    assert answers["/v1/feedback"]["outcome"] == "exact"
    assert answers["/v1/heat/prewarm"]["instance"] == "new-pod"
