"""From the matches of ranks to the rows of /v1/match: one an instance, best first.

A row shows the instance's best rank, never a union over ranks.  What is best is the same between ranks and between
instances: more cached tokens, which spare most work, then more matched ones, then the higher score; or, if the caller
wants that, the higher score first (docs/decisions/0018-match-order-and-score.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET

from kvindexer.api.fleet import Fleet, InstanceStatus
from kvindexer.api.forms import Form
from kvindexer.api.lookup import Found
from kvindexer.api.schemas import Match, RankFigures, Tiers, TierTokens
from kvindexer.errors import RequestError
from kvindexer.index.seam import HolderMatch
from kvindexer.tiering.weights import DEFAULT_WEIGHTS, Weights, score

MAX_REMEMBERED: Final = 16_384
"""Most encoded `Tiers` that are kept."""

_ByTier = tuple[int, int, int, int]
_NOTHING: Final[_ByTier] = (0, 0, 0, 0)


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


class Ranking(NamedTuple):
    """Which instances are listed, and in which order."""

    required: Requirements | None = None
    weights: Weights = DEFAULT_WEIGHTS
    by_score: bool = False
    most: int | None = None
    """Rows at most; None: all."""
    by_rank: bool = False
    """Each rank's figures too."""


class Rows(NamedTuple):
    """The rows, and the longest match among all instances that could be rows."""

    rows: list[Match]
    longest: int


_Best = tuple[float, float, float, int, HolderMatch]
"""An instance's best rank: what decides over the order, block size, the match."""


class RowMaker:
    """Makes rows, for answers of one form; remembers what is the same in many of them, encoded."""

    def __init__(self, fleet: Fleet, form: Form) -> None:
        self._fleet = fleet
        self._encode = form.encode
        self._tiers: dict[tuple[int, _ByTier, _ByTier], Tiers] = {}

    def best_first(self, found: Iterable[Found], ranking: Ranking, spelled: Mapping[str, str] | None) -> Rows:
        """Rows of the instances that hold something and meet the requirements, with the callers' spellings."""
        best, ranks = _best(found, ranking)
        required, status_of = ranking.required, self._fleet.status
        if required is not None:
            best = {name: entry for name, entry in best.items() if required.met_by(status_of(name))}
        longest = max((size * match.usable for *_, size, match in best.values()), default=0)
        in_order = sorted(
            (-first, -second, -third, instance, size, match)
            for instance, (first, second, third, size, match) in best.items()
        )
        details = _by_rank(found, ranking.weights) if ranking.by_rank else None
        by_score = ranking.by_score
        rows = []
        for first, _, third, instance, size, match in in_order[: ranking.most]:
            rows.append(
                Match(
                    instance,
                    size,
                    match.usable * size,
                    match.cached * size,
                    -(first if by_score else third),
                    self._encoded(size, match),
                    ranks[instance],
                    *status_of(instance),
                    UNSET if spelled is None else spelled[instance],
                    UNSET if details is None else details[instance],
                )
            )
        return Rows(rows, longest)

    def empty(self, sizes: Mapping[str, int], ranking: Ranking, spelled: Mapping[str, str]) -> list[Match]:
        """Rows of instances (with their block size) that hold nothing of the prompt."""
        tiers = _tiers(0, _NOTHING, _NOTHING)
        details: dict[str, RankFigures] | msgspec.UnsetType = {} if ranking.by_rank else UNSET
        listed = ((instance, size, self._fleet.status(instance)) for instance, size in sorted(sizes.items()))
        return [
            Match(instance, size, 0, 0, 0.0, tiers, {}, *status, spelled[instance], details)
            for instance, size, status in listed
            if ranking.required is None or ranking.required.met_by(status)
        ]

    def _encoded(self, size: int, match: HolderMatch) -> Tiers:
        """The tiers of a match as they stand in an answer: bytes, which the encoder takes over as they are."""
        shape = (size, match.alone, match.cumulative)
        tiers = self._tiers.get(shape)
        if tiers is None:
            if len(self._tiers) >= MAX_REMEMBERED:
                self._tiers.clear()
            encoded: Any = msgspec.Raw(self._encode(_tiers(*shape)))
            tiers = self._tiers[shape] = encoded
        return tiers


def _best(found: Iterable[Found], ranking: Ranking) -> tuple[dict[str, _Best], dict[str, dict[str, int]]]:
    best: dict[str, _Best] = {}
    ranks: dict[str, dict[str, int]] = {}
    weights, by_score = ranking.weights, ranking.by_score
    for keyspace, matches in found:
        size = keyspace.block_size
        for match in matches:
            usable = match.usable
            if not usable:
                continue
            instance, matched, cached = match.instance, usable * size, match.cached * size
            worth = score(match.cumulative, usable, weights) * size
            entry = (worth, cached, matched, size, match) if by_score else (cached, matched, worth, size, match)
            before = best.get(instance)
            if before is None:
                best[instance] = entry
                ranks[instance] = {str(match.rank): matched}
                continue
            if entry[:3] > before[:3]:
                best[instance] = entry
            of_ranks, rank = ranks[instance], str(match.rank)
            of_ranks[rank] = max(matched, of_ranks.get(rank, 0))
    return best, ranks


def _by_rank(found: Iterable[Found], weights: Weights) -> dict[str, dict[str, RankFigures]]:
    """Every rank's own figures; of a rank with several block sizes those of the longest match."""
    details: dict[str, dict[str, RankFigures]] = {}
    for keyspace, matches in found:
        size = keyspace.block_size
        for match in matches:
            matched, rank = match.usable * size, str(match.rank)
            of_ranks = details.setdefault(match.instance, {})
            if matched and (rank not in of_ranks or matched > of_ranks[rank].matched_tokens):
                of_ranks[rank] = RankFigures(
                    size,
                    matched,
                    match.cached * size,
                    score(match.cumulative, match.usable, weights) * size,
                    _tiers(size, match.alone, match.cumulative),
                )
    return details


def _tiers(size: int, alone: _ByTier, cumulative: _ByTier) -> Tiers:
    gpu, cpu, disk, remote = alone
    to_gpu, to_cpu, to_disk, to_remote = cumulative
    return Tiers(
        TierTokens(gpu * size, to_gpu * size),
        TierTokens(cpu * size, to_cpu * size),
        TierTokens(disk * size, to_disk * size),
        TierTokens(remote * size, to_remote * size),
    )
