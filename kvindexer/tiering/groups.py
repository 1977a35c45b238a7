"""Which blocks of a prefix an engine needs to reuse it, per kind of KV-cache group.

    full attention    every block
    sliding window    the last ceil((window - 1) / block_size) blocks of the prefix
    Mamba             the block at the boundary

A prefix counts when the rule of every group of the engine holds; it is cut back until that is so.  Kinds on the
wire since vLLM 0.22; a kind that is not in the table is treated as full attention and flagged, never guessed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

EVERY_BLOCK: Final = 0

_EVERY = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
_WINDOW = frozenset({"sliding_window", "sliding_window_mla"})
_BOUNDARY = frozenset({"mamba"})


class GroupRule(NamedTuple):
    """How many blocks at the end of a prefix a group needs; `EVERY_BLOCK`: all of the prefix."""

    tail_blocks: int
    known: bool


def group_rule(kind: str | None, window: int | None, block_size: int) -> GroupRule:
    """The rule of a group of this kind; no kind at all (below vLLM 0.22) is taken for full attention."""
    if kind is None or kind in _EVERY:
        return GroupRule(EVERY_BLOCK, known=True)
    if kind in _WINDOW and window is not None and window > 0:
        return GroupRule(max(1, -(-(window - 1) // block_size)), known=True)
    if kind in _BOUNDARY:
        return GroupRule(1, known=True)
    return GroupRule(EVERY_BLOCK, known=False)
