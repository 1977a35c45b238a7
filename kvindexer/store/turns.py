"""Whose turn it is to write a shard: rendezvous hashing, so that a replica that comes or goes moves only its part.

Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.
"""

from __future__ import annotations

from collections.abc import Iterable

from xxhash import xxh3_64_intdigest


def turn(replica: str, replicas: Iterable[str], tag: str) -> int:
    """How many replicas come before this one in writing the shard; every replica finds the same order."""

    def weight(name: str) -> tuple[int, str]:
        return xxh3_64_intdigest(f"{tag} {name}".encode()), name

    ours = weight(replica)
    return sum(weight(name) > ours for name in replicas if name != replica)
