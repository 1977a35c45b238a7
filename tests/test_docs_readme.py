"""README.md: the curl lines work in the order of the page, and answer what the page says where it says so.

And of every page: what is shown to be sent can be pasted, what is to be typed can be said, links lead to headings.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from api_server import Api, serving
from kvindexer.cli import parser
from kvindexer.settings import Settings
from tokenizing import make_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")})
PROMPT = list(range(1, 35))
"""The longest of the page."""
COMMANDS = re.findall(r"^curl .*?'(?=\n)", PAGE, re.MULTILINE | re.DOTALL)
ROUTES = ("/register", "/v1/match", "/v1/routed", "/v1/feedback", "/v1/heat/prewarm", "/query", "/v1/explain")
ELLIPSIS = re.compile(r"\.\.\.|…")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tokenizers={"m": {"path": str(make_tokenizer(tmp_path))}}) as running:
        yield running


def asked(command: str) -> tuple[str, str | None]:
    """Path and body of a curl line."""
    program, flag, address, *rest = shlex.split(command)
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
            api.store("tcp://10.0.0.11:5557", PROMPT[:16], block_size=16)
            api.store("tcp://10.0.0.11:5557", PROMPT[:32], block_size=16, medium="CPU")
        response = api.client.get(path) if body is None else api.client.post(path, content=body)
        assert response.status_code in (200, 201), f"{command}: {response.text}"
        answers.setdefault(path.partition("?")[0], response.json())
        if path == "/query":
            dynamo = response.json()
    assert set(answers) == set(ROUTES)
    answers["/v1/match"]["matches"][0]["verified_ms"] = 812.0
    assert answers["/v1/match"] == shown('{"model": "m", "blocks": 2')
    assert answers["/query"] == shown('{"default": {"pod-a"')
    assert dynamo == shown('{"scores": {"pod-a"')
    assert answers["/v1/routed"]["instance"] == "pod-a"
    assert answers["/v1/feedback"]["outcome"] == "exact"
    assert answers["/v1/heat/prewarm"]["instance"] == "new-pod"


def test_the_python_of_the_page_works(api: Api) -> None:
    (text,) = fenced(PAGE, "python")
    api.add("pod-a", model="m", block_size=16)
    with pytest.raises(SystemExit):
        exec(text.replace("localhost:8090", f"127.0.0.1:{api.address[1]}") + "raise SystemExit(answer)", {})  # noqa: S102 - that is what the page is for


def fenced(page: str, *languages: str) -> list[str]:
    """The blocks of these languages, in order; `` is a block that names none."""
    found = re.findall(r"^( *)```(\w*).*\n((?:.*\n)*?)\1```$", page, re.MULTILINE)
    return [text for _, language, text in found if language in languages]


def unusable(page: str) -> list[str]:
    """What the page shows to be sent, or run, and nobody can paste: bodies that are no JSON, and words left out."""
    shells = "".join(fenced(page, "", "sh", "bash", "console"))
    commands = re.findall(r"\b(?:curl|kvindexer|echo) (?:'[^']*'|\\\n|[^\n'])*", shells)
    found = [command for command in commands if ELLIPSIS.search(command)]
    for body in re.findall(r"curl .*?(?:-d|--data|--data-binary) '([^']*)'", "\n".join(commands), re.DOTALL):
        try:
            json.loads(body)
        except ValueError:
            found.append(body)
    for text in fenced(page, "python"):
        found += [text for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and node.value is ...]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_can_be_pasted(page: Path) -> None:
    assert not unusable(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "```\ncurl -s h/v1/match -d '{\"tokens\": [1, 2, ...]}'\n```",
        "```sh run\ncurl -s h/v1/match \\\n  -d '{\"tokens\": [1,]}'\n```",
        "```\nkvindexer serve --source instance=a,...\n```",
        "```python\nTokens([1, 2, ...])\n```",
    ],
)
def test_a_line_that_cannot_be_pasted_is_found(line: str) -> None:
    assert unusable(f"words\n\n{line}\n")


def commands_of(page: str) -> list[list[str]]:
    """The words behind `kvindexer`, wherever a line of a block calls it."""
    text = re.sub(r"\\\n\s*", " ", "".join(fenced(page, "", "sh", "bash", "console")))
    called = re.findall(r"(?:^|[|;(] *|until |if )(?:\w+=\S+ )*kvindexer (.*)", text, re.MULTILINE)
    ends = re.compile(r" (?:\||\|\||&&|&|2?>)(?: |$)")
    return [shlex.split(ends.split(line, maxsplit=1)[0], comments=True) for line in called]


def test_every_command_line_of_a_page_can_be_said() -> None:
    """Its commands and flags are those of this version; --version and --help say something and end."""
    said = [(page, words) for page in PAGES for words in commands_of(page.read_text(encoding="utf-8"))]
    assert len(said) > 40
    assert [f"{page.name}: kvindexer {shlex.join(words)}" for page, words in said if not sayable(words)] == []
    assert commands_of("```\nuntil kvindexer serve --prot 1 | cat\n```\n") == [["serve", "--prot", "1"]]
    assert not sayable(["serve", "--prot", "1"])


def sayable(words: list[str]) -> bool:
    try:
        parser().parse_args(words)
    except SystemExit as end:
        return end.code == 0
    return True


def headings(page: Path) -> set[str]:
    """The anchors that a page has, as forges make them of its headings."""
    outside = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-") for line in plain}


def test_links_lead_to_headings_that_there_are() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, heading = target.partition("#")
            there = page.parent / file if file else page
            if "://" not in target and there.suffix == ".md":
                assert heading in headings(there), f"{page.name}: {target}"
                checked += 1
    assert checked > 20
