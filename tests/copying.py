"""Records of one index into another, as a store would carry them."""

from __future__ import annotations

from kvindexer.index.seam import Change, Index


def everything(index: Index, source: str) -> dict[int, bytes]:
    """All records of a source."""
    hashes = index.hashes(source)
    records = index.records(source, hashes)
    assert len(records) == len(hashes) == len(set(hashes))
    assert all(records)
    return dict(zip(hashes, records, strict=True))


def copy(one: Index, other: Index, source: str, parts: int = 1) -> None:
    """Load a source's share, in so many parts, into an index where it is attached and empty."""
    hashes = one.hashes(source)
    for part in range(parts):
        chosen = hashes[part::parts]
        other.load(source, chosen, one.records(source, chosen))
    other.loaded(source, one.facts(source))


class Copy:
    """The records of an index, kept up to date as a store would: by what each batch says it may have changed."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.records: dict[str, dict[int, bytes]] = {}

    def take(self, source: str) -> None:
        """Copy a source anew."""
        self.records[source] = everything(self.index, source)

    def follow(self, source: str, change: Change) -> None:
        """Copy what a batch of this source may have changed."""
        assert source not in change.touched_of
        for name, hashes in {source: change.touched, **change.touched_of}.items():
            kept = self.records[name]
            for block_hash, record in zip(hashes, self.index.records(name, hashes), strict=True):
                kept.pop(block_hash, None)
                if record:
                    kept[block_hash] = record
