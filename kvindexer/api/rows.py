"""From the matches of ranks to the rows of /v1/match: one an instance, best first.

A row shows the instance's best rank, never a union over ranks; the best one is that which spares most work: more
cached tokens first, then more matched ones.  The same order holds between rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kvindexer.api.fleet import Fleet, InstanceStatus
from kvindexer.api.lookup import Found
from kvindexer.api.schemas import Match, Tiers, TierTokens
from kvindexer.errors import RequestError
from kvindexer.index.seam import HolderMatch

_NOTHING: Final = (0, 0, 0, 0)


class Requirements(NamedTuple):
    """What the caller insists on."""

    live: bool = False
    sound: bool = False
    complete: bool = False

    def met_by(self, status: InstanceStatus) -> bool:
        """Whether an instance may be listed."""
        return not (
            (self.live and status.state != "live")
            or (self.sound and not status.sound)
            or (self.complete and not status.complete)
        )


def requirements(names: Iterable[str] | None) -> Requirements | None:
    """The `require` of a request; None: nothing.  Raises RequestError."""
    if not names:
        return None
    wanted = set(names)
    if not wanted <= set(Requirements._fields):
        raise RequestError(
            "invalid_request",
            "require: a value is not known",
            f"any of: {', '.join(Requirements._fields)}",
            status=422,
        )
    return Requirements(**dict.fromkeys(wanted, True))


_Best = tuple[int, int, int, HolderMatch]
"""An instance's best rank: cached tokens, matched tokens, block size, the match."""


def best_first(found: Iterable[Found], fleet: Fleet, required: Requirements | None) -> list[Match]:
    """Rows of all instances that hold something and meet the requirements."""
    best, ranks = _best(found)
    shapes: dict[tuple[object, ...], Tiers] = {}
    rows = []
    for instance, (cached, matched, size, match) in best.items():
        status = fleet.status(instance)
        if required is not None and not required.met_by(status):
            continue
        shape = (size, match.alone, match.cumulative)
        tiers = shapes.get(shape)
        if tiers is None:
            tiers = shapes[shape] = _tiers(size, match.alone, match.cumulative)
        rows.append(Match(instance, size, matched, cached, tiers, ranks[instance], *status))
    rows.sort(key=_order)
    return rows


def empty_rows(sizes: Mapping[str, int], fleet: Fleet, required: Requirements | None) -> list[Match]:
    """Rows of instances (with their block size) that hold nothing of the prompt."""
    tiers = _tiers(0, _NOTHING, _NOTHING)
    listed = ((instance, size, fleet.status(instance)) for instance, size in sorted(sizes.items()))
    return [
        Match(instance, size, 0, 0, tiers, {}, *status)
        for instance, size, status in listed
        if required is None or required.met_by(status)
    ]


def _best(found: Iterable[Found]) -> tuple[dict[str, _Best], dict[str, dict[str, int]]]:
    best: dict[str, _Best] = {}
    ranks: dict[str, dict[str, int]] = {}
    for keyspace, matches in found:
        size = keyspace.block_size
        for match in matches:
            instance = match.instance
            matched = match.usable * size
            if not matched:
                continue
            cached = match.cached * size
            before = best.get(instance)
            if before is None:
                best[instance] = (cached, matched, size, match)
                ranks[instance] = {str(match.rank): matched}
                continue
            if (cached, matched) > before[:2]:
                best[instance] = (cached, matched, size, match)
            of_ranks, rank = ranks[instance], str(match.rank)
            of_ranks[rank] = max(matched, of_ranks.get(rank, 0))
    return best, ranks


def _order(row: Match) -> tuple[int, int, str]:
    return -row.cached_tokens, -row.matched_tokens, row.instance


def _tiers(size: int, alone: tuple[int, int, int, int], cumulative: tuple[int, int, int, int]) -> Tiers:
    gpu, cpu, disk, remote = alone
    to_gpu, to_cpu, to_disk, to_remote = cumulative
    return Tiers(
        TierTokens(gpu * size, to_gpu * size),
        TierTokens(cpu * size, to_cpu * size),
        TierTokens(disk * size, to_disk * size),
        TierTokens(remote * size, to_remote * size),
    )
