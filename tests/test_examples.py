"""The examples and the page of the Python client do what they say."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import compare
import router
from api_server import Api, serving
from kvindexer.client import Chat, Text, Tokens
from kvindexer.client.methods import Followed, Method, Methods
from served import Served

PAGE = Path(__file__).parent.parent / "docs" / "python-client.md"
PROMPT = list(range(1, 14))


class Upstream:
    """An engine's HTTP server: answers as it is told, and remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[Any] = []
        self.answer = b'{"usage": {"prompt_tokens_details": {"cached_tokens": 12}}}'
        self.content_type = "application/json"


@contextmanager
def upstream() -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", said.content_type)
            self.send_header("content-length", str(len(said.answer)))
            self.end_headers()
            self.wfile.write(said.answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    said = Upstream(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield said
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def routing(index: str, *engines: Upstream) -> Iterator[TestClient]:
    """The router before these engines."""
    with TestClient(router.app(index, [engine.url for engine in engines])) as client:
        yield client


def url_of(api: Api) -> str:
    return f"http://127.0.0.1:{api.address[1]}"


def completion(client: TestClient, prompt: list[int]) -> None:
    body = {"model": "m", "prompt": prompt}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        yield running


# The router


def test_the_router_sends_a_prompt_to_its_holder_and_tells_what_came_of_it(api: Api) -> None:
    with upstream() as first, upstream() as second, routing(url_of(api), first, second) as client:
        api.add("pod-a", aliases=(first.url,))
        api.store(api.add("pod-b", aliases=(second.url,)), PROMPT[:8])
        completion(client, PROMPT)
        assert (len(first.asked), len(second.asked)) == (0, 1)
        assert second.asked[0]["prompt"] == PROMPT
    figures = api.fleet.accuracies["tcp://pod-b:5557"].figures
    assert (figures.predicted_tokens, figures.cached_tokens) == (8, 12)
    match = api.post("/v1/match", {"model": "m", "tokens": PROMPT})["matches"][0]
    assert match["speculative_tokens"] == 12


def test_a_streamed_answer_is_passed_on_and_its_usage_is_reported(api: Api) -> None:
    with upstream() as engine, routing(url_of(api), engine) as client:
        api.store(api.add("pod-a", aliases=(engine.url,)), PROMPT)
        engine.content_type = "text/event-stream"
        engine.answer = (
            b'data: {"choices": []}\n\n' * 5000 + b'data: {"usage": {"cached_tokens":8}}\n\ndata: [DONE]\n\n'
        )
        answer = client.post("/v1/completions", json={"model": "m", "prompt": PROMPT, "stream": True})
        assert answer.content == engine.answer
        assert answer.headers["content-type"].startswith("text/event-stream")
    assert api.fleet.accuracies["tcp://pod-a:5557"].figures.cached_tokens == 8


@pytest.mark.parametrize("body", [b"", b"[1]", b"?", b'{"model": "m", "prompt": ["a", "b"]}'], ids=repr)
def test_what_the_router_can_not_look_up_it_passes_on(api: Api, body: bytes) -> None:
    with upstream() as engine, routing(url_of(api), engine) as client:
        sent = client.post("/v1/completions", content=body)
        assert sent.status_code == 200 or not engine.asked


def test_without_an_index_engines_have_their_turns() -> None:
    with upstream() as first, upstream() as second, routing("http://127.0.0.1:1", first, second) as client:
        for _ in range(6):
            completion(client, PROMPT)
        assert (len(first.asked), len(second.asked)) == (3, 3)


def test_an_engine_that_is_down_is_a_502() -> None:
    with routing("http://127.0.0.1:1", Upstream("http://127.0.0.1:1")) as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": PROMPT})
    assert answer.status_code == 502
    assert "no answer" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ({"prompt": [1, 2], "cache_salt": "s"}, Tokens([1, 2], cache_salt="s")),
        ({"prompt": "why?"}, Text("why?")),
        (
            {"messages": [{"role": "user", "content": "x"}], "tools": []},
            Chat([{"role": "user", "content": "x"}], tools=[]),
        ),
        ({"prompt": [-1]}, None),
        ({"prompt": [[1], [2]]}, None),
        ({"prompt": []}, None),
        ({}, None),
    ],
    ids=str,
)
def test_prompts_of_the_openai_api(asked: dict[str, Any], prompt: object) -> None:
    assert router.prompt_of(asked) == prompt


def test_the_router_beats_round_robin(tmp_path: Path) -> None:
    """Done when: on cached tokens, with the simulated fleet and the same seeded chats."""
    shape = compare.Shape(requests=120)
    served = Served(tmp_path, "index", "--set", "drain_s=0")
    try:
        served.start()
        routed = asyncio.run(compare.routed(shape, served.url))
    finally:
        served.close()
    in_turn = compare.round_robin(shape)
    assert routed.prompt_tokens == in_turn.prompt_tokens
    assert routed.cached_tokens > 1.2 * in_turn.cached_tokens
    assert routed.busiest < 2


@pytest.mark.parametrize("name", ["router", "compare"])
def test_examples_run_as_scripts(name: str) -> None:
    script = Path(router.__file__).with_name(f"{name}.py")
    said = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert "--index" in said


def test_round_robin_has_what_the_page_says() -> None:
    """The other half of the figure, which nothing but the seed decides."""
    share = compare.round_robin(compare.Shape())
    percent = round(100 * share.cached_tokens / share.prompt_tokens)
    assert f"| round-robin | {percent} % | {share.busiest:.2f} |" in PAGE.read_text(encoding="utf-8")
    for page in (PAGE.with_name("schedulers.md"), PAGE.parent.parent / "README.md"):
        assert f"{percent} % with round-robin" in page.read_text(encoding="utf-8"), page


# The page


def test_every_line_of_python_on_the_page_works(api: Api) -> None:
    api.store(api.add("pod-a"), PROMPT[:8])
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    program = "".join(blocks).replace("http://localhost:8090", url_of(api))
    names: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    assert names["keys"]


def test_the_page_names_every_method_and_error() -> None:
    page = PAGE.read_text(encoding="utf-8")
    methods = [name for name, value in vars(Methods).items() if isinstance(value, Method | Followed)]
    assert len(methods) > 10
    assert not [name for name in methods if f"`{name}`" not in page]
