r"""The workload of the comparison, seeded, and the oracle that knows every answer.

A prompt family is a trunk that all engines hold, wholly or in part, and branches of which each engine holds a prefix
of its own length.  From there, or from a root, an engine's own conversations go on: blocks that nobody else has.

               trunk (192)          branch (320)
    family     o--o--o-- ... --o-+--o--o-- ... --o        a query is a trunk and one branch: 512 blocks
                                 +--o--o-- ... --o
    engine 7   =================----=====                 its depth in the answer to the second branch: 197 blocks
                                          \===========     its own conversation

A block is a number (`Blocks`); equal numbers are equal blocks at an equal place.  The oracle is one set of numbers an
engine: it hashes nothing, so it can't share a mistake with the services.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import Final, NamedTuple

BLOCK_SIZE: Final = 16
VOCABULARY: Final = 150_000
QUERY_BLOCKS: Final = 512
TRUNK_BLOCKS: Final = 192
BRANCHES: Final = 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How big the workload is; the defaults are the figures of the comparison."""

    engines: int = 64
    entries: int = 1_000_000
    seed: int = 1403

    @property
    def families(self) -> int:
        """So many prompt families that about half of an engine's blocks are shared."""
        return max(1, self.entries // self.engines // 1300)


class Blocks:
    """Every block there is, by number: its 16 tokens and the engines' hash of it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # Token ids of real prompts are skewed to the low end: about half of them take 3 bytes on the wire, half 5.
        self._ids = [int(VOCABULARY * rng.random() ** 1.3) for _ in range(1 << 16)]
        self.tokens = array("I")
        self.hashes = array("Q")

    def grow(self, count: int) -> range:
        """New blocks, unlike all others."""
        first = len(self.hashes)
        ids = self._ids
        self.tokens.extend(ids[x] for x in array("H", self._rng.randbytes(2 * BLOCK_SIZE * count)))
        self.hashes.frombytes(self._rng.randbytes(8 * count))
        return range(first, first + count)


class Run(NamedTuple):
    """Consecutive blocks that an engine holds, and the block before them."""

    blocks: range
    parent: int | None
    path: tuple[range, ...] = ()
    """The blocks from the root to the parent."""


class Query(NamedTuple):
    """A prompt, by its blocks, and the expected answer: tokens by engine, engines without any left out."""

    blocks: list[int]
    expected: dict[int, int]


class Workload:
    """What every engine holds, the order in which it came to hold it, and the answers that follow."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.rng = random.Random(scale.seed)
        self.blocks = Blocks(self.rng)
        self.families = [self._family() for _ in range(scale.families)]
        self.runs = [self._runs_of(engine) for engine in range(scale.engines)]
        self.held = [{block for run in runs for block in run.blocks} for runs in self.runs]

    def _family(self) -> tuple[range, list[range]]:
        trunk = self.blocks.grow(TRUNK_BLOCKS)
        return trunk, [self.blocks.grow(QUERY_BLOCKS - TRUNK_BLOCKS) for _ in range(BRANCHES)]

    def _runs_of(self, engine: int) -> list[Run]:
        """What one engine stores, parents before children, exactly its share of the entries."""
        scale, rng = self.scale, self.rng
        budget = scale.entries // scale.engines + (engine < scale.entries % scale.engines)
        trunks: list[Run] = []
        later: list[Run] = []
        anchors: list[tuple[range, ...]] = [()] * (len(self.families) * BRANCHES)
        for trunk, branches in self.families:
            if rng.random() < 0.15:
                trunks.append(Run(trunk[: rng.randint(8, TRUNK_BLOCKS - 1)], None))
                continue
            trunks.append(Run(trunk, None))
            for branch in branches:
                depth = min(len(branch), rng.randint(0, 400))
                if depth:
                    later.append(Run(branch[:depth], trunk[-1], (trunk,)))
                    anchors.append((trunk, branch[:depth]))
        budget -= sum(len(run.blocks) for run in trunks + later)
        if budget < 0:
            message = "the scale is too small for its families"
            raise ValueError(message)
        own: list[Run] = []
        while budget:
            blocks = self.blocks.grow(min(budget, rng.randint(16, 400)))
            path = rng.choice(anchors)
            own.append(Run(blocks, path[-1][-1] if path else None, path))
            budget -= len(blocks)
        for runs in (trunks, later, own):
            rng.shuffle(runs)
        return trunks + later + own

    def answer(self, blocks: list[int]) -> dict[int, int]:
        """The naive oracle: leading blocks of the path that each engine has in its set, in tokens."""
        answer: dict[int, int] = {}
        for engine, held in enumerate(self.held):
            depth = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
            if depth:
                answer[engine] = depth * BLOCK_SIZE
        return answer

    def shared_queries(self) -> list[Query]:
        """512 blocks each; every engine appears in every answer."""
        paths = [[*trunk, *branch] for trunk, branches in self.families for branch in branches]
        return [Query(path, self.answer(path)) for path in paths]

    def odd_queries(self, count: int) -> list[Query]:
        """Prompts of one engine's own conversations, splices of two prompts, and prompts that nobody has seen."""
        queries: list[Query] = []
        for _ in range(count):
            own = self.rng.choice(self.rng.choice(self.runs))
            path = [block for part in own.path for block in part] + list(own.blocks)
            queries.append(Query(path, self.answer(path)))
            cut = self.rng.randint(1, len(path))
            other = self.rng.choice(self.rng.choice(self.runs)).blocks
            # Blocks that an engine holds, but elsewhere: behind another parent they are other blocks.
            queries.append(Query(path[:cut] + list(other)[1:], self.answer(path[:cut])))
        fresh = list(self.blocks.grow(8))
        return [*queries, Query(fresh, self.answer(fresh))]
