"""What heat, routed prompts and reports cost those who ask: services side by side that differ in nothing else.

    neither          counts nothing that is hot, is told nothing
    heat             counts, as by default
    routed, trunk    was told of prompts that are alive and begin like those that are asked for: their trunk
    routed, alike    the same, but they go on alike for half to all of the asked prompt, and no event has come of them
    reports          engines' reports have come in for every instance
    all              heat, reports, and prompts alike

Each has engines of its own that publish the same.  Every answer is compared with the oracle, which knows what was
routed; a ratio is that to `neither` in the same round, since times move with the machine.  Rounds are short and many,
and each begins with prompts that are not measured, since the others' turns have emptied the caches: so a noisy moment
spoils few of them.

The prompts are few and come again.  What is counted of them touches little memory, so heat is measured with prompts
that have not been asked before, too: each leaves the others within the first half and goes on in its own way.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.arena import Arena, Running
from benchmarks.client import MODEL, Connection, request_of
from benchmarks.measure import turns
from benchmarks.results import percentiles
from benchmarks.workload import BLOCK_SIZE, TRUNK_BLOCKS, Query, Scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.services import Contender

ENGINES: Final = 64
ENTRIES: Final = 500_000
ROUTED: Final = 400
"""Prompts that are alive: with the default of two seconds, those of 200 a second."""
OWN_BLOCKS: Final = 64
"""At most so many blocks of a routed prompt are its own."""
TTL_S: Final = 60.0
AGAIN_S: Final = 30.0
REPORTS: Final = 3
UNHEARD: Final = 540
"""Prompts that are as good as new when their turn comes again: they are several times what heat has room for."""

NEITHER, HEAT, REPORTED, ALL, ALL_TRUNK = "neither", "heat", "reports", "all", "all, trunk"
TRUNK, ALIKE = "routed, trunk", "routed, alike"
NEITHER_NEW, HEAT_NEW = "neither, new prompts", "heat, new prompts"
WITH_NEW: Final = {NEITHER: NEITHER_NEW, HEAT: HEAT_NEW}
BASE: Final = {HEAT_NEW: NEITHER_NEW, NEITHER_NEW: NEITHER_NEW}
"""What it is compared with, if that is not `neither`."""
WITHOUT_HEAT: Final = (("KVINDEXER_HEAT_BLOCKS_PER_S", "1"),)
ROUTED_CALL, FEEDBACK_CALL = "/v1/routed", "/v1/feedback"


@dataclass(frozen=True, kw_only=True)
class CostEffort:
    """How long to measure."""

    rounds: int = 40
    requests: int = 108


QUICK: Final = CostEffort(rounds=3, requests=54)


@dataclass
class Costs:
    """By service, or by call: one value a round."""

    cpu_us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    p50_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    right: int = 0
    checked: int = 0

    def ratio(self, of: str, kind: str = "cpu_us") -> float:
        """Median of the rounds' ratios to the service without any of it."""
        values: dict[str, list[float]] = getattr(self, kind)
        return median(one / two for one, two in zip(values[of], values[BASE.get(of, NEITHER)], strict=True))


class _Row(msgspec.Struct):
    instance: str
    matched_tokens: int
    speculative_tokens: int | None = None


class _Rows(msgspec.Struct):
    matches: list[_Row]


@dataclass
class _Prompt:
    """A prompt that is asked for, and the expected figures of each engine that has any."""

    request: bytes
    held: dict[int, int]
    soon: dict[str, dict[int, int]]
    """By kind of routed prompts: with those; only of engines that they bring further."""

    def right(self, answer: bytes, kind: str | None) -> bool:
        """Whether every row is what the oracle says."""
        soon = {} if kind is None else self.soon[kind]
        given = {int(row.instance) - 1: row for row in msgspec.json.decode(answer, type=_Rows).matches}
        return given.keys() == self.held.keys() | soon.keys() and all(
            row.matched_tokens == self.held.get(engine, 0)
            and row.speculative_tokens == (soon.get(engine, row.matched_tokens) if soon else None)
            for engine, row in given.items()
        )


@dataclass
class _Side:
    """One of the services."""

    name: str
    running: Running
    routed_at: float = -AGAIN_S

    @property
    def routed(self) -> str | None:
        """The kind of prompts that it is told of."""
        return {ALL: ALIKE, ALL_TRUNK: TRUNK, ALIKE: ALIKE, TRUNK: TRUNK}.get(self.name)

    @property
    def is_reported(self) -> bool:
        return self.name in {REPORTED, ALL, ALL_TRUNK}


def run(contender: Contender, effort: CostEffort) -> Costs:
    """Fill the services and measure."""
    costs = Costs()
    plain = replace(contender, environment=WITHOUT_HEAT)
    kinds = dict.fromkeys((NEITHER, TRUNK, ALIKE, REPORTED), plain) | dict.fromkeys((HEAT, ALL, ALL_TRUNK), contender)
    with Arena(Scale(engines=ENGINES, entries=ENTRIES)) as arena, ExitStack() as stack:
        prompts, routed = _prompts(arena)
        unheard = _unheard(arena)
        sides = [_Side(name, stack.enter_context(Running(kind, ENGINES))) for name, kind in kinds.items()]
        for side in sides:
            side.running.play(arena.initial, 0)
        reports = [_report(engine) for engine in range(ENGINES)] * REPORTS
        for turn in range(effort.rounds):
            print(f"[{time.strftime('%X')}] costs: round {turn + 1} of {effort.rounds}", file=sys.stderr)
            asked = [prompts[i % len(prompts)] for i in range(effort.requests)]
            new = [unheard[i % UNHEARD] for i in range(turn * effort.requests, (turn + 1) * effort.requests)]
            for side in turns(sides, turn):
                with side.running.connect() as connection:
                    if side.routed and time.monotonic() - side.routed_at > AGAIN_S:
                        _tell(costs, side, connection, ROUTED_CALL, routed[side.routed])
                        side.routed_at = time.monotonic()
                    if side.is_reported:
                        _tell(costs, side, connection, FEEDBACK_CALL, reports)
                    for prompt in prompts:
                        connection.ask(prompt.request)
                    _measure(costs, side, side.name, connection, asked)
                    if side.name in WITH_NEW:
                        _measure(costs, side, WITH_NEW[side.name], connection, new)
    return costs


def _tell(costs: Costs, side: _Side, connection: Connection, route: str, requests: Sequence[bytes]) -> None:
    """Send what callers tell, and note what a call costs."""
    cpu = side.running.service.worked_s()
    for request in requests:
        answer = connection.ask(request)
        if connection.status != 200:
            message = f"{route}: {connection.status} {answer[:300]!r}"
            raise RuntimeError(message)
    costs.cpu_us[route].append((side.running.service.worked_s() - cpu) / len(requests) * 1e6)


def _measure(costs: Costs, side: _Side, name: str, connection: Connection, asked: Sequence[_Prompt]) -> None:
    cpu = side.running.service.worked_s()
    timed = [connection.timed(prompt.request) for prompt in asked]
    cpu = side.running.service.worked_s() - cpu
    costs.cpu_us[name].append(cpu / len(asked) * 1e6)
    costs.p50_ms[name].append(percentiles([took for took, _ in timed]).p50)
    kind = side.routed
    costs.right += sum(prompt.right(answer, kind) for prompt, (_, answer) in zip(asked, timed, strict=True))
    costs.checked += len(asked)


def _prompts(arena: Arena) -> tuple[list[_Prompt], dict[str, list[bytes]]]:
    """The prompts that are asked for, and the requests that tell where others went, which go on in their own way."""
    queries = arena.workload.shared_queries()
    routings = {kind: _routings(arena, queries, kind) for kind in (TRUNK, ALIKE)}
    prompts = [_prompt(arena, query, routings) for query in queries]
    return prompts, {
        kind: [
            _request(ROUTED_CALL, {"instance": str(engine + 1), "ttl_s": TTL_S, "tokens_b64": _packed(arena, path)})
            for engine, path in those
        ]
        for kind, those in routings.items()
    }


def _unheard(arena: Arena) -> list[_Prompt]:
    """Prompts that leave those that are asked for, each in its own way."""
    rng, blocks = arena.workload.rng, arena.workload.blocks
    queries = arena.workload.shared_queries()
    made = []
    for _ in range(UNHEARD):
        path = rng.choice(queries).blocks
        shared = rng.randint(1, len(path) // 2)
        own = [*path[:shared], *blocks.grow(len(path) - shared)]
        made.append(_prompt(arena, Query(own, arena.workload.answer(own)), {}))
    return made


def _routings(arena: Arena, queries: Sequence[Query], kind: str) -> list[tuple[int, list[int]]]:
    """Engines, and the prompts that go to them."""
    rng, blocks = arena.workload.rng, arena.workload.blocks
    made = []
    for _ in range(ROUTED):
        path = rng.choice(queries).blocks
        shared = TRUNK_BLOCKS if kind == TRUNK else rng.randint(len(path) // 2, len(path))
        own = blocks.grow(len(path) - shared if kind == TRUNK else rng.randint(1, OWN_BLOCKS))
        made.append((rng.randrange(ENGINES), [*path[:shared], *own]))
    return made


def _prompt(arena: Arena, query: Query, routings: dict[str, list[tuple[int, list[int]]]]) -> _Prompt:
    request = _request("/v1/match", {"tokens_b64": _packed(arena, query.blocks)})
    return _Prompt(request, query.expected, {kind: _soon(query, those) for kind, those in routings.items()})


def _soon(query: Query, routings: Sequence[tuple[int, list[int]]]) -> dict[int, int]:
    """The oracle: an instance gets as far as the longest beginning that a routed prompt shares with this one."""
    soon: dict[int, int] = {}
    for engine, path in routings:
        pairs = enumerate(zip(path, query.blocks, strict=False))
        end = min(len(path), len(query.blocks))
        tokens = next((i for i, (one, two) in pairs if one != two), end) * BLOCK_SIZE
        if tokens > max(query.expected.get(engine, 0), soon.get(engine, 0)):
            soon[engine] = tokens
    return soon


def _report(engine: int) -> bytes:
    body = {"instance": str(engine + 1), "model": MODEL, "predicted_tokens": 8_192, "cached_tokens": 8_192}
    return request_of(FEEDBACK_CALL, msgspec.json.encode(body))


def _request(route: str, body: dict[str, Any]) -> bytes:
    return request_of(route, msgspec.json.encode({"model": MODEL, **body}))


def _packed(arena: Arena, path: Sequence[int]) -> bytes:
    tokens = arena.workload.blocks.tokens
    return b"".join(tokens[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].tobytes() for block in path)
