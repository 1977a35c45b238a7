"""Small tokenizers of real form, and an HTTP server that answers as an engine does, or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = (
    "<s>",
    "</s>",
    "<unk>",
    "user",
    "assistant",
    "system",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "dog",
)
IDS = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ' ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    """Tokens of words, as the small tokenizer makes them."""
    return [IDS.get(word, IDS["<unk>"]) for word in text.split()]


def make_tokenizer(directory: Path, *, template: str | None = TEMPLATE, adds_bos: bool = True, **config: Any) -> Path:
    """A directory as Hugging Face lays it out: words are tokens; prompts begin with <s>."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": template}
    values = {name: value for name, value in (values | config).items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


Reply = tuple[int, bytes]
Says = Callable[[dict[str, Any]], Reply]


def reply(body: Any, status: int = 200) -> Reply:
    return status, json.dumps(body).encode()


def tokens_of(asked: dict[str, Any]) -> Reply:
    """What /tokenize says: a token a word; messages are put into words by the engine's own template."""
    text = asked.get("prompt") or " ".join(message["content"] for message in asked["messages"])
    return reply({"count": len(ids(text)), "max_model_len": 4096, "tokens": ids(text), "token_strs": None})


class FakeEngine:
    """An engine's HTTP server; `says` answers by path, and may be changed while it runs."""

    def __init__(self) -> None:
        self.says: dict[str, Says] = {"/tokenize": tokens_of}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.health = 200
        self.released = threading.Event()
        self.url = ""

    def hang(self, asked: dict[str, Any]) -> Reply:
        """Answer when the test is over."""
        self.released.wait(30)
        return tokens_of(asked)

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@contextmanager
def fake_engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            """Clients may go at any time."""
            with suppress(ConnectionResetError, BrokenPipeError):
                super().handle()

        def do_GET(self) -> None:
            self._send(engine.health, b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            engine.asked.append((self.path, body))
            engine.headers.append({name.lower(): value for name, value in self.headers.items()})
            says = engine.says.get(self.path)
            try:
                self._send(*(says(body) if says else reply({"detail": "Not Found"}, 404)))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield engine
    finally:
        engine.released.set()
        server.shutdown()
        server.server_close()
