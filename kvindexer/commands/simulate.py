"""`kvindexer simulate`: a fleet of engines without a GPU, for a service to watch."""

from __future__ import annotations

import json
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import zmq

from kvindexer.commands.client import UnreachableError, UntrustedError, WayIn, call, way_in
from kvindexer.commands.failure import CommandError
from kvindexer.commands.routing import PrefixRouter
from kvindexer.commands.stopping import Stop, exit_with_stdin
from kvindexer.testing import ChatShape, ChatTraffic, PoolShape, SimulatedFleet, TraceTraffic

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from pathlib import Path

    from kvindexer.testing import Traffic, TrafficRequest

SYSTEM_TOKENS: Final = 64
"""Short shared prompts, so that a query which shows them at work still fits a terminal."""
EXAMPLE_TOKENS: Final = 96
MAX_PROMPT_TOKENS: Final = 2048
REGISTER_WITHIN_S: Final = 30.0
MAX_PORT: Final = 65535
MAX_LAG_S: Final = 1.0
"""Requests that are later than this are given up, so that a pause isn't followed by a burst."""


def run(options: Namespace) -> int:
    """Run engines under traffic until a signal."""
    if options.exit_with_stdin:
        exit_with_stdin()
    way = way_in(options)
    with Stop() as stop:
        stop.after(options.duration_s)
        traffic = Example(_traffic(options), options.model, options.example)
        fleet = _fleet(options, traffic, way)
        try:
            for spec in fleet.specs():
                print(f"--source {source_flag(spec)}", flush=True)
            if options.register:
                _register(options.register, way, fleet.specs(), stop)
            refused = _drive(fleet, traffic, options.rate, stop)
        finally:
            fleet.stop()
        if options.register:
            _unregister(options.register, way, fleet.specs())
        done = fleet.counters
        print(
            f"{done.requests} requests ({refused} were too long), "
            f"{done.cached_tokens} of {done.prompt_tokens} prompt tokens were cached",
            flush=True,
        )
    return 0


def _drive(fleet: SimulatedFleet, traffic: Traffic, per_s: float, stop: Stop) -> int:
    """Send traffic at an even pace until it is time to stop; returns how many requests no engine could take."""
    refused = 0
    due = monotonic()
    while not stop.wait(max(0.0, due - monotonic())):
        try:
            fleet.send(traffic.next_request())
        except ValueError:  # longer than an engine's cache, as lines of a trace may be
            refused += 1
        due = max(due, monotonic() - MAX_LAG_S) + 1 / per_s
    return refused


def source_flag(spec: dict[str, Any]) -> str:
    """Write a source as `serve --source` takes it."""
    return ",".join(f"{name}={value}" for name, value in spec.items() if value is not None)


def registration(spec: dict[str, Any]) -> dict[str, Any]:
    """Write a source as the body of POST /register, in the dialect that says `modelname`."""
    body = {
        name: spec[name] for name in ("endpoint", "replay_endpoint", "type", "block_size") if spec[name] is not None
    }
    return body | {"instance_id": spec["instance"], "modelname": spec["model"], "dp_rank": spec["rank"]}


class Example:
    """Traffic that writes down, once, a query about the beginning of a prompt that an engine has just computed."""

    def __init__(self, traffic: Traffic, model: str, file: Path | None) -> None:
        self._traffic = traffic
        self._model = model
        self._file = file

    def next_request(self) -> TrafficRequest:
        """Make the next request."""
        return self._traffic.next_request()

    def answered(self, request: TrafficRequest, output: Sequence[int]) -> None:
        """Take note of what the model said."""
        self._traffic.answered(request, output)
        if self._file is not None and request.salt is None and request.lora is None:
            body = json.dumps(
                {"model": self._model, "tokens": request.tokens[:EXAMPLE_TOKENS]}, separators=(",", ":")
            )
            draft = self._file.with_name(self._file.name + ".draft")
            draft.write_text(body + "\n", encoding="utf-8")
            draft.replace(self._file)
            self._file = None


def _traffic(options: Namespace) -> Traffic:
    if options.trace is None:
        longest = min(MAX_PROMPT_TOKENS, options.blocks * options.block_size // 2)
        return ChatTraffic(options.seed, ChatShape(system_tokens=SYSTEM_TOKENS, max_prompt_tokens=longest))
    try:
        return TraceTraffic(options.trace)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=2) from None


def _fleet(options: Namespace, traffic: Traffic, way: WayIn) -> SimulatedFleet:
    if options.first_port and options.first_port + 2 * options.engines > MAX_PORT + 1:  # ZMQ would wrap it round
        raise CommandError(
            f"--first-port {options.first_port} leaves no room for {options.engines} engines", exit_code=2
        )
    pool = PoolShape(num_blocks=options.blocks, block_size=options.block_size, cpu_blocks=options.cpu_blocks)
    router = None if options.route is None else PrefixRouter(options.route, options.model, options.seed, way)
    try:
        return SimulatedFleet(
            options.engines,
            model=options.model,
            pool=pool,
            traffic=traffic,
            router=router,
            first_port=options.first_port,
            seed=options.seed,
        )
    except (ValueError, OverflowError, zmq.ZMQError) as error:
        raise CommandError(f"the engines can't start: {error}", exit_code=2) from None


def _register(url: str, way: WayIn, specs: Sequence[dict[str, Any]], stop: Stop) -> None:
    """Register every engine; the service may be starting still."""
    deadline = monotonic() + REGISTER_WITHIN_S
    told = False
    for spec in specs:
        while not stop.requested:
            try:
                call(url, "/register", registration(spec), way=way)
                break
            except UnreachableError as error:
                if isinstance(error, UntrustedError) or monotonic() > deadline:
                    raise
                if not told:
                    print(f"kvindexer: {error.message}; trying for {REGISTER_WITHIN_S:.0f} s", file=sys.stderr)
                    told = True
            stop.wait(0.2)


def _unregister(url: str, way: WayIn, specs: Sequence[dict[str, Any]]) -> None:
    """Take the engines back; a service that has gone meanwhile needs no telling."""
    for spec in specs:
        try:
            call(url, "/unregister", registration(spec), timeout_s=2.0, way=way)
        except CommandError:
            return
