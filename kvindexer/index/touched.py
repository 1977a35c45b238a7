"""Which records a batch may have changed, of its own source and of others.

    a member of the domain holds fewer      its own records, and the keeper's if that was the last copy
    the domain learns of a held hash        the records of every member that holds it
    ... of a hash that nobody holds         the keeper's

Mostly a source shares its hashes with nobody, and all of it is its own.
"""

from __future__ import annotations

from array import array
from collections import defaultdict

from kvindexer.index.domain import Domain
from kvindexer.index.share import Share


def told(share: Share, own: array[int], dropped: list[tuple[Share, list[int]]]) -> dict[str, array[int]]:
    """Complete a batch's own list, which names what its events named; returns the lists of other sources.

    `dropped` says who has lost which hashes at a bound.  What the domains have learnt since they were looked at last
    is thereby said.
    """
    domain = share.domain
    if len(dropped) == len(domain.members) == 1:
        own.extend(dropped[0][1])
        if domain.learnt or domain.unheld:
            own.extend(domain.learnt)
            own.extend(domain.unheld)
            domain.learnt.clear()
            domain.unheld.clear()
        return {}
    lists: defaultdict[str, array[int]] = defaultdict(_nothing, {share.source: own})
    for loser, hashes in dropped:
        lists[loser.source].extend(hashes)
    for loser, _ in dropped:
        keeper = loser.domain.keeper
        if keeper is not None and keeper is not loser:
            lists[keeper.source].extend(lists[loser.source])
        _tell(loser.domain, lists)
    del lists[share.source]
    return {source: hashes for source, hashes in lists.items() if hashes}


def _tell(domain: Domain, lists: defaultdict[str, array[int]]) -> None:
    """Say what a domain has learnt and forgotten."""
    for member in domain.members:
        lists[member.source].extend(filter(member.holds, domain.learnt))
    if domain.keeper is not None:
        lists[domain.keeper.source].extend(domain.unheld)
    domain.learnt.clear()
    domain.unheld.clear()


def _nothing() -> array[int]:
    return array("Q")
