"""Block keys: golden numbers, the standard they share with others, and what the chain promises."""

from __future__ import annotations

from itertools import pairwise
from struct import pack

import pytest
import xxhash
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvindexer.api.decoding import unsigned
from kvindexer.tokenization.blocks import (
    SEED,
    chain_keys,
    keys_from_locals,
    link,
    local_hashes,
    pack_tokens,
    prompt_keys,
)

TOKENS = range(1, 41)
"""Two full blocks of 16 and a tail of 8."""
ODD_TOKENS = [0] * 4 + [2**32 - 1] * 4 + [151643, 7, 128000, 1]
"""Three blocks of 4: the smallest and the largest id, and some of real vocabularies."""

# Locals as given by `dynamo.llm.compute_block_hash_for_seq(tokens, block_size)` of ai-dynamo-runtime 1.6.1. Dynamo
# and RFC #1527 chain them by XXH3-64 of (key before, local), both little-endian u64, seed 1337, the first key being
# the first local: the keys below were computed so, with xxhash alone (see `by_hand`).
GOLDEN = [
    (
        TOKENS,
        16,
        [16863443419780771464, 2287610619914608821],
        [16863443419780771464, 12466389667045779788],
    ),
    (
        ODD_TOKENS,
        4,
        [13277122834585657784, 12410542959481710713, 9569377004497804489],
        [13277122834585657784, 18181746249547481049, 4719433859513486437],
    ),
]

prompts = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=40)
sizes = st.integers(1, 8)
locals_of_any_sign = st.lists(st.integers(-(2**63), 2**64 - 1), max_size=12)
thorough = hypothesis_settings(max_examples=300, deadline=None, derandomize=True)


def by_hand(tokens: list[int], block_size: int) -> tuple[list[int], list[int]]:
    """Locals and keys from nothing but xxhash and struct."""
    locals_: list[int] = []
    keys: list[int] = []
    for begin in range(0, len(tokens) // block_size * block_size, block_size):
        block = tokens[begin : begin + block_size]
        locals_.append(xxhash.xxh3_64(pack(f"<{block_size}I", *block), seed=1337).intdigest())
        linked = pack("<QQ", keys[-1], locals_[-1]) if keys else b""
        keys.append(xxhash.xxh3_64(linked, seed=1337).intdigest() if keys else locals_[-1])
    return locals_, keys


@pytest.mark.parametrize(("tokens", "block_size", "locals_", "keys"), GOLDEN, ids=["two blocks", "odd tokens"])
def test_golden_keys(tokens: list[int], block_size: int, locals_: list[int], keys: list[int]) -> None:
    """Without extras the locals are Dynamo's block hashes, the keys RFC #1527's rolling sequence hashes."""
    packed = pack_tokens(tokens)
    assert local_hashes(packed, block_size) == locals_
    assert prompt_keys(packed, block_size) == keys
    assert keys_from_locals(locals_) == keys
    assert by_hand(list(tokens), block_size) == (locals_, keys)
    assert SEED == 1337


def test_golden_keys_with_extras() -> None:
    """A block's extras stand behind its tokens, and every later key depends on them."""
    extras = {0: bytes.fromhex("01020000006c61060100000073"), 1: bytes.fromhex("01020000006c61")}
    packed = pack_tokens(TOKENS)
    assert local_hashes(packed, 16, extras) == [1876944130543712599, 16812571946072714596]
    assert prompt_keys(packed, 16, extras) == [1876944130543712599, 9692796100084432064]
    first, second = (
        xxhash.xxh3_64(pack("<16I", *range(begin, begin + 16)) + extras[block], seed=1337).intdigest()
        for block, begin in enumerate((1, 17))
    )
    assert (first, second) == (1876944130543712599, 16812571946072714596)
    assert xxhash.xxh3_64(pack("<QQ", first, second), seed=1337).intdigest() == 9692796100084432064


@thorough
@given(prompts, sizes)
@example([], 1)
def test_keys_equal_the_naive_computation(tokens: list[int], block_size: int) -> None:
    """The fast paths and the definition agree for every prompt, block size and tail."""
    packed = pack_tokens(tokens)
    locals_, keys = by_hand(tokens, block_size)
    assert local_hashes(packed, block_size) == local_hashes(packed, block_size, {}) == locals_
    # extras of another block than any of these take the other path, and add nothing
    assert local_hashes(packed, block_size, {99: b"x"}) == locals_
    assert prompt_keys(packed, block_size) == keys


def test_packed_tokens_are_little_endian_u32() -> None:
    assert pack_tokens([1, 256, 2**32 - 1]) == bytes.fromhex("01000000 00010000 ffffffff")
    assert pack_tokens([]) == b""
    assert pack_tokens(iter((7, 8))) == pack_tokens((7, 8)) == pack_tokens([7, 8])


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, -(2**63)])
def test_tokens_out_of_range_raise(token: int) -> None:
    """An id that is no u32 is never wrapped into another token's."""
    with pytest.raises(OverflowError):
        pack_tokens([1, token])


@pytest.mark.parametrize("token", [1.0, "1", None, b"1"], ids=repr)
def test_tokens_that_are_no_integers_raise(token: object) -> None:
    with pytest.raises(TypeError):
        pack_tokens([1, token])  # type: ignore[list-item]


@pytest.mark.parametrize("count", range(9))
def test_trap_3_a_partial_tail_has_no_key(count: int) -> None:
    """Only full blocks have keys, and the tail does not touch them; shorter than one block means none."""
    keys = prompt_keys(pack_tokens(range(8)), 4)
    assert prompt_keys(pack_tokens(range(count)), 4) == keys[: count // 4]


def test_nothing_has_no_keys() -> None:
    assert local_hashes(b"", 16) == []
    assert prompt_keys(b"", 16) == keys_from_locals([]) == []
    assert chain_keys(None, []) == chain_keys(5, []) == []


@pytest.mark.parametrize(
    "locals_", [[-1, 2**63], [2**63, -1], [1, -1, 2**64 - 1], [1, 2**64], [-(2**63) - 1], [2**64]]
)
def test_locals_are_all_signed_or_all_unsigned(locals_: list[int]) -> None:
    """What is neither is never taken for another hash."""
    with pytest.raises(OverflowError):
        keys_from_locals(locals_)


@thorough
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 12), st.none() | st.integers(0, 2**64 - 1))
def test_trap_3_a_chain_goes_on_behind_its_parent(locals_: list[int], cut: int, parent: int | None) -> None:
    """A prompt stored in several events, each behind the last key of the one before, has the keys of the whole."""
    whole = chain_keys(parent, locals_)
    head = chain_keys(parent, locals_[:cut])
    assert head + chain_keys(head[-1] if head else parent, locals_[cut:]) == whole
    assert whole[1:] == [link(before, local) for before, local in zip(whole, locals_[1:], strict=False)]
    if parent is not None:
        assert whole[:1] == [link(parent, local) for local in locals_[:1]]


def test_a_parent_of_zero_is_a_parent() -> None:
    """Key 0 is as good as any other: only None begins a prompt."""
    assert chain_keys(0, [7]) == [link(0, 7)] != chain_keys(None, [7])


@thorough
@given(locals_of_any_sign)
@example([-1, -(2**63)])
def test_signed_and_unsigned_locals_are_the_same(locals_: list[int]) -> None:
    """Clients in languages without unsigned integers send the same bits with a sign."""
    expected = [local % 2**64 for local in locals_]
    assert unsigned(locals_, "block_hashes") == expected
    assert keys_from_locals(expected) == chain_keys(None, expected)
    signed = [local - 2**64 if local >= 2**63 else local for local in expected]
    assert keys_from_locals(signed) == chain_keys(None, expected)


@thorough
@given(prompts, prompts, sizes)
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(head: list[int], tail: list[int], block_size: int) -> None:
    """What a pod holds of a prompt is found for every longer prompt."""
    keys = prompt_keys(pack_tokens(head + tail), block_size)
    assert prompt_keys(pack_tokens(head), block_size) == keys[: len(head) // block_size]


@thorough
@given(prompts, sizes, st.data())
def test_a_changed_token_changes_all_keys_from_its_block_on(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    """Equal blocks behind different prefixes are different blocks; keys before the change stay."""
    assume(tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:place], data.draw(st.integers(0, 2**32 - 1)), *tokens[place + 1 :]]
    assume(other != tokens)
    before = prompt_keys(pack_tokens(tokens), block_size)
    after = prompt_keys(pack_tokens(other), block_size)
    same = [one == another for one, another in zip(before, after, strict=True)]
    assert same == [block < place // block_size for block in range(len(before))]


@thorough
@given(prompts, sizes, st.data())
def test_changed_extras_change_all_keys_from_their_block_on(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    """The same holds for what a block depends on beside its tokens."""
    blocks = len(tokens) // block_size
    assume(blocks)
    block = data.draw(st.integers(0, blocks - 1))
    before = prompt_keys(pack_tokens(tokens), block_size)
    after = prompt_keys(pack_tokens(tokens), block_size, {block: data.draw(st.binary(min_size=1, max_size=8))})
    assert [one == another for one, another in zip(before, after, strict=True)] == [
        number < block for number in range(blocks)
    ]


def test_equal_blocks_have_equal_locals_and_different_keys() -> None:
    """A local names a block's content, a key its place in a prompt too."""
    packed = pack_tokens([5, 6] * 4)
    assert len(set(local_hashes(packed, 2))) == 1
    keys = prompt_keys(packed, 2)
    assert all(one != another for one, another in pairwise(keys))
    assert len(set(keys)) == 4


def test_another_block_size_gives_other_keys() -> None:
    """The same prompt in blocks of another size shares no key: such keyspaces never match."""
    packed = pack_tokens(TOKENS)
    assert not set(prompt_keys(packed, 8)) & set(prompt_keys(packed, 16))


def test_a_block_size_of_zero_is_refused() -> None:
    """Placeholders have it on the wire; as a divisor it must not pass silently."""
    with pytest.raises(ValueError, match="must not be zero"):
        local_hashes(pack_tokens(TOKENS), 0)
