"""Extras of blocks: golden bytes, no two lists alike, and events that agree with queries about every block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from struct import pack, unpack_from
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.tokenization.extras import MultimodalItem, _Tag, event_extras, lora_extras, prompt_extras

LORA_NAME, LORA_ID, MULTIMODAL, PROMPT_EMBEDS, BARE, SALT = range(1, 7)

DOCS = Path(__file__).parent.parent / "docs" / "extras.md"

thorough = hypothesis_settings(max_examples=400, deadline=None, derandomize=True)

# Golden bytes: tag, length as little-endian u32, payload; an image's payload begins with its offset as i64.
LA = bytes.fromhex("01 02000000 6c61")
ID_7 = bytes.fromhex("02 01000000 37")
IMAGE_AT_5 = bytes.fromhex("03 0b000000 0500000000000000 696d67")
IMAGE_BEFORE = bytes.fromhex("03 0b000000 fdffffffffffffff 696d67")
DIGEST = bytes.fromhex("04 02000000 dead")
BARE_X = bytes.fromhex("05 01000000 78")
SALT_S = bytes.fromhex("06 01000000 73")
SALT_LA = bytes.fromhex("06 02000000 6c61")
SALT_UTF8 = bytes.fromhex("06 02000000 c3bc")


def of_event(
    keys: Sequence[object] | None, lora: str | None = None, lora_id: int | None = None, *, first: bool = True
) -> bytes:
    return event_extras(keys, lora, lora_extras(lora, lora_id), first=first)


# The bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoded", "golden"),
    [
        (of_event(None), b""),
        (of_event([]), b""),
        (of_event(["la"], "la"), LA),
        (of_event(None, "la"), LA),
        (of_event(None, None, 7), ID_7),
        (of_event(None, "la", 7), LA),
        (of_event([["img", 5]]), IMAGE_AT_5),
        (of_event([("img", -3)]), IMAGE_BEFORE),
        (of_event([["img", -3]], first=False), IMAGE_BEFORE),
        (of_event([b"\xde\xad"]), DIGEST),
        (of_event(["x"], first=False), BARE_X),
        (of_event(["s"]), SALT_S),
        (of_event(["ü"]), SALT_UTF8),
        (of_event(["x", "s"]), BARE_X + SALT_S),
        (of_event(["la", ["img", 5], "s", b"\xde\xad"], "la"), LA + IMAGE_AT_5 + DIGEST + SALT_S),
        (of_event(["s"], None, 7), ID_7 + SALT_S),
    ],
    ids=str,
)
def test_golden_bytes_of_events(encoded: bytes, golden: bytes) -> None:
    """Each tag, and the order in which they stand; a change here makes every stored key void."""
    assert encoded == golden


def test_golden_bytes_of_queries() -> None:
    """The same tags from what a caller says, in every block that they belong to and in no other."""
    image = MultimodalItem("img", 5, 6)
    assert prompt_extras(3, 4) == {}
    assert prompt_extras(3, 4, lora="la") == {0: LA, 1: LA, 2: LA}
    assert prompt_extras(3, 4, cache_salt="s") == {0: SALT_S}
    assert prompt_extras(3, 4, lora="la", cache_salt="s") == {0: LA + SALT_S, 1: LA, 2: LA}
    assert prompt_extras(2, 8, multimodal=[image]) == {0: IMAGE_AT_5, 1: IMAGE_BEFORE}
    assert prompt_extras(2, 8, lora="la", cache_salt="s", multimodal=[image]) == {
        0: LA + IMAGE_AT_5 + SALT_S,
        1: LA + IMAGE_BEFORE,
    }


def test_no_full_block_has_no_extras() -> None:
    """Trap 12: a prompt shorter than a block has no block to which anything could belong."""
    assert prompt_extras(0, 16, lora="la", cache_salt="s", multimodal=[MultimodalItem("img", 0, 5)]) == {}


def test_the_docs_list_every_tag() -> None:
    """The table of `docs/extras.md` has the tags of the code, in their order."""
    rows = re.findall(r"^\| (\d) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(map(int, rows)) == [tag.value for tag in _Tag] == list(range(1, 7))


# No two lists alike ----------------------------------------------------------------------------------------------


class Scope(NamedTuple):
    """What a block depends on beside its tokens, as it may be read back from the bytes."""

    lora: str | None = None
    lora_id: int | None = None
    images: tuple[tuple[str, int], ...] = ()
    digests: tuple[bytes, ...] = ()
    bare: tuple[str, ...] = ()
    salt: str | None = None

    def encoded(self) -> bytes:
        """As the event of a block spells it, in vLLM's order."""
        keys: list[object] = [] if self.lora is None else [self.lora]
        keys += [*self.bare, *(list(image) for image in self.images)]
        keys += [] if self.salt is None else [self.salt]
        keys += self.digests
        return of_event(keys, self.lora, self.lora_id, first=self.salt is not None)


def read_back(encoded: bytes) -> Scope:
    """What the bytes say, by the documented layout alone."""
    found: dict[int, list[bytes]] = {tag: [] for tag in range(1, 7)}
    place = newest = 0
    while place < len(encoded):
        tag, length = unpack_from("<BI", encoded, place)
        assert tag >= newest, "items stand in the order of their tags"
        newest, place = tag, place + 5 + length
        found[tag].append(encoded[place - length : place])
    assert place == len(encoded)
    assert max(map(len, (found[LORA_NAME] + found[LORA_ID], found[SALT]))) <= 1
    return Scope(
        next((each.decode() for each in found[LORA_NAME]), None),
        next((int(each) for each in found[LORA_ID]), None),
        tuple((each[8:].decode(), unpack_from("<q", each)[0]) for each in found[MULTIMODAL]),
        tuple(found[PROMPT_EMBEDS]),
        tuple(each.decode() for each in found[BARE]),
        next((each.decode() for each in found[SALT]), None),
    )


# Texts that look like the layout: headers of other items, lengths, and pieces that can move between neighbours.
pieces = st.sampled_from(["", "a", "b", "la", "\0", "\1\2\0\0\0la", "\6\1\0\0\0s", "\3\x0b\0\0\0", "\xff", "s"])
texts = st.lists(pieces, max_size=3).map("".join) | st.text(max_size=4)
offsets = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
adapters = st.tuples(st.none() | texts, st.none()) | st.tuples(st.none(), st.integers(0, 2**64 - 1))


@st.composite
def scopes(draw: st.DrawFn) -> Scope:
    """Any scope that an event can have: an adapter has a name or, in old versions, only an id."""
    lora, lora_id = draw(adapters)
    return Scope(
        lora,
        lora_id,
        tuple(draw(st.lists(st.tuples(texts, offsets), max_size=3))),
        tuple(draw(st.lists(st.binary(max_size=4) | texts.map(str.encode), max_size=2))),
        tuple(draw(st.lists(texts, max_size=2))),
        draw(st.none() | texts),
    )


@thorough
@given(scopes())
@example(Scope(lora="la", bare=("la",), salt="la"))
@example(Scope(images=(("\3\x0b\0\0\0", 0), ("", 1))))
def test_what_was_encoded_can_be_read_back(scope: Scope) -> None:
    """Every list of extras is recoverable from its bytes, so no two lists give the same."""
    assert read_back(scope.encoded()) == scope


@thorough
@given(scopes(), scopes())
def test_no_two_scopes_encode_equally(one: Scope, another: Scope) -> None:
    """The same, said of pairs."""
    assert (one.encoded() == another.encoded()) == (one == another)


LOOK_ALIKES = [
    Scope(),
    Scope(lora=""),
    Scope(lora="la"),
    Scope(salt=""),
    Scope(salt="la"),
    Scope(bare=("la",)),
    Scope(lora="la", salt="la"),
    Scope(lora="la", bare=("la",)),
    Scope(lora="la", bare=("la",), salt="la"),
    Scope(lora="lala"),
    Scope(salt="lala"),
    Scope(lora="l", salt="ala"),
    Scope(bare=("la", "la")),
    Scope(bare=("l", "ala")),
    Scope(bare=("lala",)),
    Scope(lora_id=1),
    Scope(lora="1"),
    Scope(salt="1"),
    Scope(digests=(b"la",)),
    Scope(digests=(b"l", b"a")),
    Scope(images=(("la", 0),)),
    Scope(images=(("la", 1),)),
    Scope(images=(("la", -1),)),
    Scope(images=(("l", 0), ("a", 0))),
    Scope(images=(("a", 0), ("l", 0))),
    Scope(images=(("", 0),)),
    Scope(salt="\3\x08\0\0\0" + "\0" * 8),
    Scope(lora="la", salt="\1\2\0\0\0la"),
]


def test_trap_9_look_alikes_share_no_key() -> None:
    """Salt, LoRA, images, digests and ids of the same text, or with bytes moved between neighbours: no match."""
    packed = pack_tokens(range(8))
    keys = [set(prompt_keys(packed, 4, {0: scope.encoded()})) for scope in LOOK_ALIKES]
    for one, another in combinations(range(len(keys)), 2):
        assert not keys[one] & keys[another], (LOOK_ALIKES[one], LOOK_ALIKES[another])


@thorough
@given(st.lists(texts, min_size=2, max_size=4), st.data())
def test_moving_bytes_between_neighbours_changes_the_bytes(names: list[str], data: st.DataObject) -> None:
    """The same letters, cut into items at other places, are other extras."""
    joined = "".join(names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), min_size=len(names) - 1, max_size=len(names) - 1)))
    others = [joined[a:b] for a, b in zip([0, *cuts], [*cuts, len(joined)], strict=True)]
    assert (Scope(bare=tuple(names)).encoded() == Scope(bare=tuple(others)).encoded()) == (names == others)


@pytest.mark.parametrize(
    "moved", [MultimodalItem("img", 9, 3), MultimodalItem("img", 7, 3), MultimodalItem("img", 12, 3)]
)
def test_trap_9_an_image_elsewhere_is_another_prompt(moved: MultimodalItem) -> None:
    """The same placeholder tokens with the image one token further, or a block away, share no key from there on."""
    packed = pack_tokens([5] * 20)
    here = prompt_keys(packed, 4, prompt_extras(5, 4, multimodal=[MultimodalItem("img", 8, 3)]))
    there = prompt_keys(packed, 4, prompt_extras(5, 4, multimodal=[moved]))
    first = min(moved.offset, 8) // 4
    assert [one == another for one, another in zip(here, there, strict=True)] == [block < first for block in range(5)]


# Events and queries agree ----------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A query, and a block's event of the same prompt."""

    blocks: int
    block_size: int
    items: list[MultimodalItem]
    salt: str | None
    lora: str | None

    def asked(self) -> list[bytes]:
        """Extras of each block, from the query."""
        extras = prompt_extras(
            self.blocks, self.block_size, lora=self.lora, cache_salt=self.salt, multimodal=self.items
        )
        assert b"" not in extras.values()
        assert extras.keys() <= set(range(self.blocks))
        return [extras.get(block, b"") for block in range(self.blocks)]

    def extra_keys(self, block: int, version: tuple[int, int]) -> list[object] | None:
        """What vLLM of that version puts into a BlockStored for one block."""
        start, end = block * self.block_size, (block + 1) * self.block_size
        keys: list[object] = [] if self.lora is None else [self.lora]
        keys += [
            item.hash if version < (0, 19) else [item.hash, item.offset - start]
            for item in self.items
            if item.offset < end and start < item.offset + item.length
        ]
        keys += [self.salt] if self.salt is not None and block == 0 else []
        return keys or None

    def stored(self, version: tuple[int, int] = (0, 33)) -> list[bytes]:
        """Extras of each block, from the engine's events."""
        blocks = range(self.blocks)
        return [of_event(self.extra_keys(block, version), self.lora, first=block == 0) for block in blocks]


names = st.sampled_from(["la", "lb", "s", "img", ""]) | st.text(max_size=3)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Prompts with images that follow one another, some across several blocks, some beyond the last full one."""
    items, place = [], 0
    for _ in range(draw(st.integers(0, 4))):
        place += draw(st.integers(0, 9))
        length = draw(st.integers(1, 20))
        items.append(MultimodalItem(draw(names), place, length))
        place += length
    return Prompt(
        draw(st.integers(0, 8)), draw(st.integers(1, 8)), items, draw(st.none() | names), draw(st.none() | names)
    )


@thorough
@given(prompts())
@example(Prompt(2, 4, [], "la", "la"))
@example(Prompt(2, 4, [MultimodalItem("la", 0, 8)], "la", "la"))
def test_trap_9_events_and_queries_agree(prompt: Prompt) -> None:
    """For LoRA, salt and images, alone and together, of the same text or not: the same bytes in every block."""
    assert prompt.stored() == prompt.asked()


@thorough
@given(prompts(), st.permutations(range(4)))
def test_the_order_in_which_a_caller_lists_images_is_free(prompt: Prompt, order: list[int]) -> None:
    """Images stand in the order of the prompt, however the query lists them."""
    shuffled = [prompt.items[place] for place in order if place < len(prompt.items)]
    assert prompt._replace(items=shuffled).asked() == prompt.asked()


def test_trap_9_only_the_first_occurrence_of_the_lora_is_left_out() -> None:
    """A salt with the LoRA's name survives; without a salt the repeated name leaves no trace."""
    assert of_event(["la", "la"], "la") == LA + SALT_LA
    assert of_event(["la"], "la") == LA
    assert of_event(["la"], "lb") == lora_extras("lb") + SALT_LA
    assert of_event(["la"]) == SALT_LA


def test_an_image_across_blocks_counts_from_each_blocks_start() -> None:
    """One image of 10 tokens from token 3 in blocks of 4: offsets 3, -1, -5 and -9, then none."""
    encoded = prompt_extras(5, 4, multimodal=[MultimodalItem("i", 3, 10)])
    assert encoded == {block: pack("<BIq", 3, 9, 3 - 4 * block) + b"i" for block in range(4)}
    assert Prompt(5, 4, [MultimodalItem("i", 3, 10)], None, None).stored() == [*encoded.values(), b""]


@pytest.mark.parametrize("version", [(0, 17), (0, 18)])
def test_trap_9_images_without_an_offset_match_neither_images_nor_plain_blocks(version: tuple[int, int]) -> None:
    """A bare string of vLLM 0.17 and 0.18 may be an image or something unknown: blocks with it match no query."""
    image = MultimodalItem("img", 5, 6)
    stored = Prompt(3, 4, [image], "s", "la").stored(version)
    queries = {
        "with the image": Prompt(3, 4, [image], "s", "la"),
        "without": Prompt(3, 4, [], "s", "la"),
        "image as salt": Prompt(3, 4, [], "img", "la"),
        "image as LoRA": Prompt(3, 4, [], "s", "img"),
    }
    assert stored[0] == queries["with the image"].asked()[0]
    for name, query in queries.items():
        assert not set(stored[1:]) & set(query.asked()), name


@pytest.mark.parametrize("version", [(0, 17), (0, 18)])
def test_trap_9_a_bare_image_in_the_first_block_is_taken_for_a_salt(version: tuple[int, int]) -> None:
    """Those versions spell both alike there: only a query that names the image's hash as its salt matches."""
    image = MultimodalItem("img", 1, 2)
    stored = Prompt(1, 4, [image], None, None).stored(version)
    assert stored != Prompt(1, 4, [image], None, None).asked()
    assert stored != Prompt(1, 4, [], None, None).asked()
    assert stored == Prompt(1, 4, [], "img", None).asked()
    with_salt = Prompt(1, 4, [image], "s", None).stored(version)
    for salt in ("s", "img", None):
        for items in ([image], []):
            assert with_salt != Prompt(1, 4, items, salt, None).asked()


@thorough
@given(st.integers(0, 2**64 - 1), st.none() | texts, st.none() | texts)
@example(1, "1", None)
def test_trap_9_a_lora_without_a_name_equals_no_query(lora_id: int, lora: str | None, salt: str | None) -> None:
    """Below vLLM 0.14: neither the base model nor any adapter, whatever its name; but itself, and its salt's."""
    for first in (True, False):
        stored = of_event([salt] if first and salt is not None else None, None, lora_id, first=first)
        assert stored not in Prompt(2, 4, [], salt, lora).asked()
        assert stored.startswith(lora_extras(None, lora_id))
    assert lora_extras(None, lora_id) != lora_extras(None, lora_id + 1)


def test_a_name_is_worth_more_than_an_id() -> None:
    """Ids differ between pods; where an event has both, the name alone counts."""
    assert lora_extras("la", 1) == lora_extras("la", 2) == lora_extras("la") == LA
    assert lora_extras(None) == lora_extras(None, None) == b""
    assert lora_extras(None, 0) != b""


@thorough
@given(st.binary(max_size=40), prompts())
def test_prompt_embeddings_match_no_query(digest: bytes, prompt: Prompt) -> None:
    """A query has no way to name them: such a block is not mistaken for one of token ids."""
    assert of_event([digest]) not in prompt.asked()


# What can't be encoded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        None,
        7,
        1.5,
        True,
        {},
        {"img": 5},
        [],
        ["img"],
        ["img", "5"],
        ["img", 5.0],
        ["img", None],
        ["img", 5, 6],
        [5, "img"],
        [b"img", 5],
        [["img", 5]],
        ["cache_salt", "s"],
        ["lora", "la", "/path"],
        ["img", 2**63],
        ["img", -(2**63) - 1],
        "\ud800",
        ["\ud800", 5],
    ],
    ids=ascii,
)
@pytest.mark.parametrize("first", [True, False])
def test_malformed_extra_keys_raise(key: object, first: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """A key that no version sends is a ValueError, alone and among good ones; never another error, never a guess."""
    for keys in ([key], ["la", key], ["s", key], [key, "s"]):
        with pytest.raises(ValueError):  # noqa: PT011 -- its text is nobody's contract
            of_event(keys, "la", first=first)


@pytest.mark.parametrize(
    "said",
    [
        {"cache_salt": "\ud800"},
        {"lora": "\ud800"},
        {"multimodal": [MultimodalItem("\ud800", 0, 4)]},
        {"multimodal": [MultimodalItem("img", -(2**70), 2**71)]},
    ],
    ids=ascii,
)
def test_a_query_that_cannot_be_encoded_raises(said: dict[str, str]) -> None:
    """Half a surrogate pair, or an offset beyond 64 bits: a ValueError for the caller to turn into a 400."""
    with pytest.raises(ValueError):  # noqa: PT011 -- the same
        prompt_extras(4, 4, **said)  # type: ignore[arg-type]
