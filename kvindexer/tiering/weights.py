"""How much a prefix is worth, by the tiers it lies on.

    score = sum over the tiers, nearest first, of (what the tier adds to the nearer ones) * (the tier's weight)

The GPU has blocks 0-3 of a prompt and the CPU 2-7: 4 * 1.0 + 4 * 0.8 blocks.  What counts is how far the prefix gets
with each further tier, so a block that lies on two tiers counts once, on the nearer one.
"""

from __future__ import annotations

from typing import Final

Weights = tuple[float, float, float, float]
"""Worth of a block or token on each tier, in the order of `TIERS`."""

DEFAULT_WEIGHTS: Final[Weights] = (1.0, 0.8, 0.4, 0.2)


def score(cumulative: tuple[int, int, int, int], usable: int, weights: Weights = DEFAULT_WEIGHTS) -> float:
    """Weighted length of a prefix, in the unit of the depths: blocks or tokens.

    `cumulative` are leading blocks on each tier or a nearer one, `usable` those that the engine can reuse: what lies
    behind them is worth nothing.
    """
    gpu, cpu, disk, remote = cumulative
    if gpu >= usable:
        return usable * weights[0]
    cpu, disk, remote = min(cpu, usable), min(disk, usable), min(remote, usable)
    return gpu * weights[0] + (cpu - gpu) * weights[1] + (disk - cpu) * weights[2] + (remote - disk) * weights[3]
