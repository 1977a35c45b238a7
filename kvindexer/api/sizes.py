"""The block sizes that instances really have, beside those that they are registered with."""

from __future__ import annotations

from collections.abc import Collection

from kvindexer.index.seam import Index
from kvindexer.types import SourceSpec


class BlockSizes:
    """What the index has seen; each model is looked at once, so use it for one answer."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._families: dict[tuple[str, str, str], list[tuple[int, Collection[str]]]] = {}

    def of(self, spec: SourceSpec) -> list[int]:
        """Block sizes of a source's instance, in order: the registered one, and those that its events have named."""
        family = (spec.tenant, spec.model, spec.additional_salt)
        spaces = self._families.get(family)
        if spaces is None:
            spaces = self._families[family] = [
                (space.block_size, self._index.instances(space)) for space in self._index.keyspaces(*family)
            ]
        return sorted({spec.block_size, *(size for size, instances in spaces if spec.instance in instances)})
