"""Rows of /v1/match that are kept from earlier answers: nothing of an earlier question is left in a later answer."""

from __future__ import annotations

from itertools import count
from operator import itemgetter
from random import Random
from typing import Any

import msgspec
import pytest

from api_server import LIVE, FakeFleet
from kvindexer.api import rows as module
from kvindexer.api.forms import FORMS, JSON, Form
from kvindexer.api.lookup import Found
from kvindexer.api.ranking import Listed, Ranking, Requirements
from kvindexer.api.rows import RowMaker
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import HolderMatch
from kvindexer.tiering.weights import DEFAULT_WEIGHTS
from kvindexer.types import Keyspace

INSTANCES = [f"pod-{number}" for number in range(12)]
SPACES = [Keyspace("default", "m", "", 16), Keyspace("default", "m", "blue", 16), Keyspace("default", "m", "", 32)]


def a_match(dice: Random, instance: str) -> HolderMatch:
    gpu = dice.choice([0, 3, 4, 4, 4, 300])
    cpu = gpu + dice.choice([0, 0, 0, 1, 4])
    usable = cpu - dice.choice([0, 0, 0, min(cpu, 1)])
    cached = max(0, usable - dice.choice([0, 1]))
    below = (0, cpu, 0, 0) if cpu > gpu else (0, 0, 0, 0)
    return HolderMatch(
        instance, dice.choice([0, 0, 0, 1]), cpu, usable, cached, (gpu, *below[1:]), (gpu, cpu, cpu, cpu)
    )


def a_question(dice: Random) -> tuple[list[Found], Ranking, Listed | None]:
    chosen = dice.choice([SPACES[:1], SPACES[:1], SPACES[:1], SPACES])
    found = []
    for space in chosen:
        matches = {
            (match.instance, match.rank): match
            for match in (a_match(dice, dice.choice(INSTANCES)) for _ in range(dice.randrange(12)))
        }
        found.append(Found(space, list(matches.values())))
    ranking = Ranking(
        required=dice.choice([None, None, Requirements(live=True), Requirements(sound=True)]),
        weights=dice.choice([DEFAULT_WEIGHTS, DEFAULT_WEIGHTS, (1.0, 0.5, -0.0, 0.0), (-0.0, 0.0, 0.0, 0.0)]),
        by_score=dice.random() < 0.4,
        most=dice.choice([None, None, 3]),
        by_rank=dice.random() < 0.2,
    )
    if dice.random() < 0.5:
        return found, ranking, None
    sizes = dict.fromkeys(INSTANCES, chosen[0].block_size)
    return (
        found,
        ranking,
        Listed(sizes, {name: dice.choice([name, name, f"http://{name}:8000"]) for name in INSTANCES}),
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_whatever_was_asked_before_an_answer_is_that_of_a_service_that_was_asked_nothing(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where states change in between, and where more rows are made than are kept."""
    monkeypatch.setattr(module, "MAX_ROWS", 40)
    dice, ages = Random(1), count()
    fleet = FakeFleet(PyIndex())
    old = RowMaker(fleet, form, DEFAULT_WEIGHTS)
    for _ in range(1_500):
        if dice.random() < 0.3:
            state = LIVE._replace(
                state=dice.choice(["live", "stale"]), sound=dice.random() < 0.8, verified_ms=float(next(ages))
            )
            fleet.statuses[dice.choice(INSTANCES)] = state
        question = a_question(dice)
        assert old.rows(*question) == RowMaker(fleet, form, DEFAULT_WEIGHTS).rows(*question)


def test_rows_stand_in_the_order_of_their_figures_then_of_their_names() -> None:
    """The keys that they are sorted by are integers made of those figures."""
    dice = Random(2)
    maker = RowMaker(FakeFleet(PyIndex()), JSON, DEFAULT_WEIGHTS)
    for _ in range(300):
        found, ranking, _ = a_question(dice)
        rows: list[dict[str, Any]] = msgspec.json.decode(maker.rows(found, ranking, None).rows)
        by_score, by_cached = (
            ("score", "cached_tokens", "matched_tokens"),
            ("cached_tokens", "matched_tokens", "score"),
        )
        figures = itemgetter(*(by_score if ranking.by_score else by_cached))
        order = [([-figure for figure in figures(row)], row["instance"]) for row in rows]
        assert order == sorted(order)
