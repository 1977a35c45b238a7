"""Recorded streams of real engines, frame by frame: the index holds what the engine's own cache held."""

from __future__ import annotations

import pytest

import recordings
from kvindexer.index.engine import PyIndex
from kvindexer.types import SourceSpec, Tier

BLOCK_SIZE = {"pool-0.9.2": 16, "pool-0.23.0": 16, "pool-0.33.0": 16}


def spec(name: str, instance: str = "pod-a") -> SourceSpec:
    return SourceSpec(
        instance=instance, model="tiny", block_size=BLOCK_SIZE.get(name, 32), endpoint=f"tcp://{instance}:5557"
    )


@pytest.mark.parametrize("name", recordings.WITH_TRUTH)
def test_copies_equal_the_engines_after_every_batch(name: str) -> None:
    index = PyIndex()
    index.attach("s", spec(name))
    for frame, truth in zip(recordings.frames(name), recordings.truths(name), strict=True):
        change = index.apply("s", frame.payload)
        assert change.skipped == {}, frame.seq
        assert frame.seq == truth.seq
        held = index.copies("s")
        gpu = {(group, value): n for (_, group, tier, _, value), n in held.items() if tier is Tier.GPU}
        assert gpu == truth.gpu, frame.seq
        if truth.cpu is not None:
            cpu = {(group, value) for (_, group, tier, _, value) in held if tier is Tier.CPU}
            assert cpu == truth.cpu, frame.seq
