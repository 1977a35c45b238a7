"""`python -m benchmarks --only match`: POST /v1/match beside POST /query of the same service, long prompts, batches.

    prompt      8,192 tokens, 100 engines: /query, and /v1/match with the prompt in each of its ways
    long        100,000 tokens (6,250 blocks), 100 candidates, each of which holds some of them
    batch       64 prompts in one call, and in 64 calls: each unlike all others, and with a beginning that all share

Every answer is compared with the oracle.  Ratios are of the same round, since times move with the machine.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from benchmarks import messages
from benchmarks.arena import Arena, Running
from benchmarks.client import BY_TOKENS, MODEL, Connection, body_of, is_right, request_of
from benchmarks.measure import turns
from benchmarks.results import percentiles
from benchmarks.workload import BLOCK_SIZE, QUERY_BLOCKS, Query, Run, Scale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.services import Contender

ENGINES: Final = 100
ENTRIES: Final = 200_000
LONG_BLOCKS: Final = 6_250
BATCH: Final = 64
SHORT_BLOCKS: Final = 64
HOLDERS: Final = 8
"""Engines that hold a part of a batch's prompt which is its own."""
MSGPACK: Final = "application/msgpack"

QUERY: Final = "/query"
TOKENS, PACKED, KEYS, BINARY = "tokens", "tokens_b64", "keys_b64", "tokens_b64, msgpack"
LONG: Final = "100,000 tokens, 100 candidates"
DISTINCT, SHARED = "distinct", "half of it shared"
ONE_BY_ONE: Final = ", one by one"


@dataclass(frozen=True, kw_only=True)
class MatchEffort:
    """How long to measure."""

    rounds: int = 18
    requests: int = 100
    long_requests: int = 30
    batches: int = 6


QUICK: Final = MatchEffort(rounds=2, requests=60, long_requests=20, batches=2)


class Ask(NamedTuple):
    """A request, and whether an answer to it is right."""

    request: bytes
    right: Callable[[bytes], bool]
    prompts: int = 1


@dataclass
class Samples:
    """By what was measured: one value a round."""

    p50_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    p99_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    right: int = 0
    checked: int = 0

    def ratio(self, of: str, to: str, kind: str = "p50_ms") -> float:
        """Median of the rounds' ratios."""
        values: dict[str, list[float]] = getattr(self, kind)
        return median(one / two for one, two in zip(values[of], values[to], strict=True))


class _Row(msgspec.Struct):
    instance: str
    matched_tokens: int


class _Rows(msgspec.Struct):
    matches: list[_Row]


class _Results(msgspec.Struct):
    results: list[_Rows]


def run(contender: Contender, effort: MatchEffort) -> Samples:
    """Fill a service and measure."""
    samples = Samples()
    with Arena(Scale(engines=ENGINES, entries=ENTRIES)) as arena, Running(contender, ENGINES) as running:
        running.play(arena.initial, 0)
        prompts = arena.workload.shared_queries()
        long = _long(arena, running)
        batches = _all_batches(arena, running)
        with running.connect() as connection:
            plans = [_ways(arena, prompts, connection), {LONG: ([_match(arena, long, candidates=True)], 0)}]
        plans += [_batch(arena, name, queries) for name, queries in batches.items()]
        for turn in range(effort.rounds):
            print(f"[{time.strftime('%X')}] match: round {turn + 1} of {effort.rounds}", file=sys.stderr)
            for plan in plans:
                for name in turns(list(plan), turn):
                    asks, calls = plan[name]
                    _measure(samples, running, name, asks, calls * effort.batches or _count(name, effort))
    return samples


def _count(name: str, effort: MatchEffort) -> int:
    return effort.long_requests if name == LONG else effort.requests


def _measure(samples: Samples, running: Running, name: str, asks: Sequence[Ask], count: int) -> None:
    times, answers = [], []
    with running.connect() as connection:
        connection.ask(asks[0].request)
        cpu = running.service.worked_s()
        for i in range(count):
            took, answer = connection.timed(asks[i % len(asks)].request)
            times.append(took / asks[i % len(asks)].prompts)
            answers.append(answer)
        cpu = running.service.worked_s() - cpu
    p50, p99 = percentiles(times)
    samples.p50_ms[name].append(p50)
    samples.p99_ms[name].append(p99)
    samples.cpu_us[name].append(cpu / sum(asks[i % len(asks)].prompts for i in range(count)) * 1e6)
    samples.right += sum(asks[i % len(asks)].right(answer) for i, answer in enumerate(answers))
    samples.checked += count


def _long(arena: Arena, running: Running) -> Query:
    """A prompt of 100,000 tokens of which every engine holds a part, and one all of it."""
    workload = arena.workload
    blocks = workload.blocks.grow(LONG_BLOCKS)
    depths = [LONG_BLOCKS, *(workload.rng.randint(1, LONG_BLOCKS) for _ in range(ENGINES - 1))]
    streams = [list(messages.stores_of(workload, e, [Run(blocks[:depth], None)])) for e, depth in enumerate(depths)]
    running.play(arena.spool(messages.interleave(streams)), 0)
    return Query(list(blocks), {engine: depth * BLOCK_SIZE for engine, depth in enumerate(depths)})


def _ways(arena: Arena, prompts: Sequence[Query], connection: Connection) -> dict[str, tuple[list[Ask], int]]:
    """The same prompts as /query takes them, and in every way in which /v1/match does."""
    blocks = arena.workload.blocks
    return {
        QUERY: ([_query(body_of(BY_TOKENS, blocks, one.blocks), one) for one in prompts], 0),
        TOKENS: ([_match(arena, one, TOKENS) for one in prompts], 0),
        PACKED: ([_match(arena, one) for one in prompts], 0),
        BINARY: ([_match(arena, one, BINARY) for one in prompts], 0),
        KEYS: ([_by_keys(arena, one, connection) for one in prompts], 0),
    }


def _all_batches(arena: Arena, running: Running) -> dict[str, list[Query]]:
    """Prompts of which some engines hold a part, for every kind of batch."""
    workload, rng = arena.workload, arena.workload.rng
    streams: list[list[Run]] = [[] for _ in range(ENGINES)]
    batches: dict[str, list[Query]] = {}
    for blocks in (SHORT_BLOCKS, QUERY_BLOCKS):
        for kind in (DISTINCT, SHARED):
            beginning = workload.blocks.grow(blocks // 2 if kind == SHARED else 0)
            for engine in range(ENGINES if beginning else 0):
                streams[engine].append(Run(beginning, None))
            queries = []
            for _ in range(BATCH):
                own = workload.blocks.grow(blocks - len(beginning))
                expected = dict.fromkeys(range(ENGINES), len(beginning) * BLOCK_SIZE) if beginning else {}
                for engine in rng.sample(range(ENGINES), HOLDERS):
                    depth = rng.randint(1, len(own))
                    streams[engine].append(Run(own[:depth], beginning[-1] if beginning else None))
                    expected[engine] = (len(beginning) + depth) * BLOCK_SIZE
                queries.append(Query([*beginning, *own], expected))
            batches[f"{BATCH} prompts of {blocks * BLOCK_SIZE:,} tokens, {kind}"] = queries
    stores = [list(messages.stores_of(workload, engine, runs)) for engine, runs in enumerate(streams)]
    running.play(arena.spool(messages.interleave(stores)), 0)
    return batches


def _batch(arena: Arena, name: str, queries: Sequence[Query]) -> dict[str, tuple[list[Ask], int]]:
    """The same prompts in one call and in as many as there are."""
    body = {
        "model": MODEL,
        "candidates": _candidates(),
        "prompts": [{PACKED: _packed(arena, one)} for one in queries],
    }
    request = request_of("/v1/match/batch", msgspec.json.encode(body))
    return {
        name: ([Ask(request, lambda answer: _right_batch(answer, queries), BATCH)], 1),
        f"{name}{ONE_BY_ONE}": ([_match(arena, one, candidates=True) for one in queries], BATCH),
    }


def _packed(arena: Arena, query: Query) -> bytes:
    tokens = arena.workload.blocks.tokens
    return b"".join(tokens[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE].tobytes() for b in query.blocks)


def _candidates() -> list[str]:
    return [str(engine + 1) for engine in range(ENGINES)]


def _query(body: bytes, query: Query) -> Ask:
    return Ask(request_of(QUERY, body), lambda answer: is_right(answer, query))


def _match(arena: Arena, query: Query, way: str = PACKED, *, candidates: bool = False) -> Ask:
    packed = _packed(arena, query)
    body: dict[str, Any] = {"model": MODEL}
    body |= {TOKENS: memoryview(packed).cast("I").tolist()} if way == TOKENS else {PACKED: packed}
    if candidates:
        body["candidates"] = _candidates()
    if way == BINARY:
        request = _binary(msgspec.msgpack.encode(body))
        return Ask(request, lambda answer: _right(msgspec.msgpack.decode(answer, type=_Rows), query))
    request = request_of("/v1/match", msgspec.json.encode(body))
    return Ask(request, lambda answer: _right(msgspec.json.decode(answer, type=_Rows), query))


def _by_keys(arena: Arena, query: Query, connection: Connection) -> Ask:
    body = {"model": MODEL, PACKED: _packed(arena, query)}
    keys = msgspec.json.decode(connection.ask(request_of("/v1/keys", msgspec.json.encode(body))))[KEYS]
    request = request_of("/v1/match", msgspec.json.encode({"model": MODEL, KEYS: keys}))
    return Ask(request, lambda answer: _right(msgspec.json.decode(answer, type=_Rows), query))


def _binary(body: bytes) -> bytes:
    head = f"POST /v1/match HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MSGPACK}\r\nAccept: {MSGPACK}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _right(answer: _Rows, query: Query) -> bool:
    given = {int(row.instance) - 1: row.matched_tokens for row in answer.matches if row.matched_tokens}
    return given == query.expected


def _right_batch(answer: bytes, queries: Sequence[Query]) -> bool:
    results = msgspec.json.decode(answer, type=_Results).results
    return all(_right(result, query) for result, query in zip(results, queries, strict=True))
