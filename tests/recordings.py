"""The recordings of real engines in `tests/recordings/`: frames, requests, and what the engine's cache held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "recordings"
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
WITH_TRUTH = tuple(name for name in NAMES if (FOLDER / name / "truth.jsonl").exists())


class Frame(NamedTuple):
    """One published message."""

    source: str
    seq: int
    payload: bytes


class Truth(NamedTuple):
    """What the engine's cache held right after a batch: (group, hash) -> copies, and hashes on the CPU tier."""

    seq: int
    gpu: dict[tuple[int, int], int]
    cpu: set[tuple[int, int]] | None


def lines(name: str, file: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of one file of a recording."""
    with (FOLDER / name / file).open() as opened:
        for line in opened:
            yield json.loads(line)


def frames(name: str) -> list[Frame]:
    """Messages in the order in which they were received."""
    return [
        Frame(
            str(line.get("source", line.get("port", ""))),
            int.from_bytes(bytes.fromhex(line["frames"][1]), "big"),
            bytes.fromhex(line["frames"][2]),
        )
        for line in lines(name, "frames.jsonl")
    ]


def truths(name: str) -> list[Truth]:
    """The engine's own cache contents, a batch each."""
    return [
        Truth(
            line["seq"],
            {(group, value & (2**64 - 1)): copies for group, value, _, copies in line["held"]},
            None
            if line.get("cpu_held") is None
            else {(group, value & (2**64 - 1)) for group, value, _, ready in line["cpu_held"] if ready},
        )
        for line in lines(name, "truth.jsonl")
    ]


class Asked(NamedTuple):
    """One recorded request: where in the stream it was asked, and what the engine said it reused."""

    source: str
    label: str
    before: int
    """How many frames of its source had been published."""
    tokens: list[int]
    salt: str | None
    lora: str | None
    cached_tokens: int
    hashes: list[int]
    """The engine's hashes of the prompt's full blocks, as integers; empty where they were not recorded."""
    alone: bool
    """No other request had changed the cache since the last published batch."""
    reset_pending: bool
    """The cache had been reset, and the wire had not told yet."""


def _requests(name: str) -> Iterator[dict[str, Any]]:
    """Requests and actions in one shape, in order; those of a batch all carry its seq numbers."""
    for line in lines(name, "requests.jsonl"):
        if line.get("kind") == "batch":
            for request in line["requests"]:
                yield {
                    **request,
                    "last_seq_before": line["last_seq_before"],
                    "last_seq_after": line["last_seq_after"],
                }
        elif line.get("kind") != "meta":
            yield line


def asked(name: str) -> list[Asked]:
    """All recorded requests whose place in the stream is known."""
    found: list[Asked] = []
    lives: dict[str, int] = {}
    newest: dict[str, int] = {}
    lengths = _life_lengths(name)
    shared: set[tuple[str, int, int]] = set()
    resets: set[tuple[str, int]] = set()
    for line in _requests(name):
        source = line.get("pod", "")
        if line.get("kind") == "action":
            if "reset" in line["label"]:
                resets.add((source, line["last_seq"]))
            continue
        before, after = line["last_seq_before"], line["last_seq_after"]
        if isinstance(before, dict):
            before, after = before[source], after[source]
            if after is not None and after < newest.get(source, -1):
                lives[source] = lives.get(source, 0) + 1
                before = -1
            newest[source] = -1 if after is None else after
        elif after is None:
            continue  # a twin: its place in the stream is not known
        before = -1 if before is None else before
        started = sum(lengths[source][: lives.get(source, 0)])
        lora = line.get("lora")
        found.append(
            Asked(
                source,
                str(line.get("label", line.get("id", len(found)))),
                started + before + 1,
                line["prompt_token_ids"],
                line["cache_salt"],
                None if lora is None else lora[0],
                line["cached_tokens"],
                line.get("block_hashes", line.get("block_hashes_u64", [])),
                (source, lives.get(source, 0), before) not in shared,
                (source, before) in resets,
            )
        )
        if after is not None and after > before:
            shared.add((source, lives.get(source, 0), before))
    return found


def _life_lengths(name: str) -> dict[str, list[int]]:
    """Per source: how many frames each of its lives published."""
    lengths: dict[str, list[int]] = {}
    for frame in frames(name):
        lives = lengths.setdefault(frame.source, [])
        if frame.seq == 0:
            lives.append(0)
        lives[-1] += 1
    return lengths
