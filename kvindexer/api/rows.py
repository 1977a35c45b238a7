"""From the matches of ranks to the rows of /v1/match: one an instance, best first.

A row shows the instance's best rank, never a union over ranks.  What is best is the same between ranks and between
instances: more cached tokens, which spare most work, then more matched ones, then the higher score; or, if the caller
wants that, the higher score first, or what was routed to it (docs/decisions/0018-match-order-and-score.md, 0033).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from struct import Struct
from typing import Final, NamedTuple

import msgspec

from kvindexer.api.fleet import Fleet, InstanceStatus
from kvindexer.api.forms import Form
from kvindexer.api.lookahead import Ahead
from kvindexer.api.lookup import Found
from kvindexer.api.pieces import Joiner, fields_of, piece
from kvindexer.api.ranking import Listed, Ranking
from kvindexer.api.schemas import RankFigures, Tiers, TierTokens
from kvindexer.index.seam import HolderMatch
from kvindexer.tiering.weights import Weights, score

MAX_REMEMBERED: Final = 16_384
"""Most pieces of one kind that are kept."""
MAX_ROWS: Final = 4096
"""Most whole rows of one kind that are kept."""

_ByTier = tuple[int, int, int, int]
_NOTHING: Final[_ByTier] = (0, 0, 0, 0)
_MOST: Final = 2**192 - 1
_float, _integer = Struct("<d").pack, Struct("<Q").unpack
_NO_MATCH: Final = HolderMatch("", 0, 0, 0, 0, _NOTHING, _NOTHING)


class Rows(NamedTuple):
    """The rows, encoded, and the longest match among all instances that could be rows."""

    rows: msgspec.Raw
    longest: int


class _Who(msgspec.Struct):
    instance: str


class _Spelled(msgspec.Struct):
    instance: str
    candidate: str


class _Figures(msgspec.Struct):
    block_size: int
    matched_tokens: int
    cached_tokens: int
    score: float
    tiers: Tiers
    ranks: dict[str, int]


class _Trust(msgspec.Struct):
    state: str
    sound: bool
    complete: bool
    lag_ms: float
    verified_ms: float | None


class _ByRank(msgspec.Struct):
    by_rank: dict[str, RankFigures]


class _Soon(msgspec.Struct):
    speculative_tokens: int


class _Shape(msgspec.Struct, frozen=True, gc=False):
    """Figures of one rank, whosoever they are."""

    by_cached: str
    by_score: str
    """What decides over the order, all of the same length, lower is better."""
    encoded: bytes
    matched: int


class _Written(msgspec.Struct, gc=False):
    """A whole row, as it was written for this status and spelling."""

    status: InstanceStatus | None = None
    candidate: str | None = None
    before: bytes = b""
    behind: bytes = b""
    """What stands before and behind `speculative_tokens`."""
    row: bytes = b""
    """With `speculative_tokens`, where rows have them, of no more than is matched."""


_Entry = tuple[str, str, _Shape, int, HolderMatch, _Written]
"""Order, instance, figures, what they were made of: block size and match; and the row, if it was written before.

The order is that of the figures and the instance's name behind it, as a string: those are sorted fastest by far.
"""


_Around = tuple[InstanceStatus | None, bytes, bytes]
"""A status, and what stands before and behind the figures of an instance that has it."""

_ORDER: Final[Callable[[_Entry], str]] = itemgetter(0)
_NOBODY: Final[_Around] = (None, b"", b"")


class _Layout(NamedTuple):
    """Which fields rows have, and what was encoded for that."""

    joiner: Joiner
    around: dict[str | tuple[str, str], _Around]
    """By instance, and how it is spelled if it is."""
    entries: dict[tuple[int, bool], dict[HolderMatch | str, _Entry]]
    """By block size and order; then by match, or by instance where there is none."""

    def known(self, size: int, ranking: Ranking) -> dict[HolderMatch | str, _Entry]:
        """Entries that were made before."""
        known = self.entries.setdefault((size, ranking.by_score), {})
        if len(known) > MAX_ROWS:
            known.clear()
        return known


class RowMaker:
    """Makes rows for answers of one form, from pieces.

    What instances hold differs between queries, the shapes of what they hold mostly repeat: they are encoded once.
    So are names and states of instances, which are the same for many queries.  Where an instance matches as far as it
    did before, which is so for beginnings that prompts share, the whole row is there until its state changes.
    """

    def __init__(self, fleet: Fleet, form: Form, weights: Weights) -> None:
        self._fleet = fleet
        self._form = form
        self._weights = weights
        self._shapes: dict[int | tuple[object, ...], _Shape] = {}
        self._soon: dict[int, bytes] = {}
        self._layouts = {
            (spelled, by_rank, routed): _layout(form, (who, _Figures, _Trust, *rank, *soon))
            for spelled, who in ((False, _Who), (True, _Spelled))
            for by_rank, rank in ((False, ()), (True, (_ByRank,)))
            for routed, soon in ((False, ()), (True, (_Soon,)))
        }

    def rows(
        self,
        found: Sequence[Found],
        ranking: Ranking,
        listed: Listed | None,
        ahead: Mapping[str, Ahead] | None = None,
    ) -> Rows:
        """Rows of instances that hold something, then of those that will soon, then of listed ones that don't.

        All of them must meet the requirements.  `ahead`: how far instances get with prompts that are on their way.
        """
        layout = self._layouts[listed is not None, ranking.by_rank, ahead is not None]
        entries = self._entries(found, ranking, layout)
        holding = {entry[1] for entry in entries}
        if len(holding) != len(entries):
            entries = self._merged(entries, ranking)
        required, status_of = ranking.required, self._fleet.status
        if required is not None:
            entries = [entry for entry in entries if required.met_by(status_of(entry[1]))]
        entries.sort(key=_ORDER)
        longest = max([entry[2].matched for entry in entries], default=0)
        if ahead:
            coming = [instance for instance in ahead if instance not in holding]
            if coming or ranking.expected:
                entries = self._with_coming(entries, ahead, coming, layout, ranking)
                holding.update(coming)
        if listed is not None and len(holding) < len(listed.sizes):
            entries += [
                self._without_match(instance, listed.sizes[instance], layout, ranking)
                for instance in sorted(listed.sizes.keys() - holding)
                if required is None or required.met_by(status_of(instance))
            ]
        details = _by_rank(found, ranking.weights) if ranking.by_rank else None
        joiner, around, _ = layout
        spelled = None if listed is None else listed.spelled
        shown = entries[: ranking.most]
        statuses = self._fleet.each_status([entry[1] for entry in shown])
        if details is None:
            return Rows(joiner.objects(self._whole(shown, statuses, spelled, layout, ahead), len(shown)), longest)
        pieces: list[bytes] = []
        for entry, status in zip(shown, statuses, strict=True):
            _, instance, shape, *_ = entry
            known, name, trust = around.get(instance if spelled is None else (instance, spelled[instance]), _NOBODY)
            if known is not status:
                name, trust = self._surround(instance, spelled, status, layout)
            pieces += (name, shape.encoded)
            if ahead is not None:
                pieces.append(self._reaching(-_reach(entry, ahead), joiner))
            pieces.append(trust)
            pieces.append(joiner.further(piece(self._form, _ByRank(details.get(instance, {})))))
        return Rows(joiner.objects(pieces, len(shown)), longest)

    def _with_coming(
        self,
        entries: list[_Entry],
        ahead: Mapping[str, Ahead],
        coming: Iterable[str],
        layout: _Layout,
        ranking: Ranking,
    ) -> list[_Entry]:
        """Instances that hold nothing yet come behind those that do, or all in the order in which they will hold."""
        required, status_of = ranking.required, self._fleet.status
        entries = entries + [
            self._without_match(instance, ahead[instance].block_size, layout, ranking)
            for instance in sorted(coming, key=lambda instance: (-ahead[instance].tokens, instance))
            if required is None or required.met_by(status_of(instance))
        ]
        if ranking.expected:
            entries.sort(key=lambda entry: _reach(entry, ahead))  # equals stay in the order that they have
        return entries

    def _whole(
        self,
        entries: Iterable[_Entry],
        statuses: Iterable[InstanceStatus],
        spelled: Mapping[str, str] | None,
        layout: _Layout,
        ahead: Mapping[str, Ahead] | None,
    ) -> list[bytes]:
        """Rows, or their pieces, in which nothing depends on the prompt but entries and what is on its way."""
        rows: list[bytes] = []
        if spelled is None and ahead is None:  # then a status says it all
            for entry, status in zip(entries, statuses, strict=True):
                written = entry[5]
                if written.status is not status:
                    self._write(entry, status, None, layout, reaching=False)
                rows.append(written.row)
            return rows
        coming = ahead or {}
        for entry, status in zip(entries, statuses, strict=True):
            _, instance, shape, _, _, written = entry
            candidate = None if spelled is None else spelled[instance]
            if written.status is not status or written.candidate != candidate:
                self._write(entry, status, spelled, layout, reaching=ahead is not None)
            if instance in coming:
                tokens = max(coming[instance].tokens, shape.matched)
                rows += (
                    written.before,
                    self._soon.get(tokens) or self._reaching(tokens, layout.joiner),
                    written.behind,
                )
            else:
                rows.append(written.row)
        return rows

    def _write(
        self,
        entry: _Entry,
        status: InstanceStatus,
        spelled: Mapping[str, str] | None,
        layout: _Layout,
        *,
        reaching: bool,
    ) -> None:
        """Write a row anew, for a new status or spelling."""
        _, instance, shape, _, _, written = entry
        candidate = None if spelled is None else spelled[instance]
        known, name, trust = layout.around.get(instance if candidate is None else (instance, candidate), _NOBODY)
        if known is not status:
            name, trust = self._surround(instance, spelled, status, layout)
        written.before, written.behind = name + shape.encoded, trust
        soon = self._reaching(shape.matched, layout.joiner) if reaching else b""
        written.row = written.before + soon + trust
        written.status, written.candidate = status, candidate

    def _entries(self, found: Iterable[Found], ranking: Ranking, layout: _Layout) -> list[_Entry]:
        """All ranks that hold something."""
        weights = ranking.weights
        shapes = self._shapes if weights == self._weights else {}
        if len(shapes) > MAX_REMEMBERED:
            shapes.clear()
        entries: list[_Entry] = []
        for keyspace, matches in found:
            size = keyspace.block_size
            known = layout.known(size, ranking) if weights == self._weights else {}
            for match in matches:
                entry = known.get(match)
                if entry is None:
                    if not match.usable:
                        continue
                    entry = known[match] = self._entry(size, match, ranking, shapes)
                entries.append(entry)
        return entries

    def _entry(
        self, size: int, match: HolderMatch, ranking: Ranking, shapes: dict[int | tuple[object, ...], _Shape]
    ) -> _Entry:
        usable = match.usable
        key: int | tuple[object, ...]
        if match.alone == (usable, 0, 0, 0) and match.held == usable:
            # only a GPU holds anything, as nearly always: few numbers say it all, and are found much faster
            key = size << 96 | match.rank << 64 | usable << 32 | match.cached
        else:
            key = (size, match.rank, usable, match.cached, match.alone, match.cumulative)
        shape = shapes.get(key)
        if shape is None:
            shape = shapes[key] = self._shape(size, match, ranking.weights, {str(match.rank): usable * size})
        order = shape.by_score if ranking.by_score else shape.by_cached
        return order + match.instance, match.instance, shape, size, match, _Written()

    def _merged(self, entries: Iterable[_Entry], ranking: Ranking) -> list[_Entry]:
        """One entry an instance: its best rank, with what each of its ranks matches."""
        of_instance: dict[str, list[_Entry]] = {}
        for entry in entries:
            of_instance.setdefault(entry[1], []).append(entry)
        merged = []
        for instance, several in of_instance.items():
            entry = min(several, key=_ORDER)
            if len(several) > 1:
                ranks: dict[str, int] = {}
                for _, _, of_rank, _, its_match, _ in several:
                    rank = str(its_match.rank)
                    ranks[rank] = max(of_rank.matched, ranks.get(rank, 0))
                order, _, _, size, match, _ = entry
                shape = self._shape(size, match, ranking.weights, ranks)
                entry = (order, instance, shape, size, match, _Written())
            merged.append(entry)
        return merged

    def _shape(self, size: int, match: HolderMatch, weights: Weights, ranks: dict[str, int]) -> _Shape:
        matched, cached = match.usable * size, match.cached * size
        worth = score(match.cumulative, match.usable, weights) * size
        figures = _Figures(size, matched, cached, worth, _tiers(size, match.alone, match.cumulative), ranks)
        encoded, value = piece(self._form, figures), _value(worth)
        return _Shape(_order(cached, matched, value), _order(value, cached, matched), encoded, matched)

    def _without_match(self, instance: str, size: int, layout: _Layout, ranking: Ranking) -> _Entry:
        known = layout.known(size, ranking)
        entry = known.get(instance)
        if entry is None:
            key = (size,)
            shape = self._shapes.get(key)
            if shape is None:
                shape = self._shapes[key] = self._shape(size, _NO_MATCH, self._weights, {})
            entry = known[instance] = (shape.by_cached + instance, instance, shape, 0, _NO_MATCH, _Written())
        return entry

    def _surround(
        self, instance: str, spelled: Mapping[str, str] | None, status: InstanceStatus, layout: _Layout
    ) -> tuple[bytes, bytes]:
        """Encode what stands around the figures of an instance, and keep it for as long as its status is the same."""
        joiner, around, _ = layout
        if len(around) >= MAX_REMEMBERED:
            around.clear()
        trust = joiner.further(piece(self._form, _Trust(*status)))
        if spelled is None:
            name = joiner.first(piece(self._form, _Who(instance)))
            around[instance] = (status, name, trust)
        else:
            named = _Spelled(instance, spelled[instance])
            name = joiner.first(piece(self._form, named))
            around[instance, named.candidate] = (status, name, trust)
        return name, trust

    def _reaching(self, tokens: int, joiner: Joiner) -> bytes:
        """Encode how much an instance will hold, and keep it."""
        encoded = self._soon.get(tokens)
        if encoded is None:
            if len(self._soon) >= MAX_REMEMBERED:
                self._soon.clear()
            encoded = self._soon[tokens] = joiner.further(piece(self._form, _Soon(tokens)))
        return encoded


def _layout(form: Form, kinds: Iterable[type[msgspec.Struct]]) -> _Layout:
    """Rows that consist of these, with nothing encoded yet."""
    return _Layout(Joiner(form, fields_of(kinds)), {}, {})


def _order(first: int, second: int, third: int) -> str:
    """Three numbers below 2**64 as a string to sort by: more comes first, of the first one before all."""
    return f"{_MOST - (first << 128 | second << 64 | third):048x}"


def _value(worth: float) -> int:
    """A number that is not negative, as an integer of the same order: the bits of an IEEE 754 number have it."""
    (bits,) = _integer(_float(worth + 0.0))  # of a negative zero this makes a zero
    return int(bits)


def _reach(entry: _Entry, ahead: Mapping[str, Ahead]) -> int:
    """How far an instance will get, further is less."""
    soon = ahead.get(entry[1])
    return -entry[2].matched if soon is None else -max(soon.tokens, entry[2].matched)


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
