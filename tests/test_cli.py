"""The command line through real processes and sockets: what it prints, how it ends, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq

from kvindexer.cli import COMMANDS, parser
from kvindexer.commands.deployment import Rates
from kvindexer.commands.query import REASONS
from kvindexer.commands.serve import overrides
from kvindexer.errors import SettingsError
from kvindexer.settings.source import parse_source
from kvindexer.testing import read_recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parent.parent
RECORDING = ROOT / "tests" / "recordings" / "http-0.32-llama"
PATIENCE_S = 30.0
PATIENCE_MS = 30_000
MATCH = {
    "instance": "pod-a",
    "block_size": 16,
    "matched_tokens": 48,
    "cached_tokens": 32,
    "tiers": {
        "gpu": {"tokens": 16, "cumulative_tokens": 16},
        "cpu": {"tokens": 0, "cumulative_tokens": 48},
        "disk": {"tokens": 0, "cumulative_tokens": 48},
        "remote": {"tokens": 0, "cumulative_tokens": 48},
    },
    "ranks": {"0": 48},
    "state": "live",
    "sound": True,
    "complete": False,
    "lag_ms": 1.5,
}
READY_REPLICA = re.compile(r"\s*(127\.0\.0\.1:\d+)\s+(\d+)\s+yes\s+4 live of 4 ")
ANSWER = {"model": "m", "blocks": 4, "tokens": 64, "matches": [MATCH], "unknown_candidates": ["10.0.0.9"]}


class Started:
    """A command that runs until it is told to end; killed at the latest when the test is over."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvindexer", *arguments],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send a signal, if any, and return exit code and both outputs."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def line(self) -> str:
        """Read the next line of its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*arguments: str, **environ: str) -> Started:
        started.append(Started(*arguments, **environ))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        with contextlib.suppress(ValueError):  # its pipes may be closed already
            one.process.communicate()


def run(*arguments: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvindexer", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


class Stub:
    """An HTTP server that notes what it was asked and gives one prepared answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.status = 200
        self.answer: bytes = json.dumps(ANSWER).encode()
        self.open = threading.Event()
        self.open.set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                stub.asked.append((self.path, json.loads(self.rfile.read(length))))
                stub.open.wait(60)
                self.send_response(stub.status)
                self.send_header("content-length", str(len(stub.answer)))
                self.end_headers()
                self.wfile.write(stub.answer)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- all commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert COMMANDS[command][0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"kvindexer {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["simulate", "--engines", "0"],
        ["simulate", "--engines", "many"],
        ["simulate", "--rate", "inf"],
        ["simulate", "--rate", "nan"],
        ["simulate", "--trace", "none.jsonl"],
        ["simulate", "--first-port", "70000"],
        ["simulate", "--register", "localhost:8090"],
        ["replay"],
        ["replay", "none"],
        ["replay", str(RECORDING), "--source", "none"],
        ["replay", str(RECORDING), "--endpoint", "5557"],
        ["query"],
        ["query", "none.json", "--model", "m"],
        ["query", "--model", "m", "--url", "nonsense"],
        ["query", "--model", "m", "--url", "ftp://127.0.0.1"],
        ["query", "--model", "m", "--url", "http://127.0.0.1:99999"],
        ["serve", "--port", "abc"],
        ["serve", "--config", "none.yaml"],
        ["serve", "--set", "max_concurrent_replays"],
        ["serve", "--set", "max_concurrent_replays=0"],
        ["serve", "--set", "nonsense=1"],
        ["serve", "--set", "max_concurrent_replays=1", "--set", "max_concurrent_replays=2"],
        ["serve", "--source", "instance=pod-a"],
    ],
)
def test_arguments_that_cannot_be_used_end_with_2(arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert err.strip()


def test_a_setting_that_cannot_be_used_takes_one_line() -> None:
    code, out, err = run("serve", "--port", "abc")
    assert (code, out) == (2, "")
    assert err.startswith("kvindexer: setting port: 'abc' is not usable, expected a whole number from 0 to 65535")
    assert err.count("\n") == 1
    said = run("serve", KVINDEXER_MAX_CONCURRENT_REPLAYS="x")[2]
    assert said.startswith("kvindexer: setting max_concurrent_replays: 'x' is not")


def test_flags_become_settings() -> None:
    given = [
        "serve",
        "--port",
        "0",
        "--set",
        "max_concurrent_replays=3",
        "--set",
        "media={a: cpu}",
        "--source",
        "a",
        "--source",
        "b",
    ]
    assert overrides(parser().parse_args(given)) == {
        "port": "0",
        "max_concurrent_replays": "3",
        "media": "{a: cpu}",
        "sources": ["a", "b"],
    }
    with pytest.raises(SettingsError):
        overrides(parser().parse_args(["serve", "--set", "port"]))


# -- query -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[1, 2, 3]", "1 2\n3\n", "1,2,3", '{"tokens": [1, 2, 3]}'])
def test_a_query_reads_tokens_in_several_forms(stub: Stub, text: str) -> None:
    code, _, _ = run("query", "--url", stub.url, "--model", "m", stdin=text)
    assert code == 0
    assert stub.asked == [("/v1/match", {"model": "m", "tokens": [1, 2, 3]})]


@pytest.mark.parametrize("text", ["1 two 3", "[1, [2]]", "[1, null]", "{}", "-1", "4294967296", "[" * 100_000, "[1"])
def test_a_query_refuses_what_are_no_tokens(stub: Stub, text: str) -> None:
    assert run("query", "--url", stub.url, "--model", "m", stdin=text)[0] == 2
    assert not stub.asked


def test_a_query_shows_a_table(stub: Stub, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(64))), encoding="utf-8")
    options = [
        "--tenant",
        "t",
        "--lora",
        "l",
        "--cache-salt",
        "s",
        "--block-size",
        "16",
        "--candidate",
        "pod-a",
        "--candidate",
        "10.0.0.9",
    ]
    code, out, _ = run("query", str(tokens), "--url", stub.url, "--model", "m", *options)
    assert code == 0
    assert stub.asked[0][1] == {
        "model": "m",
        "tokens": list(range(64)),
        "tenant": "t",
        "block_size": 16,
        "lora": "l",
        "cache_salt": "s",
        "candidates": ["pod-a", "10.0.0.9"],
    }
    row = next(line for line in out.splitlines() if "pod-a" in line)
    assert row.split() == ["pod-a", "48", "32", "16", "48", "48", "48", "live", "yes", "no", "1.5"]
    assert "Unknown candidates: 10.0.0.9" in out


def test_a_query_prints_the_answer_itself_on_request(stub: Stub) -> None:
    code, out, _ = run("query", "--url", stub.url, "--model", "m", "--json", stdin="1")
    assert code == 0
    assert json.loads(out) == ANSWER


@pytest.mark.parametrize("reason", [*REASONS, "a_new_one"])
def test_a_query_without_a_match_says_why(stub: Stub, reason: str) -> None:
    stub.answer = json.dumps({**ANSWER, "matches": [], "reason": reason}).encode()
    code, out, _ = run("query", "--url", stub.url, "--model", "m", stdin="1")
    assert code == 0
    assert "Nothing matched: " in out


def test_names_from_the_service_are_shown_as_plain_text(stub: Stub) -> None:
    stub.answer = json.dumps({**ANSWER, "matches": [{**MATCH, "instance": "[red]\x1b[2J"}]}).encode()
    _, out, _ = run("query", "--url", stub.url, "--model", "m", stdin="1")
    assert "[red]?[2J" in out


def test_an_error_of_the_service_is_shown_with_its_hint(stub: Stub) -> None:
    stub.status = 404
    stub.answer = b'{"error": {"code": "unknown_model", "message": "no such model", "hint": "known: n"}}'
    code, out, err = run("query", "--url", stub.url, "--model", "m", stdin="1")
    assert (code, out) == (1, "")
    assert err == "kvindexer: no such model (unknown_model, 404)\n  known: n\n"


@pytest.mark.parametrize(
    ("status", "answer"), [(200, b"<html>"), (502, b"<html>"), (200, b"[]"), (200, b'{"matches": [1]}')]
)
def test_an_answer_of_something_else_is_no_traceback(stub: Stub, status: int, answer: bytes) -> None:
    stub.status, stub.answer = status, answer
    code, _, err = run("query", "--url", stub.url, "--model", "m", stdin="1")
    assert code == 1
    assert err.startswith("kvindexer: ")


def test_a_query_to_nobody_says_what_to_start() -> None:
    code, _, err = run("query", "--url", f"http://127.0.0.1:{free_port()}", "--model", "m", stdin="1")
    assert code == 1
    assert "kvindexer serve" in err


def test_a_query_uses_no_proxy(stub: Stub) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    assert run("query", "--url", stub.url, "--model", "m", stdin="1", http_proxy=proxy, HTTP_PROXY=proxy)[0] == 0


def test_ctrl_c_shows_no_traceback(stub: Stub, start: Callable[..., Started]) -> None:
    stub.open.clear()
    query = start("query", "--url", stub.url, "--model", "m")
    assert query.process.stdin is not None
    query.process.stdin.write("1")
    query.process.stdin.close()
    query.process.stdin = None
    eventually(lambda: stub.asked)
    code, _, err = query.end(signal.SIGINT)
    stub.open.set()
    assert (code, err) == (130, "")


# -- simulate --------------------------------------------------------------------------------------------------------


def test_a_simulated_engine_can_be_subscribed_to(start: Callable[..., Started]) -> None:
    simulate = start("simulate", "--engines", "2", "--block-size", "32", "--rate", "200")
    flags = [simulate.line().split() for _ in range(2)]
    assert [flag for flag, _ in flags] == ["--source", "--source"]
    specs = [parse_source(text) for _, text in flags]
    assert [(spec.instance, spec.block_size) for spec in specs] == [("engine-0", 32), ("engine-1", 32)]
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(specs[0].endpoint)
        subscriber.subscribe(b"")
        assert subscriber.poll(PATIENCE_MS)
        _, seq, payload = subscriber.recv_multipart()
    assert len(seq) == 8
    assert len(msgspec.msgpack.decode(payload)) == 3
    code, out, err = simulate.end(signal.SIGTERM)
    assert (code, err) == (0, "")
    assert "prompt tokens were cached" in out


def test_simulated_engines_register_and_unregister(stub: Stub, start: Callable[..., Started]) -> None:
    simulate = start("simulate", "--engines", "2", "--register", stub.url, "--model", "m")
    eventually(lambda: len(stub.asked) == 2)
    path, body = stub.asked[1]
    assert path == "/register"
    assert set(body) == {"endpoint", "replay_endpoint", "type", "modelname", "instance_id", "block_size", "dp_rank"}
    assert (body["instance_id"], body["modelname"], body["block_size"]) == ("engine-1", "m", 16)
    assert simulate.end(signal.SIGINT)[0] == 0
    assert [path for path, _ in stub.asked[2:]] == ["/unregister", "/unregister"]


def test_a_fleet_says_that_it_waits_for_the_service() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    code, _, err = run("simulate", "--register", url, "--duration-s", "1")
    assert code == 0
    assert re.fullmatch(rf"kvindexer: no answer from {url}: .*; trying for 30 s\n", err)


def test_a_port_that_is_taken_is_said_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--port", str(port))
    assert code == 1
    line = f"kvindexer: can't listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port"
    assert err.splitlines()[-1] == line


def test_a_command_that_may_not_ask_says_by_which_flag(stub: Stub, tmp_path: Path) -> None:
    stub.status = 401
    stub.answer = b'{"error": {"code": "unauthenticated", "message": "who is asking?", "hint": "present a token"}}'
    prompt = tmp_path / "prompt"
    prompt.write_text("1 2 3")
    assert run("query", str(prompt), "--url", stub.url, "--model", "m")[2].endswith(
        "  present a token (--token-file, --cert-file)\n"
    )
    assert run("simulate", "--register", stub.url)[2].endswith("  present a token (--token-file, --cert-file)\n")


def test_a_fleet_that_is_refused_ends(stub: Stub) -> None:
    stub.status = 409
    stub.answer = b'{"error": {"code": "conflict", "message": "taken", "hint": ""}}'
    code, _, err = run("simulate", "--register", stub.url)
    assert (code, err) == (1, "kvindexer: taken (conflict, 409)\n")


def test_a_fleet_asks_where_a_prompt_is_cached(stub: Stub) -> None:
    code, _, _ = run("simulate", "--route", stub.url, "--duration-s", "1", "--model", "m")
    assert code == 0
    assert stub.asked[0][0] == "/v1/match"
    assert stub.asked[0][1]["model"] == "m"


def test_a_fleet_that_gets_no_routes_says_so_once(stub: Stub) -> None:
    stub.status = 401
    stub.answer = b'{"error": {"code": "unauthenticated", "message": "who is asking?", "hint": "present a token"}}'
    code, _, err = run("simulate", "--route", stub.url, "--duration-s", "1")
    assert code == 0
    assert len(stub.asked) > 1
    assert err == (
        "kvindexer: requests go anywhere while --route has no answer: who is asking? (unauthenticated, 401)\n"
        "  present a token (--token-file, --cert-file)\n"
    )


def test_the_example_is_a_query_about_a_prompt_of_the_fleet(tmp_path: Path) -> None:
    example = tmp_path / "example.json"
    assert run("simulate", "--duration-s", "1", "--model", "m", "--example", str(example))[0] == 0
    body = json.loads(example.read_text(encoding="utf-8"))
    assert body["model"] == "m"
    assert len(body["tokens"]) >= 64
    assert [file.name for file in tmp_path.iterdir()] == ["example.json"]


def test_a_trace_drives_the_fleet_and_what_is_too_long_is_passed_over(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 9, "input_length": 51_200, "output_length": 3, "hash_ids": list(range(100))},
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, _ = run("simulate", "--trace", str(trace), "--duration-s", "1", "--rate", "10")
    assert code == 0
    assert "0 were too long" not in out
    trace.write_text("nonsense\n", encoding="utf-8")
    code, _, err = run("simulate", "--trace", str(trace))
    assert code == 2
    assert "line 1" in err


def test_a_command_ends_with_the_process_that_feeds_it(start: Callable[..., Started]) -> None:
    simulate = start("simulate", "--engines", "1", "--exit-with-stdin")
    assert simulate.line().startswith("--source")
    code, _, err = simulate.end()  # closes standard input
    assert (code, err) == (0, "")


# -- replay ----------------------------------------------------------------------------------------------------------


def test_a_recording_is_played_byte_for_byte() -> None:
    recorded = read_recording(RECORDING)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(endpoint)
        subscriber.subscribe(b"")
        code, out, _ = run("replay", str(RECORDING), "--endpoint", endpoint, "--rate", "2000", "--wait-s", "10")
        assert code == 0
        assert f"{len(recorded)} messages published" in out
        heard = []
        while subscriber.poll(200):
            heard.append(subscriber.recv_multipart())
    assert heard == [[frame.topic, frame.seq.to_bytes(8, "big"), frame.payload] for frame in recorded]


def test_a_held_recording_answers_replay_requests_until_a_signal(start: Callable[..., Started]) -> None:
    port = free_port()
    endpoints = ["--endpoint", "tcp://127.0.0.1:0", "--replay-endpoint", f"tcp://127.0.0.1:{port}"]
    replay = start("replay", str(RECORDING), *endpoints, "--rate", "2000", "--hold")
    replay.line()
    assert "messages published" in replay.line()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send_multipart([b"", (3).to_bytes(8, "big")])
        assert dealer.poll(PATIENCE_MS)
        assert int.from_bytes(dealer.recv_multipart()[-2], "big") == 3
        dealer.close(linger=0)
    assert replay.end(signal.SIGTERM)[0] == 0


def test_a_slow_recording_ends_at_once_on_a_signal(start: Callable[..., Started]) -> None:
    replay = start("replay", str(RECORDING), "--endpoint", "tcp://127.0.0.1:0", "--rate", "0.01")
    replay.line()
    before = time.monotonic()
    assert replay.end(signal.SIGINT)[0] == 0
    assert time.monotonic() - before < 5


# -- demo ------------------------------------------------------------------------------------------------------------


def test_rates_come_from_counters() -> None:
    rates = Rates()
    assert rates.between(10.0, {"events": 100}) == {"events": 0.0}
    assert rates.between(12.0, {"events": 150}) == {"events": 25.0}
    assert rates.between(12.0, {"events": 150}) == {"events": 0.0}
    assert rates.between(13.0, {"events": 5}) == {"events": 0.0}  # it was started again
    assert rates.between(14.0, {"events": 6}) == {"events": 1.0}


def test_a_demo_whose_port_is_taken_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("demo", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "can't be used" in err


def children(pid: int) -> list[int]:
    """Find the processes that this one started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def curl_body(demo: Started) -> tuple[str, dict[str, Any]]:
    """Read a demo's output as far as the query to paste; return the service's address and the query."""
    while not (line := demo.line()).startswith("curl "):
        assert line
    url = line.split()[2].removesuffix("/v1/match")
    return url, json.loads(line.partition(" -d ")[2].strip().strip("'"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_prints_a_query_that_finds_blocks_and_leaves_nothing_behind(
    start: Callable[..., Started], number: int
) -> None:
    demo = start("demo", "--port", str(free_port()), "--interval-s", "0.5")
    url, body = curl_body(demo)
    code, out, _ = run("query", "--url", url, "--model", body["model"], "--json", stdin=json.dumps(body["tokens"]))
    assert code == 0
    assert json.loads(out)["matches"][0]["matched_tokens"] >= 64
    while "4 sources" not in (line := demo.line()):
        assert line
    family = children(demo.process.pid)
    assert len(family) == 2
    code, _, err = demo.end(number)
    assert (code, err) == (0, "")
    assert not any(runs(pid) for pid in family)


def test_on_a_terminal_the_table_is_drawn_in_place() -> None:
    ours, theirs = pty.openpty()
    arguments = ["demo", "--port", str(free_port()), "--duration-s", "2", "--interval-s", "0.5"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "kvindexer", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as demo:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(ours, 65536):
                drawn += part
        os.close(ours)
        assert demo.wait(PATIENCE_S) == 0
    assert b"engine-3" in drawn
    assert b"queries/s" in drawn
    assert b"\x1b[2K" in drawn  # lines are erased and drawn again


def test_the_demo_ends_by_itself() -> None:
    code, out, err = run("demo", "--port", str(free_port()), "--duration-s", "2", "--interval-s", "0.5")
    assert (code, err) == (0, "")
    assert "events/s" in out


@pytest.mark.parametrize("options", [(), ("--replicas", "2")])
def test_a_demo_that_is_killed_leaves_no_orphans(start: Callable[..., Started], options: Sequence[str]) -> None:
    demo = start("demo", "--port", str(free_port()), *options)
    curl_body(demo)
    family = children(demo.process.pid)
    assert len(family) == (4 if options else 2)
    demo.process.kill()
    eventually(lambda: not any(runs(pid) for pid in family))


def test_the_demo_of_replicas_starts_one_again_that_is_killed(start: Callable[..., Started]) -> None:
    """Every replica follows every engine, though each was registered with one of them."""
    demo = start("demo", "--replicas", "3", "--port", str(free_port()), "--interval-s", "0.5")
    url, body = curl_body(demo)
    followers: dict[str, int] = {}

    def until_one_follows_all(condition: Callable[[str, int], bool]) -> None:
        """Read the table until a replica that is ready with all four engines fits, by its address and pid."""
        while not (found := READY_REPLICA.match(demo.line())) or not condition(found[1], int(found[2])):
            assert demo.process.poll() is None
        followers[found[1]] = int(found[2])

    for _ in range(3):
        until_one_follows_all(lambda address, _: address not in followers)
    address, pid = next(iter(followers.items()))
    os.kill(pid, signal.SIGKILL)
    until_one_follows_all(lambda again, new: again == address and new != pid)
    code, out, _ = run("query", "--url", url, "--model", body["model"], "--json", stdin=json.dumps(body["tokens"]))
    assert code == 0
    assert json.loads(out)["matches"]
    family = children(demo.process.pid)
    assert len(family) == 5  # Redis, three replicas and the fleet
    code, _, err = demo.end(signal.SIGINT)
    assert (code, err) == (0, "")
    assert not any(runs(pid) for pid in family)
