"""A fake API server of Kubernetes that confirms tokens: real HTTPS in threads, with the faults that a test wants."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"


class TokenReviews:
    """`users`: by token, user and groups; everything else is told by attributes."""

    def __init__(
        self, context: ssl.SSLContext | None, users: dict[str, tuple[str, list[str]]], audience: str
    ) -> None:
        self.users = users
        self.own_token = "ours"
        self.audiences: list[str] | None = [audience]
        """What the answer says that the token is good for."""
        self.status = 201
        self.garbage = False
        self.asked: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.gate = threading.Event()
        """Answers wait for it."""
        self.gate.set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.answer))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        """Where it listens, with TLS."""
        return f"https://127.0.0.1:{self.port}"

    def answer(self, path: str, authorization: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Of one request."""
        with self._lock:
            self.asked.append(body)
            self.under_way += 1
            self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            self.gate.wait(20)
            return self._decide(path, authorization, body)
        finally:
            with self._lock:
                self.under_way -= 1

    def _decide(self, path: str, authorization: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != PATH or body["kind"] != "TokenReview" or body["apiVersion"] != "authentication.k8s.io/v1":
            return 404, {}
        if authorization != f"Bearer {self.own_token}":
            return 401, {}
        if self.status != 201:
            return self.status, {}
        if self.garbage:
            return 201, ["no review"]
        known = self.users.get(body["spec"]["token"])
        status: dict[str, Any] = {"authenticated": False, "error": "token is not known"}
        if known is not None:
            status = {"authenticated": True, "user": {"username": known[0], "groups": known[1]}}
            if self.audiences is not None:
                status["audiences"] = self.audiences
        return 201, {**body, "status": status}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it; a second time does nothing."""
        self.gate.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def _handler(
    answer: Callable[[str, str, dict[str, Any]], tuple[int, Any]],
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):  # of HTTP/1.0: a server that is ended is gone at once
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, said = answer(self.path, self.headers.get("authorization", ""), body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
