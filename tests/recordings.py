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
