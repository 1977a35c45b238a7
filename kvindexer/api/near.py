"""Near spellings: what a name that is not known may have been meant to be.

Both sides may be hostile: names are cut, few of them are compared in depth.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import SequenceMatcher
from heapq import nlargest
from typing import Final

MOST: Final = 3
"""Near spellings of one name."""

_CUT: Final = 128
_COMPARED: Final = 32
_LIKE: Final = 0.6


def near(name: str, known: Collection[str]) -> list[str]:
    """Known names that are spelled nearly like this one, best first."""
    wanted = _plain(name)
    backwards = wanted[::-1]

    def overlap(other: str) -> int:
        plain = _plain(other)
        return _common(wanted, plain) + _common(backwards, plain[::-1]) - abs(len(wanted) - len(plain))

    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    likely = []
    for other in nlargest(_COMPARED, known, key=overlap):
        matcher.set_seq1(_plain(other))
        if matcher.quick_ratio() >= _LIKE and (ratio := matcher.ratio()) >= _LIKE:
            likely.append((-ratio, other))
    return [other for _, other in sorted(likely)[:MOST]]


def _plain(name: str) -> str:
    return name[:_CUT].lower()


def _common(one: str, other: str) -> int:
    """How many letters two names begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))
