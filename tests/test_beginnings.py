"""Prompts of a batch that begin alike: keys are what they would be alone; what is shared is not hashed again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindexer.api import prompt as module
from kvindexer.api.beginnings import Beginnings
from kvindexer.api.prompt import KeyPrompt, TokenPrompt
from kvindexer.tokenization.blocks import TOKEN_BYTES, local_hashes, pack_tokens

TRUNK = list(range(100, 140))
PROMPTS = st.tuples(st.integers(0, 40), st.lists(st.integers(0, 3), max_size=20)).map(
    lambda parts: [*TRUNK[: parts[0]], *parts[1]]
)
SIZES = (1, 4, 16)


@given(
    prompts=st.lists(
        st.tuples(PROMPTS, st.sampled_from(({}, {}, {"lora": "tuned"}, {"cache_salt": "salt"}))), max_size=8
    )
)
def test_each_prompt_has_the_keys_that_it_has_alone(prompts: list[tuple[list[int], dict[str, Any]]]) -> None:
    """In any order, of any block size, with extras among them."""
    beginnings = Beginnings()
    for tokens, extras in prompts:
        packed = pack_tokens(tokens)
        prompt = TokenPrompt(packed, **extras)
        beginnings.meet(prompt)
        for size in SIZES:
            assert prompt.keys(size) == TokenPrompt(packed, **extras).keys(size)


def test_what_an_earlier_prompt_begins_with_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counting(tokens: bytes, block_size: int) -> list[int]:
        hashed.append(len(tokens) // TOKEN_BYTES)
        return local_hashes(tokens, block_size)

    monkeypatch.setattr(module, "local_hashes", counting)
    beginnings = Beginnings()
    for tail in ([], [7] * 8, [7, 7, 7, 7, 9, 9, 9, 9]):
        prompt = TokenPrompt(pack_tokens([*TRUNK, *tail]))
        beginnings.meet(prompt)
        prompt.keys(4)
    assert hashed == [8, 4]


def test_keys_and_prompts_with_extras_are_left_alone() -> None:
    beginnings = Beginnings()
    for prompt in (TokenPrompt(pack_tokens(TRUNK)), KeyPrompt([1, 2]), TokenPrompt(pack_tokens(TRUNK), lora="x")):
        beginnings.meet(prompt)
    assert prompt.keys(4) != TokenPrompt(pack_tokens(TRUNK)).keys(4)
