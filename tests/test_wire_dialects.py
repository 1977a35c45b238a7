"""Publishers other than vLLM: SGLang, RFC #1527 (Mooncake's store master), llm-d's file backend, and mixtures."""

from __future__ import annotations

from typing import Any

import pytest

from kvindexer.events.wire import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, decode_batch
from kvindexer.testing.packing import pack
from kvindexer.types import SOURCE_TYPES, SourceType

HIGH = 2**64 - 2


def batch(*events: Any, dialect: SourceType, rank: int | None = 0) -> Batch:
    return decode_batch(pack([0.0, list(events), rank]), dialect)


# SGLang ----------------------------------------------------------------------------------------------------------

SGLANG_STORED = ["BlockStored", [-2, 7], None, [1, 2, 3, 4], 2, None]
SALT = {"cache_salt": "tenant-1"}


def sglang(*behind_lora_id: Any) -> BlockStored:
    """The store that an SGLang array with these further positions gives."""
    decoded = batch([*SGLANG_STORED, *behind_lora_id], dialect="sglang")
    assert decoded.skipped == {}
    (event,) = decoded.events
    assert isinstance(event, BlockStored)
    return event


@pytest.mark.parametrize("medium", ["GPU", "CPU_PINNED", "DISK", "EXTERNAL", "CPU_TIER1", None])
def test_trap_1_sglang_array_of_seven(medium: str | None) -> None:
    """Positions are vLLM's up to the medium, hashes signed; nothing says that there is no salt."""
    assert sglang(medium) == BlockStored([HIGH, 7], None, [1, 2, 3, 4], 2, medium=medium)


def test_trap_1_sglang_array_before_media() -> None:
    """The first releases end with lora_id."""
    assert sglang() == BlockStored([HIGH, 7], None, [1, 2, 3, 4], 2)


@pytest.mark.parametrize(
    "behind",
    [
        ["GPU", SALT],
        ["GPU", SALT, ["attention"]],
        ["GPU", ["attention"], SALT],
        ["GPU", None, None, SALT],
        ["GPU", None, SALT, None, "newer", 4],
    ],
    ids=["at 7", "before types", "behind types", "at 9", "with newer fields"],
)
def test_trap_9_sglang_salt_is_found_wherever_it_stands(behind: list[Any]) -> None:
    """The salt's dict moves between releases; it becomes the first block's extra key, like vLLM's."""
    assert sglang(*behind).extra_keys == [["tenant-1"], None]


@pytest.mark.parametrize(
    "behind",
    [
        ["GPU", None],
        ["GPU", ["attention"]],
        ["GPU", "text", ["attention"], 5],
        ["GPU", {}],
        ["GPU", {"cache_salt": None}],
        ["GPU", {"cache_salt": ""}],
    ],
    ids=["nil", "types", "other types of values", "empty dict", "nil salt", "empty salt"],
)
def test_trap_1_sglang_positions_without_a_salt_are_ignored(behind: list[Any]) -> None:
    """What vLLM has there (LoRA name, extra keys, group) is never read from an SGLang array."""
    assert sglang(*behind) == BlockStored([HIGH, 7], None, [1, 2, 3, 4], 2, medium="GPU")


def test_trap_9_sglang_salt_of_a_later_block_is_carried_by_its_parent() -> None:
    """Only a prompt's first block depends on the salt by itself; the others hang on it."""
    with_parent = ["BlockStored", [1], 5, [1, 2], 2, None, "GPU", SALT]
    without = ["BlockStored", [1], 0, [1, 2], 2, None, "GPU", SALT]
    as_bytes = ["BlockStored", [1], b"\0" * 8, [1, 2], 2, None, "GPU", SALT]
    events = batch(with_parent, without, as_bytes, dialect="sglang").events
    assert [event.extra_keys for event in events if isinstance(event, BlockStored)] == [
        None,
        [["tenant-1"]],
        [["tenant-1"]],
    ]


@pytest.mark.parametrize("salt", [{"tenant": "a"}, {"cache_salt": 5}, {"cache_salt": ["a", "b"]}], ids=repr)
def test_trap_9_sglang_salt_that_is_no_text_matches_nobody(salt: dict[str, Any]) -> None:
    """A salt that we can't read must never look like none: it stays as opaque bytes, which no query has."""
    ((key,), rest) = sglang("GPU", salt).extra_keys or []
    assert isinstance(key, bytes)
    assert rest is None
    assert key != (sglang("GPU", {"cache_salt": 6}).extra_keys or [])[0][0]


def test_trap_9_sglang_salt_without_blocks_is_nothing() -> None:
    """A store that lists no hashes has no block that a salt could belong to."""
    event: list[Any] = ["BlockStored", [], None, [], 2, None, "GPU", SALT]
    assert batch(event, dialect="sglang").events == [BlockStored([], None, [], 2, medium="GPU")]


@pytest.mark.parametrize("salt", [SALT, "tenant-1"], ids=["dict", "text"])
def test_trap_1_sglang_maps(salt: Any) -> None:
    """Later releases name their fields; a salt may be its dict or its text, types of components are ignored."""
    stored = {
        "type": "BlockStored",
        "block_hashes": [-2, 7],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "CPU_PINNED",
        "cache_salt": salt,
        "component_types": ["attention", {"a": 1}],
    }
    removed = {"type": "BlockRemoved", "block_hashes": [-2], "medium": "EXTERNAL", "component_types": []}
    assert batch(stored, removed, {"type": "AllBlocksCleared"}, dialect="sglang") == Batch(
        0,
        [
            BlockStored([HIGH, 7], None, [1, 2, 3, 4], 2, medium="CPU_PINNED", extra_keys=[["tenant-1"], None]),
            BlockRemoved([HIGH], "EXTERNAL"),
            AllBlocksCleared(),
        ],
        {},
    )


def test_trap_1_sglang_removals_and_clears() -> None:
    """Positions behind the medium are ignored here too."""
    events = (["BlockRemoved", [-2]], ["BlockRemoved", [7], "DISK", ["attention"], 3], ["AllBlocksCleared", 1])
    assert batch(*events, dialect="sglang").events == [
        BlockRemoved([HIGH]),
        BlockRemoved([7], "DISK"),
        AllBlocksCleared(),
    ]


def test_trap_9_the_session_of_a_vllm_array_is_no_salt() -> None:
    """SGLang's salt is a key of maps; the array position that the decoder lists it at belongs to vLLM's session."""
    fields = [[1], None, [1, 2], 2, None, "GPU", None, None, 0, None, None, None, None]
    for dialect in SOURCE_TYPES:
        (event,) = batch(["BlockStored", *fields, "session"], dialect=dialect).events
        assert isinstance(event, BlockStored)
        assert event.extra_keys is None


# RFC #1527 -------------------------------------------------------------------------------------------------------


def rfc1527(event_type: str, **fields: Any) -> dict[str, Any]:
    """One event of a Mooncake store master, with everything beside its blocks."""
    return {
        "event_id": 7,
        "timestamp": 1700000000123,
        "event_type": event_type,
        "model_name": None,
        "block_size": 16,
        "additional_salt": None,
        "lora_name": None,
        "tenant_id": "default",
        "backend_id": "mooncake-0",
        "medium": "cpu",
        "dp_rank": None,
        **fields,
    }


def with_aliases(event: dict[str, Any]) -> dict[str, Any]:
    """The same event with vLLM's names beside the RFC's."""
    tags = {"stored": "BlockStored", "removed": "BlockRemoved", "cleared": "AllBlocksCleared"}
    aliases: dict[str, Any] = {"type": tags[event["event_type"]]}
    if "seq_hashes" in event:
        aliases["block_hashes"] = event["seq_hashes"]
    if "parent_hash" in event:
        aliases["parent_block_hash"] = event["parent_hash"]
    return event | aliases


@pytest.mark.parametrize("spell", [dict, with_aliases], ids=["plain", "with vLLM aliases"])
def test_trap_1_rfc_1527(spell: Any) -> None:
    """Both spellings give the same events: keys as hashes, the backend as owner, the medium as written."""
    told = rfc1527("stored", seq_hashes=[HIGH, 7], base_block_idx=4, parent_hash=5, token_ids=[1, 2])
    blind = rfc1527("stored", seq_hashes=[9], base_block_idx=None, parent_hash=None, token_ids=None, medium="disk")
    named = rfc1527("stored", seq_hashes=[9], parent_hash=0, lora_name="la", backend_id=3, block_size=None)
    removed = rfc1527("removed", seq_hashes=[HIGH])
    cleared = rfc1527("cleared")
    events = [spell(event) for event in (told, blind, named, removed, cleared)]
    assert batch(*events, dialect="mooncake", rank=None) == Batch(
        None,
        [
            BlockStored([HIGH, 7], 5, [1, 2], 16, medium="cpu", ownership="mooncake-0", keyed=True),
            BlockStored([9], None, [], 16, medium="disk", ownership="mooncake-0", keyed=True),
            BlockStored([9], None, [], 0, lora_name="la", medium="cpu", ownership="3", keyed=True),
            BlockRemoved([HIGH], "cpu", ownership="mooncake-0"),
            AllBlocksCleared("cpu"),
        ],
        {},
    )


def test_trap_1_rfc_1527_with_vllm_names_only() -> None:
    """Without `seq_hashes` the hashes are an engine's and say nothing about keys."""
    stored = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": 5, "token_ids": [1], "block_size": 1}
    removed = {"type": "BlockRemoved", "block_hashes": [1], "group_idx": 2}
    assert batch(stored, removed, {"type": "AllBlocksCleared"}, dialect="mooncake").events == [
        BlockStored([1], 5, [1], 1),
        BlockRemoved([1], group=2),
        AllBlocksCleared(),
    ]


def test_trap_4_rfc_1527_broken_events_cost_themselves() -> None:
    """No hashes is a bad event, another event type an unknown one; a wrong type anywhere spoils one event."""
    good = rfc1527("removed", seq_hashes=[1])
    events = [
        good,
        rfc1527("stored"),
        rfc1527("removed", seq_hashes=None),
        rfc1527("stored", seq_hashes="x"),
        rfc1527("stored", seq_hashes=[b"short"]),
        rfc1527("moved", seq_hashes=[1]),
        good,
    ]
    expected = BlockRemoved([1], "cpu", ownership="mooncake-0")
    assert batch(*events, dialect="mooncake") == Batch(0, [expected, expected], {"bad_event": 4, "unknown_event": 1})


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "store"])
def test_trap_9_rfc_1527_keys_are_believed_only_of_their_own_dialect(dialect: SourceType) -> None:
    """An engine's event can't claim that its hashes are keys: with aliases they are hashes, without it is refused."""
    stored = rfc1527("stored", seq_hashes=[1], parent_hash=None, token_ids=None)
    assert batch(stored, dialect=dialect) == Batch(0, [], {"bad_event": 1})
    (event,) = batch(with_aliases(stored), dialect=dialect).events
    assert isinstance(event, BlockStored)
    assert not event.keyed


# llm-d's file backend and stores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["store", "vllm"])
@pytest.mark.parametrize("medium", ["SHARED_STORAGE", "OBJECT_STORE"])
def test_trap_1_llm_d_nests_each_event_in_a_bin(medium: str, dialect: SourceType) -> None:
    """Events packed a second time, in a batch of two elements, parent 0, no tokens."""
    events = [
        pack(["BlockStored", [HIGH, 7], 0, [], 0, None, medium]),
        pack(["BlockRemoved", [7], medium]),
        pack(["AllBlocksCleared"]),
    ]
    assert decode_batch(pack([0.0, events]), dialect) == Batch(
        None,
        [BlockStored([HIGH, 7], medium=medium), BlockRemoved([7], medium), AllBlocksCleared()],
        {},
    )


def test_a_map_may_name_the_medium_that_was_cleared() -> None:
    """A store with several media says which of them is empty; arrays have no room for it."""
    events = ({"type": "AllBlocksCleared", "medium": "DISK"}, ["AllBlocksCleared"])
    assert batch(*events, dialect="store").events == [AllBlocksCleared("DISK"), AllBlocksCleared()]


def test_trap_9_an_empty_lora_name_is_none() -> None:
    """Publishers without optional strings send "" for the base model; queries read "" as none too."""
    fields = {"block_hashes": [1], "token_ids": [1], "block_size": 1, "lora_name": ""}
    assert batch({"type": "BlockStored", **fields}, dialect="vllm").events == [BlockStored([1], None, [1], 1)]
    assert batch({"event_type": "stored", **fields}, dialect="mooncake").events == [BlockStored([1], None, [1], 1)]
    as_array = ["BlockStored", [1], None, [1], 1, None, "GPU", ""]
    assert batch(as_array, dialect="vllm").events == [BlockStored([1], None, [1], 1, medium="GPU")]


@pytest.mark.parametrize("dialect", SOURCE_TYPES)
def test_trap_1_every_dialect_reads_plain_vllm(dialect: SourceType) -> None:
    """What all publishers share (arrays up to the medium, bins) reads the same under every registered type."""
    stored = ["BlockStored", [1, 2], 5, [1, 2, 3, 4], 2, None, "GPU"]
    events: list[Event] = [
        BlockStored([1, 2], 5, [1, 2, 3, 4], 2, medium="GPU"),
        BlockRemoved([1], "GPU"),
        AllBlocksCleared(),
    ]
    wire = [stored, ["BlockRemoved", [1], "GPU"], ["AllBlocksCleared"]]
    assert batch(*wire, dialect=dialect) == batch(*map(pack, wire), dialect=dialect) == Batch(0, events, {})


@pytest.mark.parametrize("dialect", SOURCE_TYPES)
def test_trap_1_unknown_events_are_unknown_in_every_dialect(dialect: SourceType) -> None:
    """A newer event costs a count of its own, not the one that takes a source's flags off."""
    unknown: list[Any] = [["BlockMoved", [1]], {"type": "BlockMoved"}, {"event_type": "moved", "seq_hashes": [1]}]
    wrapped = [pack(each) for each in unknown]
    assert batch(*unknown, *wrapped, dialect=dialect) == Batch(0, [], {"unknown_event": 6})
