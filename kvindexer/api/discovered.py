"""How the search for sources is doing, as /v1/sources and /health tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from kvindexer.events.finding import FindingFigures, FindingProblem


class DiscoveryProblem(msgspec.Struct):
    """Why something is not found, or not followed."""

    reason: str
    where: Annotated[str, Meta(description="The pod, pool or namespace that it is about.")]
    message: str
    hint: str
    serious: Annotated[bool, Meta(description="Whether /health is `degraded` for it.")]


class DiscoveryState(msgspec.Struct):
    """Pods that are looked for; all of it is 0 without discovery."""

    kind: Annotated[str, Meta(description="`none` or `kubernetes`.")]
    informed: Annotated[bool, Meta(description="Whether all that there was at the start has been found.")]
    pods: int
    followed: int
    waiting: Annotated[int, Meta(description="Pods whose engine has to be asked first, and has not answered.")]
    contact_s: Annotated[
        float | None, Meta(description="Longest time since the API server said something; null: it never has.")
    ]
    problems: list[DiscoveryProblem]


def serious(problems: Sequence[FindingProblem]) -> bool:
    """Whether somebody should look at it."""
    return any(problem.serious for problem in problems)


def discovery_state(figures: FindingFigures, most: int | None = None) -> DiscoveryState:
    """`most`: problems that are named; None: all."""
    return DiscoveryState(
        kind=figures.kind,
        informed=figures.informed,
        pods=figures.pods,
        followed=figures.followed,
        waiting=figures.waiting,
        contact_s=None if figures.contact_s is None else round(figures.contact_s, 3),
        problems=[DiscoveryProblem(*problem) for problem in figures.problems[:most]],
    )
