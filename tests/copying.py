"""Records of one index into another, as a store would carry them."""

from __future__ import annotations

from kvindexer.index.seam import Index


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
