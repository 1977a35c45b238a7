"""Count and XOR of entries: equal for equal sets of records, whatever their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from xxhash import xxh3_64_intdigest


class Digest(NamedTuple):
    """Of a set of records."""

    entries: int = 0
    xor: int = 0
    """XOR of XXH3-64 over each hash (8 bytes, little-endian) and its record."""

    def __add__(self, other: object) -> Digest:
        """Of two sets without a hash in common."""
        if not isinstance(other, Digest):
            return NotImplemented
        return Digest(self.entries + other.entries, self.xor ^ other.xor)


def digest_of(records: Iterable[tuple[int, bytes]]) -> Digest:
    """Of these hashes and records; an empty record is none."""
    entries = xor = 0
    for block_hash, record in records:
        if record:
            entries += 1
            xor ^= xxh3_64_intdigest(block_hash.to_bytes(8, "little") + record)
    return Digest(entries, xor)
