"""How a fake engine names blocks: a chain of SHA-256 digests, each covering its parent, tokens and extra keys.

Invariant: two blocks share a digest exactly if seed, whole prefix and all extra keys along it are equal. The
scheme is the fake's own, so that nobody can pass a test by computing an engine's hashes instead of learning them.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from kvindexer.testing.packing import pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvindexer.testing.events import Digest, ExtraKey


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """An image or sound whose placeholder tokens are `offset .. offset + length` of the prompt."""

    identifier: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What besides the tokens decides whether two requests may share blocks."""

    salt: str | None = None
    lora: str | None = None
    multimodal: tuple[MultimodalItem, ...] = ()

    def extra_keys(self, start: int, end: int) -> tuple[ExtraKey, ...] | None:
        """Return the extra keys of the block that covers tokens `start .. end`, in vLLM's order."""
        keys: list[ExtraKey] = [] if self.lora is None else [self.lora]
        keys += [
            (item.identifier, item.offset - start)
            for item in self.multimodal
            if item.offset < end and item.offset + item.length > start
        ]
        if self.salt is not None and start == 0:
            keys.append(self.salt)
        return tuple(keys) or None


class BlockHasher:
    """Digests of a token list's full blocks."""

    def __init__(self, seed: int | str, block_size: int) -> None:
        self.block_size = block_size
        self._root = hashlib.sha256(f"kvindexer-fake-engine:{seed}".encode()).digest()

    def extend(self, known: list[Digest], tokens: Sequence[int], scope: CacheScope) -> None:
        """Append to `known` the digests of those full blocks of `tokens` that it does not have yet."""
        bounds = range(len(known) * self.block_size, len(tokens) + 1, self.block_size)
        for start, end in pairwise(bounds):
            parent = known[-1] if known else self._root
            # the type tag keeps a salt apart from a LoRA adapter of the same name
            extras = (scope.lora, scope.extra_keys(start, end), scope.salt if start == 0 else None)
            block = array("Q", tokens[start:end]).tobytes()
            known.append(hashlib.sha256(parent + block + pack(extras)).digest())
