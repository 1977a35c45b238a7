"""A fake API server of a Kubernetes cluster: list, watch, bookmarks, 410, rights, faults; real HTTP(S) in threads.

    put, delete ─► revisions ─► log of changes ─► list (pages) and watch (chunks, one JSON line an event)

It keeps what a real one promises: one revision for all objects, watches that begin after any revision that is not
compacted, DELETED for an object that a selector does not choose any more.  Everything else is told by the test.
Run as a script it serves two made-up pods, for a look at the service by hand: `python tests/kube_api.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import yaml

Key = tuple[str, str, str]
"""Collection (`pods`, or `<group>/<plural>`), namespace, name."""

V1 = "inference.networking.k8s.io/inferencepools"
V1ALPHA2 = "inference.networking.x-k8s.io/inferencepools"
TOKEN = "a-token-of-the-test"
_PATHS = (
    (re.compile(r"/api/v1/namespaces/([^/]+)/pods"), "pods"),
    (re.compile(r"/apis/inference\.networking\.k8s\.io/v1/namespaces/([^/]+)/inferencepools"), V1),
    (re.compile(r"/apis/inference\.networking\.x-k8s\.io/v1alpha2/namespaces/([^/]+)/inferencepools"), V1ALPHA2),
)


class Change(NamedTuple):
    """One revision."""

    revision: int
    key: Key
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass
class Asked:
    """A request that came in."""

    verb: str
    path: str
    params: dict[str, str]
    token: str


class KubeApi:
    """The server, and all that a test can do to it."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._changed = threading.Condition()
        self._objects: dict[Key, dict[str, Any]] = {}
        self._log: list[Change] = []
        self._revision = 100
        self._compacted = 0
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._epoch = 0
        """Grows when open watches are to end."""
        self._ending = "end"
        self._bookmarks = 0
        self.port = 0
        self.tokens = {TOKEN}
        self.statuses: dict[str, int] = {}
        """Refusals: by verb (`list`, `watch`), by `<verb> <collection>`, or for everything (``)."""
        self.groups = {"pods", V1, V1ALPHA2}
        """What the cluster has; the rest is 404."""
        self.gone_as_event = True
        """A version that is too old: 200 and an ERROR event, or the status 410."""
        self.delay_s = 0.0
        self.watch_s = 3600.0
        """Longest that a watch stays open, whatever it asks for."""
        self.paused = False
        """Requests are taken and not answered, watches fall silent."""
        self.garbage: bytes | None = None
        """What lists answer instead."""
        self.asked: list[Asked] = []
        self.dice = random.Random(1)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def kubeconfig(self, folder: Path, *, token: str = TOKEN, ca: Path | None = None, namespace: str = "ns") -> Path:
        """A file that leads here."""
        path = folder / "kubeconfig"
        cluster: dict[str, Any] = {"server": self.url}
        if ca is not None:
            cluster["certificate-authority"] = str(ca)
        path.write_text(
            yaml.safe_dump(
                {
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "test", "user": {"token": token}}],
                    "contexts": [
                        {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
                    ],
                }
            )
        )
        return path

    # The network

    def up(self) -> None:
        """Listen, at the same port as before."""
        self.paused = False
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.api = self
        if self._context is not None:
            self._server.socket = self._context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="kube-api"
        )
        self._thread.start()

    def down(self) -> None:
        """Refuse connections, and break those that there are."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self.paused = False
        self.cut()
        self._server.server_close()
        self._server = None

    def cut(self) -> None:
        """Break all connections, in the midst of whatever they carry."""
        with self._changed:
            self._epoch += 1
            self._ending = "cut"
            connections = list(self._connections)
            self._changed.notify_all()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def end_watches(self) -> None:
        """End all watches as a server does when their time is up."""
        self._end("end")

    def expire_watches(self) -> None:
        """Tell all watches in an ERROR event that their version is too old."""
        self.compact()
        self._end("expired")

    def _end(self, ending: str) -> None:
        with self._changed:
            self._epoch += 1
            self._ending = ending
            self._changed.notify_all()

    def bookmark(self) -> None:
        """Send a bookmark to all watches that want some."""
        with self._changed:
            self._revision += 1
            self._bookmarks += 1
            self._changed.notify_all()

    def compact(self) -> None:
        """Forget all changes so far: watches that begin before are 410; those that are open go on."""
        with self._changed:
            self._revision += 1
            self._compacted = self._revision
            self._changed.notify_all()

    # The objects

    def put(self, collection: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Create or replace an object."""
        with self._changed:
            metadata = {"namespace": "ns", **found["metadata"]}
            key = (collection, metadata["namespace"], metadata["name"])
            self._revision += 1
            metadata["resourceVersion"] = str(self._revision)
            made = {**found, "metadata": metadata}
            self._log.append(Change(self._revision, key, self._objects.get(key), made))
            self._objects[key] = made
            self._changed.notify_all()
            return made

    def delete(self, collection: str, name: str, namespace: str = "ns") -> None:
        """Remove an object."""
        with self._changed:
            key = (collection, namespace, name)
            self._revision += 1
            before = self._objects.pop(key)
            self._log.append(Change(self._revision, key, before, None))
            self._changed.notify_all()

    def objects(self, collection: str) -> list[dict[str, Any]]:
        """What there is."""
        with self._changed:
            return [one for key, one in self._objects.items() if key[0] == collection]

    def count(self, verb: str) -> int:
        """Requests of a kind so far."""
        return sum(one.verb == verb for one in self.asked)

    @property
    def watching(self) -> int:
        """Watches that are open."""
        return self._server.watching if self._server is not None else 0

    # Requests

    def refusal(self, asked: Asked, collection: str | None) -> int | None:
        """The status of an answer without an object, if it is one."""
        if asked.token not in self.tokens:
            return 401
        for scope in (f"{asked.verb} {collection}", asked.verb, ""):
            if scope in self.statuses:
                return self.statuses[scope]
        return None if collection in self.groups else 404

    def page(self, collection: str, namespace: str, params: Mapping[str, str]) -> dict[str, Any] | None:
        """One page of a list; None: 410."""
        with self._changed:
            at, _, last = params.get("continue", f"{self._revision}:").partition(":")
            if int(at) < self._compacted:
                return None
            items = [
                one
                for (of, place, name), one in sorted(self._objects.items())
                if (of, place) == (collection, namespace) and name > last and chosen(one, params)
            ]
            limit = int(params.get("limit", "100000"))
            metadata: dict[str, Any] = {"resourceVersion": at}
            if limit < len(items):
                metadata["continue"] = f"{at}:{items[limit - 1]['metadata']['name']}"
            return {"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items[:limit]}

    def events(self, collection: str, namespace: str, params: Mapping[str, str]) -> Iterator[dict[str, Any] | None]:
        """What a watch is told; None: nothing for a while.  Raises _CutError."""
        end = time.monotonic() + min(self.watch_s, float(params.get("timeoutSeconds", "3600")))
        with self._changed:
            at = int(params.get("resourceVersion") or self._revision)
            epoch, bookmarks = self._epoch, self._bookmarks
        while time.monotonic() < end and self._epoch == epoch:
            with self._changed:
                news = [] if self.paused else [one for one in self._log if one.revision > at]
                marked = not self.paused and self._bookmarks != bookmarks
                if news or marked:
                    at, bookmarks = self._revision, self._bookmarks
                else:
                    self._changed.wait(0.02)
            for change in news:
                if change.key[:2] == (collection, namespace):
                    yield from _told(change, params)
            if marked and params.get("allowWatchBookmarks") == "true":
                yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(at)}}}
            yield None
        if self._epoch != epoch and self._ending == "cut":
            raise _CutError
        if self._epoch != epoch and self._ending == "expired":
            yield {"type": "ERROR", "object": status(410)}


class _CutError(Exception):
    """The connection is to break."""


def status(code: int, message: str = "") -> dict[str, Any]:
    """An answer without an object."""
    text = message or {410: "too old resource version", 403: "pods is forbidden", 401: "Unauthorized"}.get(code, "no")
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "message": text,
        "reason": "Test",
    }


def _told(change: Change, params: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What a watch with a selector hears of a change."""
    before = change.before is not None and chosen(change.before, params)
    after = change.after is not None and chosen(change.after, params)
    if after:
        yield {"type": "MODIFIED" if before else "ADDED", "object": change.after}
    elif before and change.before is not None:
        gone = change.after or change.before
        metadata = {**gone["metadata"], "resourceVersion": str(change.revision)}
        yield {"type": "DELETED", "object": {**gone, "metadata": metadata}}


def chosen(found: Mapping[str, Any], params: Mapping[str, str]) -> bool:
    """Whether selectors choose an object."""
    labels = found["metadata"].get("labels") or {}
    name = params.get("fieldSelector", "").removeprefix("metadata.name=")
    if name and found["metadata"]["name"] != name:
        return False
    parts = re.findall(r"(?:[^,(]|\([^)]*\))+", params.get("labelSelector", ""))
    return all(_fits(part.strip(), labels) for part in parts)


def _fits(part: str, labels: Mapping[str, str]) -> bool:
    if found := re.fullmatch(r"(\S+) (in|notin) \((.*)\)", part):
        inside = labels.get(found[1]) in [value.strip() for value in found[3].split(",")]
        return inside if found[2] == "in" else not inside
    if part.startswith("!"):
        return part[1:] not in labels
    key, operator, value = re.fullmatch(r"([^=!]+)(!=|==|=)?(.*)", part).groups()  # type: ignore[union-attr]
    if operator is None:
        return key in labels
    return (labels.get(key) != value) if operator == "!=" else (labels.get(key) == value)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    api: KubeApi
    watching = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break in these tests; everything else is a slip."""
        if not isinstance(sys.exc_info()[1], OSError | _CutError | ValueError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.api._connections.add(self.connection)

    def finish(self) -> None:
        self.server.api._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        api = self.server.api
        parts = urlsplit(self.path)
        params = {name: values[0] for name, values in parse_qs(parts.query).items()}
        collection, namespace = next(
            ((of, found[1]) for pattern, of in _PATHS if (found := pattern.fullmatch(parts.path))), (None, "")
        )
        verb = "watch" if params.get("watch") == "true" else "list"
        asked = Asked(verb, parts.path, params, self.headers.get("authorization", "").removeprefix("Bearer "))
        api.asked.append(asked)
        epoch = api._epoch
        while api.paused and api._epoch == epoch:
            time.sleep(0.01)
        if api.delay_s:
            time.sleep(api.delay_s)
        code = api.refusal(asked, collection)
        if code is not None:
            self._answer(code, status(code, f"{asked.verb} is not for you" if code == 403 else ""))
        elif verb == "list":
            self._list(str(collection), namespace, params)
        else:
            self._watch(str(collection), namespace, params)

    def _list(self, collection: str, namespace: str, params: Mapping[str, str]) -> None:
        page = self.server.api.page(collection, namespace, params)
        garbage = self.server.api.garbage
        if garbage is not None:
            self._send(200, garbage)
        elif page is None:
            self._answer(410, status(410))
        else:
            self._answer(200, page)

    def _answer(self, code: int, content: Any) -> None:
        self._send(code, json.dumps(content).encode())

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _watch(self, collection: str, namespace: str, params: Mapping[str, str]) -> None:
        api = self.server.api
        too_old = int(params.get("resourceVersion") or api._revision) < api._compacted
        if too_old and not api.gone_as_event:
            self._answer(410, status(410))
            return
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        if too_old:
            self._say({"type": "ERROR", "object": status(410)})
            self._chunk(b"")
            return
        self.server.watching += 1
        try:
            for event in api.events(collection, namespace, params):
                if event is not None:
                    self._say(event)
                elif self._hung_up():
                    return
            self._chunk(b"")
        except _CutError:
            self.close_connection = True
        finally:
            self.server.watching -= 1

    def _hung_up(self) -> bool:
        if isinstance(self.connection, ssl.SSLSocket):
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _say(self, event: Mapping[str, Any]) -> None:
        """One line, in pieces as a network makes them."""
        line = json.dumps(event).encode() + b"\n"
        cut = self.server.api.dice.randrange(1, len(line))
        self._chunk(line[:cut])
        self._chunk(line[cut:])

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


_numbers = itertools.count(1)


def pod(
    name: str,
    address: str | None,
    *,
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    namespace: str = "ns",
    ports: Mapping[str, int] | None = None,
    phase: str = "Running",
    running: bool = True,
    uid: str | None = None,
    deleting: bool = False,
    created: str | None = None,
) -> dict[str, Any]:
    """A pod of an engine, each with a UID and a container of its own."""
    number = next(_numbers)
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}} if running else {"waiting": {"reason": "CrashLoop"}}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{number}",
        "creationTimestamp": created or f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}Z",
        "labels": {"llm-d.ai/inference-serving": "true", **(labels or {})},
        "annotations": dict(annotations or {}),
    }
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "nodeName": "node",
            "containers": [
                {
                    "name": "engine",
                    "image": "engine",
                    "ports": [{"name": key, "containerPort": value} for key, value in (ports or {}).items()],
                }
            ],
        },
        "status": {
            "phase": phase,
            "podIP": address,
            "containerStatuses": [
                {
                    "name": "engine",
                    "containerID": f"containerd://c{number}",
                    "restartCount": 0,
                    "state": state,
                    "ready": running,
                }
            ],
        },
    }


def restarted(found: Mapping[str, Any], *, running: bool = True) -> dict[str, Any]:
    """The same pod after its container was started again."""
    made: dict[str, Any] = json.loads(json.dumps(found))
    one = made["status"]["containerStatuses"][0]
    one["restartCount"] += 1
    one["containerID"] = f"containerd://c{next(_numbers)}"
    one["state"] = {"running": {"startedAt": "2026-01-01T00:10:00Z"}} if running else {"waiting": {}}
    return made


def pool(name: str, labels: Mapping[str, str], ports: tuple[int, ...] = (8000,)) -> dict[str, Any]:
    """An InferencePool of v1."""
    spec = {"selector": {"matchLabels": dict(labels)}, "targetPorts": [{"number": port} for port in ports]}
    return {"metadata": {"name": name, "uid": f"pool-{name}"}, "spec": spec}


def old_pool(name: str, labels: Mapping[str, str], port: int = 8000) -> dict[str, Any]:
    """An InferencePool of v1alpha2."""
    return {
        "metadata": {"name": name, "uid": f"old-{name}"},
        "spec": {"selector": dict(labels), "targetPortNumber": port},
    }


def main() -> None:
    """Serve pods at the addresses that are given, until the input ends; a line `name` deletes or makes a pod."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the kubeconfig goes")
    parser.add_argument("pods", nargs="+", help="name=address, for example a=127.0.0.2")
    parser.add_argument("--annotation", action="append", default=[], help="key=value for each pod")
    options = parser.parse_args()
    annotations = dict(pair.split("=", 1) for pair in options.annotation)
    addresses = dict(pair.split("=", 1) for pair in options.pods)
    with KubeApi() as api:
        for name, address in addresses.items():
            api.put("pods", pod(name, address, annotations=annotations))
        sys.stdout.write(f"{api.kubeconfig(options.folder)} leads to {api.url}\n")
        sys.stdout.flush()
        for line in sys.stdin:
            name = line.strip()
            if any(one["metadata"]["name"] == name for one in api.objects("pods")):
                api.delete("pods", name)
            elif name in addresses:
                api.put("pods", pod(name, addresses[name], annotations=annotations))


if __name__ == "__main__":
    main()
