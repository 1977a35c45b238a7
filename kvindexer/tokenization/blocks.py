"""Tokens -> block keys: the canonical 64-bit name of a block at its place in a prompt.

    local_i = XXH3_64( tokens of block i, little-endian u32 || extras_i ,  seed 1337 )
    key_0   = local_0
    key_i   = XXH3_64( key_{i-1}, little-endian u64 || local_i, little-endian u64 ,  seed 1337 )

Without extras these are the rolling hashes of RFC #1527 (Mooncake Conductor, NVIDIA Dynamo): their sequence
hashes are our keys, their block hashes our locals.  Only full blocks have keys; a partial tail is dropped.
`tokenization.extras` says what extras are and how they become bytes.

Invariant: inside a keyspace (one block size) equal keys mean equal tokens and extras, here and in every block
before, up to collisions of 64 bits.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

SEED: Final = 1337
TOKEN_BYTES: Final = 4

_pack_link = Struct("<QQ").pack
_BIG_ENDIAN: Final = sys.byteorder == "big"


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32.

    Raises OverflowError for an id outside 0 .. 2**32-1 and TypeError for one that is no integer.
    """
    packed = array("I", tokens)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def local_hashes(tokens: bytes, block_size: int, extras: Mapping[int, bytes] | None = None) -> list[int]:
    """Hash of each full block's tokens and extras, wherever the block stands.

    `tokens` are packed (`pack_tokens`), `extras` maps a block's number to its encoded extras.
    """
    width = block_size * TOKEN_BYTES
    ends = range(width, len(tokens) + 1, width)
    if not extras:
        return [xxh3_64_intdigest(tokens[end - width : end], SEED) for end in ends]
    return [
        xxh3_64_intdigest(tokens[end - width : end] + extras.get(block, b""), SEED) for block, end in enumerate(ends)
    ]


def chain_keys(parent: int | None, locals_: Sequence[int]) -> list[int]:
    """Block keys of consecutive blocks, given their local hashes and the key of the block before them."""
    if not locals_:
        return []
    keys = []
    if parent is None:
        key = locals_[0]
        keys.append(key)
        locals_ = locals_[1:]
    else:
        key = parent
    for local in locals_:
        key = xxh3_64_intdigest(_pack_link(key, local), SEED)
        keys.append(key)
    return keys


def link(parent: int, local: int) -> int:
    """Block key of one block behind the block with key `parent`."""
    return xxh3_64_intdigest(_pack_link(parent, local), SEED)


def prompt_keys(tokens: bytes, block_size: int, extras: Mapping[int, bytes] | None = None) -> array[int]:
    """Block keys of all full blocks of a prompt, as `array("Q")`; `tokens` are packed."""
    return array("Q", chain_keys(None, local_hashes(tokens, block_size, extras)))


def keys_from_locals(locals_: array[int]) -> array[int]:
    """Block keys of a prompt whose local hashes the caller has (Dynamo's `block_hashes`), as `array("Q")`."""
    return array("Q", chain_keys(None, locals_))


__all__ = [
    "SEED",
    "TOKEN_BYTES",
    "chain_keys",
    "keys_from_locals",
    "link",
    "local_hashes",
    "pack_tokens",
    "prompt_keys",
]
