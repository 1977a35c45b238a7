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

import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

SEED: Final = 1337
TOKEN_BYTES: Final = 4

_pack_link: Final = struct.Struct("<QQ").pack
_pack_signed_link: Final = struct.Struct("<Qq").pack
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
    if not width:
        raise ValueError("block_size must not be zero")
    blocks = struct.iter_unpack(f"{width}s", tokens[: len(tokens) // width * width])
    if not extras:
        return [xxh3_64_intdigest(block, SEED) for (block,) in blocks]
    return [xxh3_64_intdigest(block + extras.get(number, b""), SEED) for number, (block,) in enumerate(blocks)]


def chain_keys(parent: int | None, locals_: Sequence[int]) -> list[int]:
    """Block keys of consecutive blocks, given their local hashes and the key of the block before them."""
    if not locals_:
        return []
    if parent is None:
        return [locals_[0], *_links(locals_[0], locals_[1:], _pack_link)]
    return _links(parent, locals_, _pack_link)


def link(parent: int, local: int) -> int:
    """Block key of one block behind the block with key `parent`."""
    return xxh3_64_intdigest(_pack_link(parent, local), SEED)


def prompt_keys(tokens: bytes, block_size: int, extras: Mapping[int, bytes] | None = None) -> list[int]:
    """Block keys of all full blocks of a prompt; `tokens` are packed."""
    return chain_keys(None, local_hashes(tokens, block_size, extras))


def keys_from_locals(locals_: Sequence[int]) -> list[int]:
    """Block keys of a prompt whose local hashes the caller has (Dynamo's `block_hashes`).

    All of them are unsigned, or all of them signed 64-bit integers: raises OverflowError otherwise.
    """
    if not locals_:
        return []
    for pack in (_pack_link, _pack_signed_link):
        try:
            first = int.from_bytes(pack(0, locals_[0])[8:], "little")
            return [first, *_links(first, locals_[1:], pack)]
        except struct.error:
            pass
    raise OverflowError


def _links(key: int, locals_: Sequence[int], pack: Callable[[int, int], bytes]) -> list[int]:
    """The keys of blocks that follow the block with this key."""
    return [key := xxh3_64_intdigest(pack(key, local), SEED) for local in locals_]


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
