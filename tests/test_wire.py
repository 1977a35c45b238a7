"""Bytes of vLLM 0.9 to 0.33 to events, version by version.

Every frame is built here, by hand and with another msgpack library than the decoder's, from the structs of vLLM's
releases; the recordings of real engines judge the same tables.  The other publishers are in
`test_wire_dialects`, broken bytes in `test_wire_broken`.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

import recordings
from kvindexer.errors import WireError
from kvindexer.events.wire import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, decode_batch
from kvindexer.testing.packing import pack
from kvindexer.types import SourceType

Version = tuple[int, ...]

TAKEN_APART: tuple[Version, ...] = ((0, 9, 0, 1), (0, 9, 2), (0, 10, 0), (0, 10, 1), (0, 10, 2), (0, 11, 0))
VERSIONS: tuple[Version, ...] = (*TAKEN_APART, *((0, minor) for minor in range(12, 34)))
FIRST_WITH_RANK = (0, 9, 2)
FIRST_WITH_UNSIGNED_HASHES = (0, 10, 2)
FIRST_WITH_MAPS = (0, 24)

STORED_FIELDS: tuple[tuple[str, Version], ...] = (
    ("block_hashes", (0, 9)),
    ("parent_block_hash", (0, 9)),
    ("token_ids", (0, 9)),
    ("block_size", (0, 9)),
    ("lora_id", (0, 9)),
    ("medium", (0, 10, 2)),
    ("lora_name", (0, 14)),
    ("extra_keys", (0, 17)),
    ("group_idx", (0, 20)),
    ("kv_cache_spec_kind", (0, 22)),
    ("kv_cache_spec_sliding_window", (0, 22)),
    ("locality", (0, 26)),
    ("ownership", (0, 29)),
    ("session_id", (0, 30)),
    ("lookahead_token_ids", (0, 33)),
)
REMOVED_FIELDS: tuple[tuple[str, Version], ...] = (
    ("block_hashes", (0, 9)),
    ("medium", (0, 10, 2)),
    ("group_idx", (0, 20)),
    ("locality", (0, 26)),
    ("ownership", (0, 29)),
)
ALWAYS_IN_MAPS = {
    *("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
}
ARRAY_LENGTHS = {
    (0, 9): (6, 2),
    (0, 10, 2): (7, 3),
    (0, 14): (8, 3),
    (0, 17): (9, 3),
    (0, 20): (10, 4),
    (0, 22): (12, 4),
}
"""First version -> elements of a stored and of a removed array, tag included."""

HIGH = 2**64 - 2
STORED: dict[str, Any] = {
    "block_hashes": [HIGH, 7],
    "parent_block_hash": 5,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": 9,
    "medium": "GPU",
    "lora_name": "la",
    "extra_keys": [["la", ["image", -1]], None],
    "group_idx": 1,
    "kv_cache_spec_kind": "sliding_window",
    "kv_cache_spec_sliding_window": 128,
    "locality": "LOCAL",
    "ownership": "tier-1",
    "session_id": "session",
    "lookahead_token_ids": [[8], [9]],
}
REMOVED: dict[str, Any] = {
    "block_hashes": [HIGH],
    "medium": "CPU",
    "group_idx": 1,
    "locality": "REMOTE",
    "ownership": "tier-2",
}
NEUTRAL_NAMES = {
    "block_hashes": "hashes",
    "parent_block_hash": "parent",
    "token_ids": "tokens",
    "group_idx": "group",
    "kv_cache_spec_kind": "kind",
    "kv_cache_spec_sliding_window": "window",
}
NOT_FOR_US = {"session_id", "lookahead_token_ids"}

GOOD = BlockRemoved([11], "GPU")
GOOD_ARRAY = ["BlockRemoved", [11], "GPU"]


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def frame(version: Version, tag: str, values: dict[str, Any], fields: tuple[tuple[str, Version], ...]) -> Any:
    """One event as that version writes it: a full-length array, or a map without its unset defaults."""
    known = {name: values.get(name) for name, since in fields if since <= version}
    if fields and version < FIRST_WITH_UNSIGNED_HASHES:
        known["block_hashes"] = [signed(value) for value in known["block_hashes"] or []]
    if version < FIRST_WITH_MAPS:
        return [tag, *known.values()]
    always = ALWAYS_IN_MAPS if tag == "BlockStored" else {"type", "block_hashes", "medium"}
    return {"type": tag} | {name: value for name, value in known.items() if value is not None or name in always}


def message(version: Version, events: list[Any], rank: int | None = None) -> bytes:
    return pack([1700000000.5, events, rank] if version >= FIRST_WITH_RANK else [1700000000.5, events])


def neutral(version: Version, values: dict[str, Any], fields: tuple[tuple[str, Version], ...]) -> dict[str, Any]:
    """The fields of the decoded event: what the version has, under our names."""
    return {
        NEUTRAL_NAMES.get(name, name): values[name]
        for name, since in fields
        if since <= version and name not in NOT_FOR_US and values.get(name) is not None
    }


def only(value: Any, dialect: SourceType = "vllm") -> Event:
    """The event that a batch of this one wire value decodes to."""
    batch = decode_batch(pack([0.0, [value], None]), dialect)
    assert batch.skipped == {}
    (event,) = batch.events
    return event


# Trap 1: arrays, maps, both, unknown tags and fields, media, bins ------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS, ids=dotted)
def test_trap_1_every_version_of_vllm_means_the_same(version: Version) -> None:
    """One neutral store, removal and clear, as each version spells them, are decoded to all that it can say."""
    payload = message(
        version,
        [
            frame(version, "BlockStored", STORED, STORED_FIELDS),
            frame(version, "BlockRemoved", REMOVED, REMOVED_FIELDS),
            frame(version, "AllBlocksCleared", {}, ()),
        ],
        rank=3,
    )
    assert decode_batch(payload) == Batch(
        3 if version >= FIRST_WITH_RANK else None,
        [
            BlockStored(**neutral(version, STORED, STORED_FIELDS)),
            BlockRemoved(**neutral(version, REMOVED, REMOVED_FIELDS)),
            AllBlocksCleared(),
        ],
        {},
    )


@pytest.mark.parametrize("version", VERSIONS, ids=dotted)
def test_trap_1_unset_fields_read_like_absent_ones(version: Version) -> None:
    """Nil at its place in an array and an omitted key of a map both give the default."""
    stored = {"block_hashes": [1], "token_ids": [1, 2], "block_size": 2}
    payload = message(
        version,
        [
            frame(version, "BlockStored", stored, STORED_FIELDS),
            frame(version, "BlockRemoved", {"block_hashes": [1]}, REMOVED_FIELDS),
        ],
    )
    assert decode_batch(payload).events == [BlockStored([1], None, [1, 2], 2), BlockRemoved([1])]


@pytest.mark.parametrize("version", [each for each in VERSIONS if each < FIRST_WITH_MAPS], ids=dotted)
def test_trap_1_array_lengths(version: Version) -> None:
    """The tables above give the array lengths that were counted in the releases."""
    lengths = ARRAY_LENGTHS[max(since for since in ARRAY_LENGTHS if since <= version)]
    frames = (
        frame(version, "BlockStored", STORED, STORED_FIELDS),
        frame(version, "BlockRemoved", REMOVED, REMOVED_FIELDS),
    )
    assert tuple(map(len, frames)) == lengths


@pytest.mark.parametrize(
    ("name", "version"), [("pool-0.9.2", (0, 9, 2)), ("pool-0.23.0", (0, 23)), ("pool-0.33.0", (0, 33))]
)
def test_trap_1_the_tables_are_those_of_real_engines(name: str, version: Version) -> None:
    """Each recorded event has the positions, or keys, that this file builds for its version."""
    seen = set()
    for recorded in recordings.frames(name):
        for event in msgpack.unpackb(recorded.payload)[1]:
            tag = event["type"] if isinstance(event, dict) else event[0]
            fields = {"BlockStored": STORED_FIELDS, "BlockRemoved": REMOVED_FIELDS, "AllBlocksCleared": ()}[tag]
            seen.add(tag)
            if isinstance(event, dict):
                assert event == frame(version, tag, event, fields)
            else:
                names = [field for field, since in fields if since <= version]
                values = dict(zip(names, event[1:], strict=True))
                assert event == frame(version, tag, values, fields)
    assert seen == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


@pytest.mark.parametrize("name", recordings.NAMES)
def test_recorded_frames_decode_to_what_their_recorder_read(name: str) -> None:
    """Every frame of a real engine gives the events that stand beside it, in order, with nothing skipped."""
    read = [line["batch"] for line in recordings.lines(name, "decoded.jsonl")]
    for recorded, (_, events, rank) in zip(recordings.frames(name), read, strict=True):
        expected: list[Event] = []
        for event in events:
            as_map = isinstance(event, dict)
            tag = event["type"] if as_map else event[0]
            fields = STORED_FIELDS if tag == "BlockStored" else REMOVED_FIELDS
            # positions of an older version are the first of the newest
            values = event if as_map else dict(zip((field for field, _ in fields), event[1:], strict=False))
            plain = neutral(VERSIONS[-1], values, fields)
            if "hashes" in plain:
                plain["hashes"] = [value % 2**64 for value in plain["hashes"]]
            if "parent" in plain:
                plain["parent"] %= 2**64
            match tag:
                case "BlockStored":
                    expected.append(BlockStored(**plain))
                case "BlockRemoved":
                    expected.append(BlockRemoved(**plain))
                case _:
                    expected.append(AllBlocksCleared())
        assert decode_batch(recorded.payload) == Batch(rank, expected, {})


def test_trap_1_array_map_and_bin_in_one_batch() -> None:
    """Each event is read by its own first byte, whatever its neighbours are."""
    events = [
        ["BlockStored", [1], None, [1, 2], 2, None],
        {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"},
        pack(["BlockRemoved", [3]]),
        pack({"type": "BlockRemoved", "block_hashes": [4]}),
        pack(pack(["BlockRemoved", [5]])),
        {"type": "AllBlocksCleared"},
        ["AllBlocksCleared"],
    ]
    assert decode_batch(pack([0.0, events, 1])) == Batch(
        1,
        [
            BlockStored([1], None, [1, 2], 2),
            BlockRemoved([2], "GPU"),
            BlockRemoved([3]),
            BlockRemoved([4]),
            BlockRemoved([5]),
            AllBlocksCleared(),
            AllBlocksCleared(),
        ],
        {},
    )


@pytest.mark.parametrize("long", [False, True], ids=["short form", "32-bit form"])
def test_trap_1_every_length_form_of_msgpack(long: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """Arrays, maps, bins and strings may carry their lengths in any width; encoders differ."""

    def array(*parts: bytes) -> bytes:
        return (b"\xdd" + len(parts).to_bytes(4, "big") if long else bytes([0x90 + len(parts)])) + b"".join(parts)

    def text(value: str) -> bytes:
        return b"\xdb" + len(value).to_bytes(4, "big") + value.encode() if long else pack(value)

    hashes = array(pack(1))
    removed = array(text("BlockRemoved"), hashes)
    entries = text("type") + text("BlockRemoved") + text("block_hashes") + hashes
    as_map = (b"\xdf\x00\x00\x00\x02" if long else b"\x82") + entries
    as_bin = (b"\xc6" + len(removed).to_bytes(4, "big") if long else b"\xc4" + bytes([len(removed)])) + removed
    payload = array(pack(0.0), array(removed, as_map, as_bin), b"\xc0")
    assert decode_batch(payload) == Batch(None, [BlockRemoved([1])] * 3, {})


@pytest.mark.parametrize("tag", ["BlockMoved", "blockstored", ""])
def test_trap_1_unknown_tag_costs_only_itself(tag: str) -> None:
    """A newer release's event is counted as unknown, in every form, and its neighbours are read."""
    unknown = [[tag, [1]], {"type": tag, "block_hashes": [1]}, pack([tag, [1]]), pack(pack({"type": tag}))]
    events = [each for event in unknown for each in (GOOD_ARRAY, event)]
    assert decode_batch(pack([0.0, [*events, GOOD_ARRAY], 0])) == Batch(0, [GOOD] * 5, {"unknown_event": 4})


def test_trap_1_unknown_fields_are_ignored() -> None:
    """Keys that no release has, of any type, change nothing, wherever they stand."""
    future = {"future": {"nested": [1, None, b"x"]}, "zz": 2**63, "a": -1.5}
    plain = {"type": "BlockStored", "block_hashes": [1], "token_ids": [1, 2], "block_size": 2}
    assert only(plain | future) == only(future | plain) == BlockStored([1], None, [1, 2], 2)
    assert only({"type": "BlockRemoved", "block_hashes": [1]} | future) == BlockRemoved([1])
    assert only({"type": "AllBlocksCleared"} | future) == AllBlocksCleared()


@pytest.mark.parametrize("extra", [["x"], [{"cache_salt": "x"}], [None, 1, "x", {"a": [1]}]], ids=repr)
def test_trap_1_extra_positions_are_ignored(extra: list[Any]) -> None:
    """What stands behind the last known position of an event, or of the batch, changes nothing."""
    stored = ["BlockStored", *(STORED.get(name) for name, _ in STORED_FIELDS[:13])]
    expected = BlockStored(**neutral((0, 29), STORED, STORED_FIELDS))
    assert only(stored) == only([*stored, *extra]) == expected
    assert only(["BlockRemoved", [1], "GPU", 0, None, None, *extra]) == BlockRemoved([1], "GPU")
    assert only(["AllBlocksCleared", *extra]) == AllBlocksCleared()
    assert decode_batch(pack([0.0, [GOOD_ARRAY], 2, *extra])) == Batch(2, [GOOD], {})


@pytest.mark.parametrize("medium", ["gpu", "GPU", "CPU_PINNED", "EXTERNAL", "STORAGE", "cpu", "disk9", "", None])
def test_trap_1_media_stay_as_they_are_on_the_wire(medium: str | None) -> None:
    """The decoder neither folds nor judges a medium: which tier it names is a table's business."""
    stored, removed = ["BlockStored", [1], None, [], 0, None, medium], ["BlockRemoved", [1], medium]
    for event in (stored, removed):
        as_map = dict(zip(("type", "block_hashes"), event[:2], strict=True)) | {"medium": medium}
        for spelled in (event, as_map, pack(event)):
            decoded = only(spelled)
            assert isinstance(decoded, BlockStored | BlockRemoved)
            assert decoded.medium == medium


# Trap 2: spellings of a hash -------------------------------------------------------------------------------------

DIGEST = bytes(range(0xC0, 0xE0))
LAST_8 = 0xD8D9DADBDCDDDEDF


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        (DIGEST, LAST_8),
        (DIGEST[16:], LAST_8),
        (DIGEST[24:], LAST_8),
        (b"\xff" * 64, 2**64 - 1),
        (LAST_8, LAST_8),
        (LAST_8 - 2**64, LAST_8),
        (-1, 2**64 - 1),
        (-(2**63), 2**63),
        (2**63, 2**63),
        (2**64 - 1, 2**64 - 1),
        (2**63 - 1, 2**63 - 1),
        (0, 0),
        (b"\0" * 31 + b"\1", 1),
    ],
    ids=lambda value: str(value)[:24],
)
def test_trap_2_every_spelling_of_a_hash_is_one_number(spelled: int | bytes, value: int) -> None:
    """Bytes of any length count by their last eight, big-endian; signed and unsigned are the same bits."""
    stored = only(["BlockStored", [1, spelled, spelled], spelled, [], 0, None, "GPU"])
    assert stored == BlockStored([1, value, value], value or None, medium="GPU")
    assert only({"type": "BlockRemoved", "block_hashes": [spelled]}) == BlockRemoved([value])


def test_trap_2_bytes_of_the_cpu_tier_and_ints_of_the_gpu_name_one_block() -> None:
    """The offload connector of vLLM 0.11 to 0.23 sends raw digests, the block pool integers: they agree."""
    events = [
        ["BlockStored", [LAST_8], None, [1, 2], 2, None, "GPU"],
        ["BlockStored", [DIGEST], None, [], 2, None, "CPU"],
        ["BlockRemoved", [LAST_8], "GPU"],
        ["BlockRemoved", [DIGEST], "CPU"],
    ]
    batch = decode_batch(pack([0.0, events, 0]))
    assert batch.skipped == {}
    assert {event.hashes[0] for event in batch.events if not isinstance(event, AllBlocksCleared)} == {LAST_8}


@pytest.mark.parametrize("value", [b"", b"1234567", b"x" * 65, "12345678", 1.0, True, None, [1]], ids=repr)
def test_trap_2_what_is_no_hash_is_a_bad_event(value: Any) -> None:
    """Too short or too long bytes, text, floats and booleans are refused, in a list and as a parent."""
    events: list[Any] = [["BlockRemoved", [1, value]], ["BlockStored", [value], None, [], 0, None]]
    if value is not None:
        events.append({"type": "BlockStored", "block_hashes": [1], "parent_block_hash": value})
    assert decode_batch(pack([0.0, events, 0])) == Batch(0, [], {"bad_event": len(events)})


@pytest.mark.parametrize("parent", [None, 0, b"\0" * 8, b"\0" * 32, b"\1" + b"\0" * 8], ids=repr)
def test_parent_zero_is_no_parent(parent: int | bytes | None) -> None:
    """llm-d's simulator says with 0 that a block begins its prompt; every spelling of 0 is that 0."""
    assert only(["BlockStored", [1], parent, [1], 1, None]) == BlockStored([1], None, [1], 1)


# Trap 3: lengths that do not agree -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hashes", "tokens"),
    [([], [1, 2, 3, 4]), ([1], [1, 2, 3, 4]), ([1, 2], [1, 2, 3]), ([1, 2], []), ([], [])],
    ids=["no hashes", "fewer hashes", "partial tail", "placeholder", "nothing"],
)
def test_trap_3_lengths_that_do_not_agree_are_kept(hashes: list[int], tokens: list[int]) -> None:
    """Hybrid models list fewer hashes than tokens, placeholders none: the decoder neither cuts nor refuses."""
    expected = BlockStored(hashes, 9, tokens, 2, medium="GPU")
    assert only(["BlockStored", hashes, 9, tokens, 2, None, "GPU"]) == expected
    as_map = {"block_hashes": hashes, "parent_block_hash": 9, "token_ids": tokens, "block_size": 2, "medium": "GPU"}
    assert only({"type": "BlockStored"} | as_map) == expected


def test_trap_3_nil_tokens_and_size_are_a_placeholder() -> None:
    """A store that names only hashes says nothing of tokens and block size."""
    assert only(["BlockStored", [1, 2], None, None, None, None, "CPU"]) == BlockStored([1, 2], medium="CPU")
    assert only({"type": "BlockStored", "block_hashes": [1]}) == BlockStored([1])


# Trap 5: rank and time stamp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2**16])
def test_trap_5_the_batch_names_its_rank(rank: int) -> None:
    """The rank is the batch's third element, whatever the events are."""
    assert decode_batch(pack([0.0, [GOOD_ARRAY], rank])).rank == rank


def test_trap_5_without_a_rank_the_batch_claims_none() -> None:
    """Two elements (vLLM 0.9.0) and nil leave the rank to the registration; 0 is a rank of its own."""
    assert decode_batch(pack([0.0, []])).rank is None
    assert decode_batch(pack([0.0, [], None])).rank is None
    assert decode_batch(pack([0.0, [], 0])).rank == 0


@pytest.mark.parametrize("rank", [-1, 2**16 + 1, 2**64 - 1, "0", 1.0, 1.5, True, [0], {}, b"\0"], ids=repr)
def test_trap_5_a_rank_that_is_none_spoils_the_batch(rank: Any) -> None:
    """Whose blocks these are is not known then: nothing of the batch is taken."""
    with pytest.raises(WireError, match="bad_batch"):
        decode_batch(pack([0.0, [GOOD_ARRAY], rank]))


@pytest.mark.parametrize(
    "stamp", [math.nan, math.inf, -math.inf, -1.0, 0, 1700000000123, 2**64 - 1, None, "x"], ids=repr
)
def test_the_time_stamp_is_never_believed(stamp: Any) -> None:
    """Not a number, milliseconds or nothing at all: no decision hangs on it."""
    assert decode_batch(pack([stamp, [GOOD_ARRAY], 0])) == Batch(0, [GOOD], {})


def test_an_empty_batch_is_a_batch() -> None:
    assert decode_batch(pack([0.0, [], 0])) == Batch(0, [], {})
