"""Trap 4: what is broken costs itself only; a bomb costs no more than its length."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from kvindexer.errors import WireError
from kvindexer.events.wire import Batch, BlockRemoved, decode_batch
from kvindexer.testing.packing import pack
from kvindexer.types import SOURCE_TYPES, SourceType

GOOD = BlockRemoved([11], "GPU")
GOOD_ARRAY = ["BlockRemoved", [11], "GPU"]

BAD_EVENTS: dict[str, tuple[bytes, str]] = {
    "nil": (pack(None), "bad_event"),
    "int": (pack(7), "bad_event"),
    "text": (pack("BlockStored"), "bad_event"),
    "float": (pack(math.nan), "bad_event"),
    "ext": (b"\xd4\x05x", "bad_event"),
    "the byte that msgpack never uses": (b"\xc4\x01\xc1", "bad_event"),
    "empty array": (pack([]), "bad_event"),
    "empty map": (pack({}), "bad_event"),
    "empty bin": (pack(b""), "bad_event"),
    "tag only": (pack(["BlockStored"]), "bad_event"),
    "tag of another type": (pack([1, [1]]), "bad_event"),
    "map without a tag": (pack({"block_hashes": [1]}), "bad_event"),
    "map without hashes": (pack({"type": "BlockRemoved"}), "bad_event"),
    "map with an int key": (pack({1: 2, "type": "BlockRemoved", "block_hashes": [1]}), "bad_event"),
    "hashes are no list": (pack(["BlockRemoved", 1]), "bad_event"),
    "hashes are nil": (pack(["BlockRemoved", None]), "bad_event"),
    "hash is text": (pack(["BlockRemoved", ["x"]]), "bad_event"),
    "token is text": (pack(["BlockStored", [1], None, ["x"], 1, None]), "bad_event"),
    "token is a float": (pack(["BlockStored", [1], None, [1.5], 1, None]), "bad_event"),
    "negative block size": (pack(["BlockStored", [1], None, [1], -1, None]), "bad_event"),
    "huge block size": (pack(["BlockStored", [1], None, [1], 2**20 + 1, None]), "bad_event"),
    "lora id is text": (pack(["BlockStored", [1], None, [1], 1, "x"]), "bad_event"),
    "medium is a number": (pack(["BlockRemoved", [1], 0]), "bad_event"),
    "medium of 5000 letters": (pack(["BlockRemoved", [1], "x" * 5000]), "bad_event"),
    "extra keys are text": (pack(["BlockStored", [1], None, [1], 1, None, "GPU", None, ["x"]]), "bad_event"),
    "negative group": (pack(["BlockRemoved", [1], "GPU", -1]), "bad_event"),
    "huge group": (pack(["BlockRemoved", [1], "GPU", 2**16 + 1]), "bad_event"),
    "tag is no UTF-8": (b"\x92\xa2\xff\xfe\x91\x01", "bad_event"),
    "medium is no UTF-8": (b"\x93\xacBlockRemoved\x91\x01\xa2\xff\xfe", "bad_event"),
    "bin ends early": (pack(pack(["BlockRemoved", [1]])[:-1]), "bad_event"),
    "bin with bytes behind": (pack(pack(["BlockRemoved", [1]]) + b"\0"), "bad_event"),
    "three bins deep": (pack(pack(pack(pack(["BlockRemoved", [1]])))), "bad_event"),
    "4G hashes in a bin": (pack(b"\x92\xacBlockRemoved\xdd\xff\xff\xff\xff"), "bad_event"),
    "deep array": (b"\x91" * 500 + b"\xc0", "bad_event"),
    "deep array in a bin": (pack(b"\x91" * 100_000 + b"\xc0"), "bad_event"),
    "deep ignored field in a bin": (
        pack(b"\x92\xb0AllBlocksCleared" + b"\x91" * 100_000 + b"\xc0"),
        "bad_event",
    ),
    "unknown tag": (pack(["BlockMoved", [1]]), "unknown_event"),
    "unknown tag of a map": (pack({"type": "BlockMoved"}), "unknown_event"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", BAD_EVENTS)
def test_trap_4_a_bad_event_costs_only_itself(name: str, place: int) -> None:
    """First, between or last: the events around a bad one are read, and it is counted once, with its reason."""
    raw, reason = BAD_EVENTS[name]
    events = [pack(GOOD_ARRAY)] * 2
    events.insert(place, raw)
    payload = b"\x93" + pack(0.0) + b"\x93" + b"".join(events) + pack(4)
    assert decode_batch(payload) == Batch(4, [GOOD, GOOD], {reason: 1})


def test_trap_4_many_bad_events_are_all_counted() -> None:
    """The counts are those of the wire, by reason; the good ones stay in order."""
    good = [["BlockRemoved", [number]] for number in range(100)]
    events = [each for event in good for each in (None, event, ["BlockMoved"], "x")]
    assert decode_batch(pack([0.0, events, 0])) == Batch(
        0, [BlockRemoved([number]) for number in range(100)], {"bad_event": 200, "unknown_event": 100}
    )


BAD_BATCHES: dict[str, bytes] = {
    "nothing": b"",
    "nil": pack(None),
    "map": pack({"ts": 0.0, "events": []}),
    "bin": pack(pack([0.0, [], 0])),
    "empty": pack([]),
    "no events": pack([0.0]),
    "events are nil": pack([0.0, None, 0]),
    "events are a map": pack([0.0, {}, 0]),
    "bytes behind": pack([0.0, [GOOD_ARRAY], 0]) + b"\0",
    "ends early": pack([0.0, [GOOD_ARRAY], 0])[:-1],
    "ends inside an event": pack([0.0, [GOOD_ARRAY, GOOD_ARRAY], 0])[:-8],
    "the byte that msgpack never uses": b"\x93\x00\x91\xc1\x00",
    "4G elements": b"\xdd\xff\xff\xff\xff\x00",
    "4G events": b"\x93\x00\xdd\xff\xff\xff\xff",
    "an event of 4G elements": b"\x93\x00\x91\xdd\xff\xff\xff\xff",
    "an event of 4G pairs": b"\x93\x00\x91\xdf\xff\xff\xff\xff",
    "an event of 4G bytes": b"\x93\x00\x91\xc6\xff\xff\xff\xff",
    "a tag of 4G letters": b"\x93\x00\x91\x92\xdb\xff\xff\xff\xff",
    "a time stamp of 4G elements": b"\x93\xdd\xff\xff\xff\xff",
    "a deep time stamp": b"\x93" + b"\x91" * 100_000 + b"\xc0\x90\xc0",
    "a deep event": b"\x93\x00\x91" + b"\x91" * 100_000 + b"\xc0\xc0",
    "a deep map": b"\x93\x00\x91" + b"\x81\xa1a" * 100_000 + b"\xc0\xc0",
    "a deep element behind": b"\x94\x00\x90\xc0" + b"\x91" * 100_000 + b"\xc0",
}


@pytest.mark.parametrize("dialect", SOURCE_TYPES)
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_trap_4_a_bad_batch_is_one_error(name: str, dialect: SourceType) -> None:
    """Bytes that are no batch raise WireError with the reason for the counter, and cost no memory to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            decode_batch(BAD_BATCHES[name], dialect)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "bad_batch"
    assert peak < 2**20


def test_trap_4_nested_bins_do_not_multiply() -> None:
    """A bomb of bins, each packed into the next, is given up after two: its cost is its length."""
    bomb = pack(GOOD_ARRAY)
    for _ in range(500):
        bomb = pack(bomb)
    assert decode_batch(pack([0.0, [bomb, GOOD_ARRAY], 0])) == Batch(0, [GOOD], {"bad_event": 1})
