"""Recorded streams of real engines, frame by frame: the index holds what the engine's own cache held."""

from __future__ import annotations

import pytest

import recordings
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import HolderMatch
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.tokenization.extras import prompt_extras
from kvindexer.types import Keyspace, SourceSpec, Tier

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


class Player:
    """Plays a recording source by source into one index, restarts included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.index = PyIndex()
        self.block_size = BLOCK_SIZE.get(name, 32)
        self._frames: dict[str, list[recordings.Frame]] = {}
        for frame in recordings.frames(name):
            self._frames.setdefault(frame.source, []).append(frame)
        self._played = dict.fromkeys(self._frames, 0)
        for source in self._frames:
            self.index.attach(source, spec(name, instance=source))

    def play(self, source: str, until: int) -> None:
        """Apply the source's frames up to this many; a seq of 0 begins another life."""
        while self._played[source] < until:
            frame = self._frames[source][self._played[source]]
            if frame.seq == 0:
                self.index.withdraw(source)
            self.index.apply(source, frame.payload)
            self._played[source] += 1

    def match(self, asked: recordings.Asked) -> HolderMatch | None:
        """What the asked instance holds of the prompt now."""
        tokens = asked.tokens
        extras = prompt_extras(
            len(tokens) // self.block_size, self.block_size, lora=asked.lora, cache_salt=asked.salt
        )
        keys = prompt_keys(pack_tokens(tokens), self.block_size, extras)
        keyspace = Keyspace("default", "tiny", "", self.block_size)
        matches = self.index.match(keyspace, keys, len(tokens), {asked.source})
        return matches[0] if matches else None


NOT_ON_THE_WIRE = {"pool-0.9.2": 8}
"""vLLM below 0.17 does not publish salts, so a salted block looks like a plain one: how many of the requests that
ran alone are predicted wrong for that (each shares its first block with a salted request, or is salted)."""
RAN_ALONE = {
    "http-0.32-llama": 29,
    "inproc-0.32-gemma3-hybrid": 31,
    "inproc-0.32-llama": 31,
    "inproc-0.32-offload-selfdesc-true": 31,
    "pool-0.23.0": 59,
    "pool-0.33.0": 59,
    "pool-0.9.2": 54,
    "two-pods-0.32": 60,
}
"""How many requests of each recording ran alone and are predicted to the token."""


@pytest.mark.parametrize("name", recordings.NAMES)
def test_cached_tokens_are_predicted(name: str) -> None:
    """Exactly for requests that ran alone, as a lower bound for the others; what the wire can't tell is counted."""
    player = Player(name)
    requests = recordings.asked(name)
    salted = {tuple(asked.tokens[: player.block_size]) for asked in requests if asked.salt is not None}
    exact = blind = 0
    for asked in requests:
        player.play(asked.source, asked.before)
        found = player.match(asked)
        predicted = (found.cached if found else 0) * player.block_size
        if asked.reset_pending:
            continue  # the cache is empty, and no event has told of it: nobody can know
        if predicted == asked.cached_tokens:
            exact += asked.alone
        elif name in NOT_ON_THE_WIRE and tuple(asked.tokens[: player.block_size]) in salted:
            blind += 1
        else:
            assert not asked.alone, asked.label
            assert predicted < asked.cached_tokens, asked.label
    assert exact == RAN_ALONE[name]
    assert blind == NOT_ON_THE_WIRE.get(name, 0)


@pytest.mark.parametrize("name", recordings.WITH_TRUTH)
def test_match_equals_what_the_engine_holds(name: str) -> None:
    """Every recorded prompt, at its place in the stream: the leading blocks that the engine's cache has."""
    player = Player(name)
    truths = recordings.truths(name)
    compared = 0
    for asked in recordings.asked(name):
        player.play(asked.source, asked.before)
        blocks = len(asked.tokens) // player.block_size
        if not asked.hashes and blocks:
            continue
        held: set[int] = set()
        if asked.before:
            truth = truths[asked.before - 1]
            groups = {group for group, _ in truth.gpu} or {0}
            full_attention = max(groups)  # the hybrid recording's group 1
            held = {value for group, value in truth.gpu if group == full_attention}
            held |= {value for _, value in truth.cpu or ()}
        depth = 0
        for value in asked.hashes[:blocks]:
            if value & (2**64 - 1) not in held:
                break
            depth += 1
        found = player.match(asked)
        assert (found.held if found else 0) == depth, asked.label
        compared += 1
    assert compared or name == "pool-0.9.2"
