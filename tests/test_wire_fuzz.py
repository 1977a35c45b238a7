"""Invariant under fuzz: whatever the bytes and the dialect, `decode_batch` returns a sound batch or raises WireError.

Sound: the same bytes give the same batch, every event is counted once (decoded or skipped), and every field of a
decoded event has the type and range that the index relies on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import recordings
from kvindexer.errors import WireError
from kvindexer.events.wire import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, decode_batch
from kvindexer.testing.packing import pack
from kvindexer.types import SOURCE_TYPES, SourceType

PAYLOADS = [frame.payload for name in recordings.NAMES for frame in recordings.frames(name)]
MUTATIONS = 100_000
REPLACEMENTS = 10_000
REASONS = {"bad_event", "unknown_event"}
TELLING_BYTES = bytes(
    [0x00, 0x7F, 0x80, 0x90, 0x9F, 0xC0, 0xC1, 0xC4, 0xC6, 0xC9, 0xCB, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF]
)

fuzz = hypothesis_settings(max_examples=600, deadline=None, derandomize=True)


def is_number(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


def is_text(value: object) -> bool:
    return value is None or type(value) is str


def assert_sound(event: Event) -> None:
    """Each field has the type and range that `wire` documents."""
    if isinstance(event, AllBlocksCleared):
        assert is_text(event.medium)
        return
    assert all(is_number(value, 0, 2**64) for value in event.hashes)
    assert is_number(event.group, 0, 2**16 + 1)
    assert is_text(event.medium)
    assert is_text(event.locality)
    assert is_text(event.ownership)
    if isinstance(event, BlockRemoved):
        return
    assert event.parent is None or is_number(event.parent, 1, 2**64)
    assert all(type(token) is int for token in event.tokens)
    assert is_number(event.block_size, 0, 2**20 + 1)
    assert event.lora_id is None or type(event.lora_id) is int
    assert event.window is None or type(event.window) is int
    assert is_text(event.lora_name)
    assert is_text(event.kind)
    assert event.extra_keys is None or all(keys is None or type(keys) is list for keys in event.extra_keys)
    assert type(event.keyed) is bool


def decoded(payload: bytes, dialect: SourceType) -> Batch | str:
    """The batch, checked for soundness, or the reason why there is none."""
    try:
        batch = decode_batch(payload, dialect)
    except WireError as error:
        reason = error.reason
    else:
        assert_all_sound(batch)
        return batch
    assert reason == "bad_batch"
    return reason


def assert_all_sound(batch: Batch) -> None:
    """The same for a whole batch."""
    for event in batch.events:
        assert_sound(event)
    assert batch.rank is None or is_number(batch.rank, 0, 2**16 + 1)
    assert batch.skipped.keys() <= REASONS


def shown(outcome: Batch | str) -> str:
    """All that an outcome says; extra keys may hold NaN, which equals nothing, and objects shown by address."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(outcome))


def events_in(payload: bytes) -> int:
    """How many events a batch has, by another library than the decoder's."""
    reader = msgpack.Unpacker(max_buffer_size=0)
    reader.feed(payload)
    reader.read_array_header()
    reader.skip()
    return int(reader.read_array_header())


def extents(payload: bytes) -> list[tuple[int, int]]:
    """Where each event of a batch begins and ends."""
    reader = msgpack.Unpacker(max_buffer_size=0)
    reader.feed(payload)
    reader.read_array_header()
    reader.skip()
    found = []
    for _ in range(reader.read_array_header()):
        begin = reader.tell()
        reader.skip()
        found.append((begin, reader.tell()))
    return found


def check(payload: bytes, dialect: SourceType) -> None:
    """The invariant, for one payload."""
    first = decoded(payload, dialect)
    assert shown(decoded(payload, dialect)) == shown(first)
    if isinstance(first, Batch):
        assert len(first.events) + sum(first.skipped.values()) == events_in(payload)


# Hypothesis ------------------------------------------------------------------------------------------------------

dialects = st.sampled_from(SOURCE_TYPES)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
)
keys = st.text(max_size=8) | st.sampled_from(
    ["type", "event_type", "block_hashes", "seq_hashes", "medium", "cache_salt"]
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=4))

hashes = st.integers(-(2**63), 2**64 - 1) | st.binary(min_size=8, max_size=64)
extra_keys = st.text(max_size=4) | st.binary(max_size=4) | st.tuples(st.text(max_size=4), st.integers(-9, 9))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "block_hashes": st.lists(hashes, max_size=3),
    "parent_block_hash": st.none() | hashes | st.just(0),
    "token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=6),
    "block_size": st.integers(0, 64),
    "lora_id": st.none() | st.integers(0, 9),
    "medium": st.sampled_from([None, "GPU", "cpu", "CPU_PINNED", "x"]),
    "lora_name": st.none() | st.text(max_size=4),
    "extra_keys": st.none() | st.lists(st.none() | st.lists(extra_keys, max_size=3), max_size=3),
    "group_idx": st.none() | st.integers(0, 3),
    "kv_cache_spec_kind": st.sampled_from([None, "full_attention", "sliding_window"]),
    "kv_cache_spec_sliding_window": st.none() | st.integers(0, 4096),
    "locality": st.sampled_from([None, "LOCAL", "REMOTE"]),
    "ownership": st.none() | st.text(max_size=4),
    "cache_salt": st.none() | st.text(max_size=4) | st.dictionaries(st.just("cache_salt"), scalars),
}
RFC_FIELDS = {
    "seq_hashes": FIELDS["block_hashes"],
    "parent_hash": FIELDS["parent_block_hash"],
    "backend_id": scalars,
    "event_type": st.sampled_from(["stored", "removed", "cleared", "moved"]),
}
TAGS = ["BlockStored", "BlockRemoved", "AllBlocksCleared", "BlockMoved"]


@st.composite
def wire_events(draw: st.DrawFn) -> Any:
    """An event as some publisher might send it, with up to two of its fields spoilt."""
    names = draw(st.permutations(list(FIELDS))) if draw(st.booleans()) else list(FIELDS)
    names = names[: draw(st.integers(0, len(names)))]
    event = {name: draw(FIELDS[name]) for name in names}
    if draw(st.booleans()):
        event |= {name: draw(RFC_FIELDS[name]) for name in RFC_FIELDS}
    for name in draw(st.lists(st.sampled_from([*FIELDS, *RFC_FIELDS, "type"]), max_size=2)):
        if draw(st.booleans()):
            event[name] = draw(values)
        else:
            event.pop(name, None)
    tag = draw(st.sampled_from(TAGS))
    spelled: Any = {"type": tag, **event} if draw(st.booleans()) else [tag, *event.values()]
    for _ in range(draw(st.integers(0, 3))):
        spelled = pack(spelled)
    return spelled


@st.composite
def batches(draw: st.DrawFn) -> bytes:
    """A batch of such events and of arbitrary values."""
    events = draw(st.lists(wire_events() | wire_events() | values, max_size=5))
    batch = [
        draw(scalars),
        events,
        draw(st.none() | st.integers(0, 8) | scalars),
        *draw(st.lists(values, max_size=1)),
    ]
    return pack(batch[: draw(st.integers(2, len(batch)))])


@fuzz
@given(st.binary(max_size=200), dialects)
@example(b"\x93\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\x90\xc0", "vllm")
def test_arbitrary_bytes(payload: bytes, dialect: SourceType) -> None:
    """Bytes of no form at all."""
    check(payload, dialect)


@fuzz
@given(values, dialects)
def test_arbitrary_msgpack(value: Any, dialect: SourceType) -> None:
    """Sound msgpack that is no batch, or one by accident; and the same value as a batch's only event."""
    check(pack(value), dialect)
    check(pack([0.0, [value], None]), dialect)


@fuzz
@given(batches(), dialects, st.data())
def test_nearly_right_batches(payload: bytes, dialect: SourceType, data: st.DataObject) -> None:
    """Events with fields missing, moved, spoilt or nested; then the same with one byte changed."""
    check(payload, dialect)
    place = data.draw(st.integers(0, len(payload) - 1))
    check(payload[:place] + data.draw(st.binary(max_size=2)) + payload[place + 1 :], dialect)


# Recordings, mutated ---------------------------------------------------------------------------------------------


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Recorded payloads with bytes flipped, set, cut off, cut out, doubled or put in."""
    rng = random.Random(seed)
    for _ in range(count):
        payload = bytearray(rng.choice(PAYLOADS))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            # most of a payload is tokens: look at its frame more often
            place = rng.randrange(min(len(payload), rng.choice((40, len(payload)))))
            width = rng.randrange(1, 9)
            match rng.randrange(6):
                case 0:
                    payload[place] ^= 1 << rng.randrange(8)
                case 1:
                    payload[place] = rng.choice(TELLING_BYTES)
                case 2:
                    del payload[max(place, 1) :]
                case 3:
                    payload[place:place] = rng.randbytes(width)
                case 4:
                    payload[place:place] = payload[place : place + width]
                case _:
                    if len(payload) > width:
                        del payload[place : place + width]
            if not payload:
                break
        yield bytes(payload)


def test_mutated_recordings() -> None:
    """A hundred thousand damaged messages of real engines, every dialect in turn."""
    outcomes = {"bad_batch": 0, "skipped": 0, "read": 0}
    for number, payload in enumerate(mutations(1, MUTATIONS)):
        outcome = decoded(payload, SOURCE_TYPES[number % len(SOURCE_TYPES)])
        if isinstance(outcome, str):
            outcomes["bad_batch"] += 1
        else:
            outcomes["skipped" if outcome.skipped else "read"] += 1
            assert len(outcome.events) + sum(outcome.skipped.values()) == events_in(payload)
    # a fuzzer that reaches only one outcome proves little
    assert min(outcomes.values()) > MUTATIONS // 50, outcomes


def test_decoding_mutated_recordings_is_deterministic() -> None:
    """The same damaged bytes give the same batch, or the same refusal, a second time."""
    for number, payload in enumerate(mutations(2, MUTATIONS // 10)):
        check(payload, SOURCE_TYPES[number % len(SOURCE_TYPES)])


def garbage(rng: random.Random, length: int) -> bytes:
    """One msgpack value of exactly this many bytes that is no event."""
    short, long = 2**8, 2**16
    filler = rng.randbytes(length)
    numbers = bytes(rng.randrange(0x80) for _ in range(length))
    match rng.randrange(4):
        case 0:  # text, seldom UTF-8
            head = b"\xd9" + bytes([length - 2]) if length - 2 < short else b"\xdb" + (length - 5).to_bytes(4, "big")
            return head + filler[len(head) :]
        case 1:  # bin
            head = b"\xc4" + bytes([length - 2]) if length - 2 < short else b"\xc6" + (length - 5).to_bytes(4, "big")
            return head + filler[len(head) :]
        case 2 if length - 3 < long:  # an array of numbers
            return b"\xdc" + (length - 3).to_bytes(2, "big") + numbers[3:]
        case _:  # an extension
            head = b"\xc9" + (length - 6).to_bytes(4, "big") + b"\x05"
            return head + filler[len(head) :]


SEVERAL = [payload for payload in PAYLOADS if events_in(payload) > 1]


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_garbage_in_the_place_of_one_event_leaves_the_others(dialect: SourceType) -> None:
    """An event overwritten by another msgpack value of the same extent: all others decode as before."""
    rng = random.Random(3)
    for _ in range(REPLACEMENTS // 4):
        payload = rng.choice(SEVERAL)
        spans = extents(payload)
        place = rng.randrange(len(spans))
        begin, end = spans[place]
        whole = decode_batch(payload, dialect)
        assert whole.skipped == {}
        spoilt = decode_batch(payload[:begin] + garbage(rng, end - begin) + payload[end:], dialect)
        assert spoilt.events == whole.events[:place] + whole.events[place + 1 :]
        assert spoilt.skipped == {"bad_event": 1}
        assert spoilt.rank == whole.rank


def test_damage_inside_one_event_leaves_the_others() -> None:
    """Bytes of one event changed so that its extent stays: whatever becomes of it, the others decode as before."""
    rng = random.Random(4)
    stayed = spoilt = 0
    for _ in range(REPLACEMENTS):
        payload = rng.choice(SEVERAL)
        spans = extents(payload)
        place = rng.randrange(len(spans))
        begin, end = spans[place]
        hit = rng.randrange(begin, min(end, begin + rng.choice((20, 2000))))
        damaged = payload[:hit] + rng.randbytes(1) + payload[hit + 1 :]
        try:
            if extents(damaged) != spans:
                continue
        except (ValueError, msgpack.OutOfData):
            continue
        stayed += 1
        whole = decode_batch(payload)
        batch = decode_batch(damaged)
        behind = len(spans) - place - 1
        assert batch.events[:place] == whole.events[:place]
        assert batch.events[len(batch.events) - behind :] == whole.events[len(whole.events) - behind :]
        assert len(batch.events) + sum(batch.skipped.values()) == len(spans)
        spoilt += bool(batch.skipped)
    assert stayed > REPLACEMENTS // 4
    assert spoilt > REPLACEMENTS // 20


def test_stored_events_survive_a_second_packing_and_mixing() -> None:
    """Recorded events, each left as it is or packed into a bin by chance, decode to the same events."""
    rng = random.Random(5)
    for payload in PAYLOADS:
        raw = [payload[begin:end] for begin, end in extents(payload)]
        mixed = [pack(each) if rng.random() < 0.5 else each for each in raw]
        again = b"\x92" + pack(0.0) + b"\xdc" + len(mixed).to_bytes(2, "big") + b"".join(mixed)
        assert decode_batch(again).events == decode_batch(payload).events


def test_the_fuzzed_types_are_all_there_are() -> None:
    """A new kind of event must get its own soundness check above."""
    assert {BlockStored, BlockRemoved, AllBlocksCleared} == set(Event.__args__)
