"""What the engines put on the wire, encoded beforehand: vLLM's map dialect with the fields of 0.32.

A spool is a file of encoded messages in the order of sending, so that publishing costs a publisher next to nothing:

    <engine u16> <blocks u32> <blocks of the whole spool before it u64> <length u32> <payload>
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from benchmarks.workload import BLOCK_SIZE, Blocks, Run, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

HEADER: Final = struct.Struct("<HIQI")
EVENT_BLOCKS: Final = (30, 105)
"""A store event carries so many blocks, unless its run is shorter: about 57 in the mean."""
REMOVALS: Final = 64
"""Removal events in one batch; vLLM removes one block an event."""

_encode = msgspec.msgpack.Encoder().encode
_TIME: Final = 1_790_000_000.0


class Message(NamedTuple):
    """One batch of one engine."""

    engine: int
    blocks: int
    payload: bytes


class Spooled(NamedTuple):
    """One record of a spool, with the number of blocks before it."""

    engine: int
    blocks: int
    before: int
    payload: bytes


def store(blocks: Blocks, run: range, parent: int | None) -> bytes:
    """Encode a batch with one BlockStored."""
    event = {
        "type": "BlockStored",
        "block_hashes": blocks.hashes[run.start : run.stop].tolist(),
        "parent_block_hash": None if parent is None else blocks.hashes[parent],
        "token_ids": blocks.tokens[run.start * BLOCK_SIZE : run.stop * BLOCK_SIZE].tolist(),
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(run),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return _encode([_TIME + run.start / 1e6, [event], 0])


def removal(blocks: Blocks, gone: range) -> bytes:
    """Encode a batch with a BlockRemoved for every block, the last of the chain first, as vLLM evicts."""
    events = [
        {"type": "BlockRemoved", "block_hashes": [blocks.hashes[block]], "medium": "GPU", "group_idx": 0}
        for block in reversed(gone)
    ]
    return _encode([_TIME + gone.start / 1e6, events, 0])


def stores_of(workload: Workload, engine: int, runs: Iterable[Run]) -> Iterator[Message]:
    """Store the runs, each in chunks as a chunked prefill does it."""
    for run in runs:
        rest, parent = run.blocks, run.parent
        while rest:
            size = workload.rng.randint(*EVENT_BLOCKS)
            chunk, rest = rest[:size], rest[size:]
            yield Message(engine, len(chunk), store(workload.blocks, chunk, parent))
            parent = chunk[-1]


def removals_of(workload: Workload, engine: int, run: Run) -> Iterator[Message]:
    """Remove a run, several removals a batch."""
    rest = run.blocks
    while rest:
        rest, gone = rest[:-REMOVALS], rest[-REMOVALS:]
        yield Message(engine, len(gone), removal(workload.blocks, gone))


def interleave(streams: list[list[Message]]) -> list[Message]:
    """All engines at once: each stream in its order, spread evenly over the whole."""
    placed = [((i + 0.5) / len(stream), message) for stream in streams for i, message in enumerate(stream)]
    return [message for _, message in sorted(placed, key=lambda pair: pair[0])]


def initial(workload: Workload) -> list[Message]:
    """Everything the workload's engines hold."""
    return interleave([list(stores_of(workload, e, runs)) for e, runs in enumerate(workload.runs)])


def further(workload: Workload, count: int) -> tuple[list[Message], list[Message]]:
    """About `count` further blocks that no query asks for: the stores, and the removals that undo them.

    Engines are busy to a different degree: in step with each other all their tables would grow at the same moment.
    """
    stores: list[list[Message]] = []
    removals: list[list[Message]] = []
    mean = count / workload.scale.engines / 250
    for engine in range(workload.scale.engines):
        runs = [Run(workload.blocks.grow(250), None) for _ in range(round(mean * (0.5 + engine % 8 / 7)) or 1)]
        stores.append(list(stores_of(workload, engine, runs)))
        removals.append([message for run in runs for message in removals_of(workload, engine, run)])
    return interleave(stores), interleave(removals)


def more(workload: Workload, count: int) -> list[Message]:
    """About `count` further blocks that no query asks for, to stay."""
    runs = count // workload.scale.engines // 250 or 1
    grown = [[Run(workload.blocks.grow(250), None) for _ in range(runs)] for _ in range(workload.scale.engines)]
    return interleave([list(stores_of(workload, engine, its)) for engine, its in enumerate(grown)])


def single(workload: Workload, block: range, engines: Iterable[int]) -> list[Message]:
    """One block, at the start of a prompt, stored by these engines."""
    payload = store(workload.blocks, block, None)
    return [Message(engine, len(block), payload) for engine in engines]


def write_spool(path: Path, messages: Iterable[Message]) -> int:
    """Write a spool; returns the blocks in it."""
    before = 0
    with path.open("wb") as spool:
        for engine, count, payload in messages:
            spool.write(HEADER.pack(engine, count, before, len(payload)) + payload)
            before += count
    return before


def read_spool(path: Path, engines: range) -> Iterator[Spooled]:
    """Records of these engines."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        engine, count, before, length = HEADER.unpack_from(data, at)
        at += HEADER.size
        if engine in engines:
            yield Spooled(engine, count, before, data[at : at + length])
        at += length
