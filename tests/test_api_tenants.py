"""Trap 27 on every route: nobody can tell from an answer whether another tenant, or another salt, is there at all.

Each question is asked in two worlds, with and without the others.  The answers must be the same, byte for byte.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any, Final

import pytest

from api_server import Api, serving
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys

PROMPT: Final = list(range(100, 140))
THEIRS: Final = list(range(200, 220))
"""How a prompt goes on that only they ask for."""
KEYS: Final = list(prompt_keys(pack_tokens(PROMPT), 4))
HASHES: Final = [1000 + block for block in range(10)]
NAMES: Final = ["mine", "twin", "theirs", "their-alias", "theirs:8000", "tcp://theirs:5557", "lake", "thers"]
"""Ours, one that both have, and names of theirs in every form."""

POSTED: Final[dict[str, list[dict[str, Any]]]] = {
    "/v1/match": [{"tokens": PROMPT, "candidates": NAMES, "by_rank": True, "order": "expected"}, {"keys": KEYS}],
    "/v1/match/batch": [{"prompts": [{"tokens": PROMPT}, {"keys": KEYS}], "candidates": NAMES}],
    "/v1/keys": [{"tokens": PROMPT}],
    "/v1/explain": [
        {"tokens": PROMPT, "candidates": NAMES},
        {"tokens": PROMPT},
        {"tokens": PROMPT, "block_size": 8},
        {"tokens": PROMPT, "model": "their-model"},
        {"tokens": PROMPT, "model": "their-mode"},
    ],
    "/v1/routed": [{"tokens": PROMPT, "instance": name} for name in NAMES],
    "/v1/blocks/locate": [
        {"keys": KEYS},
        {"keys": KEYS, "near": "theirs"},
        *({"hashes": HASHES, "instance": name} for name in NAMES),
        {"hashes": HASHES, "source": "tcp://theirs:5557"},
    ],
    "/v1/offload/plan": [{"instance": name, "tier": "gpu", "hashes": HASHES} for name in NAMES],
    "/v1/feedback": [{"instance": name, "predicted_tokens": 40, "cached_tokens": 0} for name in NAMES],
    "/query": [{"token_ids": PROMPT}, {"token_ids": PROMPT, "instance_id": "theirs"}],
    "/query_by_hash": [{"seq_hashes": KEYS}],
}
VIEWS: Final = (
    *("/v1/heat/prefixes", "/v1/heat/single", "/v1/heat/prewarm?instance=twin", "/v1/heat/prewarm?instance=theirs"),
    *("/v1/changes", "/v1/tiers", "/v1/sources", "/workers"),
)
WITHOUT_SALT: Final = ("/v1/feedback", "/v1/tiers", "/v1/sources", "/workers")
"""Routes that look at all deployments of a tenant."""
WHOLE: Final = "totals"
"""Of the answer to /v1/sources: counters of the whole service, for who may see all of it."""

OF_THE_HOUR: Final = re.compile(r'"(asked_per_minute|heat)":[\d.]+')
"""Figures that fade with time."""

Said = dict[str, Any]


def world(api: Api, others: Said | None, mine: Said) -> None:
    """Our sources, and the others': a pod of the same name, the blocks that are asked for, and all that is hot."""
    for name in ("mine", "twin"):
        api.store(api.add(name, **mine), [1] * 8, first=3)
    if others is None:
        return
    fields = {**mine, **others}
    aliases = ("their-alias", "theirs:8000")
    api.store(api.add("theirs", aliases=aliases, **fields), PROMPT)
    api.store("tcp://theirs:5557", [*PROMPT[:20], *THEIRS], first=2)
    api.store(api.add("twin", port=5558, rank=1, **fields), PROMPT[:8])
    lake = api.add("lake", type="store", tier="remote", readers=("theirs",), **fields)
    api.store(lake, PROMPT[:20], medium=None)
    if others.get("additional_salt") is None or "tenant" in others:  # a tenant may know its models, salts or not
        eight: Said = {**fields, "model": "their-model", "block_size": 8}
        api.store(api.add("theirs", port=5559, **eight), PROMPT, block_size=8)
    asking = {name: value for name, value in fields.items() if value is not None}
    for _ in range(4):
        api.post("/v1/match", {"model": "m", "tokens": [*PROMPT[:20], *THEIRS], **asking})
    api.post("/v1/routed", {"model": "m", "instance": "theirs", "tokens": PROMPT, "ttl_s": 60, **asking})


def asked(api: Api, mine: Said, *, salted: bool) -> dict[str, Any]:
    """Everything that can be asked, and what was answered."""
    answers: dict[str, Any] = {}
    for path, bodies in POSTED.items():
        for body in bodies:
            about = dict(mine) if path != "/v1/feedback" else {"tenant": mine["tenant"]}
            if path.startswith("/query"):
                about["tenant_id"] = about.pop("tenant")
            if path not in ("/v1/offload/plan", "/v1/feedback"):
                about["model"] = "m"
            if not (salted and path in WITHOUT_SALT):
                response = api.client.post(path, json={**about, **body})
                answers[f"{path} {body}"] = (response.status_code, OF_THE_HOUR.sub("", response.text))
    for path in VIEWS:
        if salted and path in WITHOUT_SALT:
            continue
        parameters = {"model": "m", **mine} if "?" not in path else {}
        url = path if "?" not in path else "&".join([path, "model=m", *(f"{name}={mine[name]}" for name in mine)])
        if path == "/workers":
            parameters = {"tenant_id": mine["tenant"]}
        with api.client.stream("GET", url, params=parameters or None) as response:
            if path == "/v1/changes":
                answers[path] = list(takewhile(lambda line: line != "event: position", response.iter_lines()))
                continue
            response.read()
        text = OF_THE_HOUR.sub("", response.text)
        answers[path] = (response.status_code, {**response.json(), WHOLE: 0} if path == "/v1/sources" else text)
    return answers


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"tenant": "us"}, {"tenant": "them"}),
        ({"tenant": "default"}, {"tenant": "them", "additional_salt": "pepper"}),
        ({"tenant": "us", "additional_salt": "mint"}, {"additional_salt": "pepper"}),
        ({"tenant": "us", "additional_salt": ""}, {"additional_salt": "pepper"}),
    ],
    ids=["tenant", "default tenant", "salt", "no salt"],
)
def test_trap_27_no_answer_shows_that_others_are_there(mine: Said, others: Said) -> None:
    said = []
    for there in (None, others):
        with serving() as api:
            world(api, there, mine)
            said.append(asked(api, mine, salted="tenant" not in others))
    alone, among_others = said
    assert len(alone) > 40
    for question, answer in alone.items():
        assert among_others[question] == answer, question


def test_the_same_questions_show_what_is_ones_own() -> None:
    """The test before this one would not notice a service that says nothing."""
    mine = {"tenant": "us"}
    with serving() as api:
        world(api, None, mine)
        without = asked(api, mine, salted=False)
    with serving() as api:
        world(api, {}, mine)
        answers = asked(api, mine, salted=False)
    same = {re.split("[ ?]", question)[0] for question in answers if answers[question] == without[question]}
    different = {re.split("[ ?]", question)[0] for question in answers if answers[question] != without[question]}
    assert same - different == {"/v1/keys"}
