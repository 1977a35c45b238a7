"""What the routes under /v1/match have in common: a question about a model's instances, asked for prompts.

Question ─► Asked (keyspaces, candidates, ranking)          once a request
Asked, Prompt ─► Index.match in each keyspace ─► rows, best first ─► Answered          once a prompt
"""

from __future__ import annotations

from collections.abc import Collection
from math import isnan
from typing import Any, NamedTuple

from kvindexer.api.fleet import Fleet
from kvindexer.api.forms import FORMS, Form
from kvindexer.api.identities import Candidates, Identities
from kvindexer.api.lookahead import Lookahead
from kvindexer.api.lookup import Found, KnownModels, find, keyspaces, tenant_named
from kvindexer.api.metrics import Metrics
from kvindexer.api.prompt import Prompt
from kvindexer.api.ranking import Listed, Ranking, requirements
from kvindexer.api.rows import RowMaker
from kvindexer.api.schemas import Question, TierWeights
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.tiering.heat import HeatCounts
from kvindexer.tiering.speculative import Speculation
from kvindexer.tiering.weights import Weights
from kvindexer.types import TIERS, Keyspace


class Asked(NamedTuple):
    """What a request asks for, whatever the prompt."""

    model: str
    spaces: list[Keyspace]
    candidates: Candidates | None
    """None: there is no choice of candidates."""
    known: dict[str, int]
    """Block size of each candidate that is known."""
    all_of_them: bool
    """The candidates are all instances that there are."""
    ranking: Ranking
    form: Form
    """Of the answer."""


class Answered(NamedTuple):
    """What an answer says of one prompt."""

    blocks: int
    tokens: int
    matches: Any
    """The rows: `list[Match]`, encoded already."""
    reason: str | None


class Matcher:
    """Answers questions; `heat` is told of them, `speculation` tells of prompts that are on their way."""

    def __init__(
        self,
        settings: Settings,
        index: Index,
        fleet: Fleet,
        models: KnownModels,
        metrics: Metrics,
        *,
        heat: HeatCounts,
        speculation: Speculation,
    ) -> None:
        self._index = index
        self._heat = heat
        self._speculation = speculation
        self._lookahead = Lookahead(index, speculation)
        self._models = models
        self._metrics = metrics
        self._max_candidates = settings.max_candidates
        named = settings.tier_weights
        self._weights: Weights = (named["gpu"], named["cpu"], named["disk"], named["remote"])
        self._identities = Identities(fleet, settings.bind_endpoints)
        self._rows = {form: RowMaker(fleet, form, self._weights) for form in FORMS}

    def asked(self, question: Question, form: Form) -> Asked:
        """Look at everything but the prompt.  Raises RequestError."""
        required = requirements(question.require)
        weights = self._weights if question.weights is None else self._weighted(question.weights)
        spaces = self.keyspaces(question.tenant, question.model, question.additional_salt, question.block_size)
        candidates = None
        known: dict[str, int] = {}
        all_of_them = False
        if question.candidates is not None:
            candidates, known = self.candidates(question, question.candidates, spaces)
            all_of_them = len(spaces) == 1 and len(known) == len(self._index.instances(spaces[0]))
        order, top_k = question.order, question.top_k
        ranking = Ranking(required, weights, order == "score", top_k, question.by_rank, order == "expected")
        return Asked(question.model, spaces, candidates, known, all_of_them, ranking, form)

    def keyspaces(self, tenant: str | None, model: str, salt: str | None, block_size: int | None) -> list[Keyspace]:
        """The keyspaces that are asked about, at least one.  Raises RequestError."""
        return keyspaces(
            self._index,
            self._models,
            tenant_named(tenant),
            model,
            additional_salt=salt,
            block_size=block_size,
        )

    def instances(self, space: Keyspace) -> Collection[str]:
        """Instances that a match in this keyspace could name."""
        return self._index.instances(space)

    def answer(self, asked: Asked, prompt: Prompt) -> Answered:
        """Who holds how much of a prompt."""
        spaces, candidates, ranking = asked.spaces, asked.candidates, asked.ranking
        known = None if candidates is None or asked.all_of_them else asked.known
        found = find(self._index, spaces, prompt, known)
        for space in spaces:
            self._heat.asked(space, prompt.keys(space.block_size))
        ahead = self._lookahead.ahead(found, prompt, known) if self._speculation.alive else None
        listed = None if candidates is None else Listed(asked.known, candidates.spelled)
        rows, longest = self._rows[asked.form].rows(found, ranking, listed, ahead)
        size = min(space.block_size for space in spaces) if len(spaces) > 1 else spaces[0].block_size
        tokens = prompt.tokens(size)
        blocks = tokens // size
        self._metrics.asked(longest, tokens)
        return Answered(blocks, tokens, rows, None if longest else self.reason(asked, found, blocks=blocks))

    def candidates(
        self, question: Question, names: list[str], spaces: list[Keyspace]
    ) -> tuple[Candidates, dict[str, int]]:
        """What candidates mean, and the block size of each that a match could name."""
        if len(names) > self._max_candidates:
            raise TooLargeError("candidates", len(names), self._max_candidates, "max_candidates")
        sizes: dict[str, int] = {}
        for space in spaces:
            sizes |= dict.fromkeys(self._index.instances(space), space.block_size)
        family = (tenant_named(question.tenant), question.model, question.additional_salt)
        candidates = self._identities.resolve(names, family, sizes)
        return candidates, {name: sizes[name] for name in candidates.spelled}

    def _weighted(self, given: TierWeights) -> Weights:
        weights = [getattr(given, tier.label) for tier in TIERS]
        if any(weight is not None and isnan(weight) for weight in weights):  # msgpack has NaN, JSON has not
            raise RequestError("invalid_request", "weights: a value is no number", "0 or more", status=422)
        gpu, cpu, disk, remote = (
            default if weight is None else weight for weight, default in zip(weights, self._weights, strict=True)
        )
        return gpu, cpu, disk, remote

    def reason(self, asked: Asked, found: list[Found], *, blocks: int) -> str:
        """Why no instance has any of the prompt."""
        if not any(self._index.instances(space) for space in asked.spaces):
            return "no_instance"
        if asked.candidates is not None and not asked.known:
            return "no_known_candidate"
        if not blocks:
            return "shorter_than_a_block"
        if any(match.usable for each in found for match in each.matches):
            return "filtered_by_require"
        return "nothing_held"


def named(candidates: Candidates | None) -> tuple[list[str], dict[str, list[str]]]:
    """The candidates of an answer that are no instance: unknown ones and ambiguous ones."""
    return ([], {}) if candidates is None else (candidates.unknown, candidates.ambiguous)
