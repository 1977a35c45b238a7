"""The fake engine is itself judged: its truth against its own events, and its behaviour against recorded engines."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest

from kvindexer import testing
from kvindexer.testing import (
    AllBlocksCleared,
    BlockPool,
    BlockRemoved,
    BlockStored,
    ChatShape,
    ChatTraffic,
    HashForm,
    LlmdFs,
    MooncakeStore,
    MultimodalItem,
    Sglang,
    TraceTraffic,
    Vllm,
    mooncake_trace,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvindexer.testing import Event

RECORDINGS = Path(__file__).parent / "recordings"


@dataclass
class NaiveCounter:
    """What a listener knows who adds and subtracts and does nothing else."""

    gpu: Counter[tuple[int, bytes]] = field(default_factory=Counter)
    cpu: set[tuple[int, bytes]] = field(default_factory=set)

    def apply(self, events: Iterable[Event]) -> None:
        """Take events in."""
        for event in events:
            match event:
                case AllBlocksCleared():
                    self.gpu.clear()
                case BlockStored(medium="GPU"):
                    self.gpu.update((event.group_idx, each) for each in event.block_hashes)
                case BlockRemoved(medium="GPU"):
                    self.gpu.subtract((event.group_idx, each) for each in event.block_hashes)
                case BlockStored():
                    self.cpu |= {(event.group_idx, each) for each in event.block_hashes}
                case BlockRemoved():
                    self.cpu -= {(event.group_idx, each) for each in event.block_hashes}

    def held(self) -> dict[tuple[int, bytes], int]:
        """Return what is left of the sums."""
        return {key: copies for key, copies in self.gpu.items() if copies}


def random_prompt(choice: random.Random, block_size: int) -> list[int]:
    """Few alphabets and few lengths, so that prefixes, twins and exact multiples of a block are common."""
    start = choice.randrange(3)
    length = choice.choice([block_size - 1, block_size, 2 * block_size, 5 * block_size, 5 * block_size + 3, 47])
    fork = choice.choice([0, length, choice.randrange(length)])
    return [start * 1000 + i for i in range(fork)] + [choice.randrange(4) for _ in range(length - fork)]


POOLS = {
    "roomy": {"num_blocks": 400},
    "tight": {"num_blocks": 24},
    "chunked": {"num_blocks": 64, "max_step_tokens": 21},
    "offload": {"num_blocks": 24, "cpu_blocks": 40},
    "tiny offload": {"num_blocks": 24, "cpu_blocks": 7, "max_step_tokens": 30},
    "set-like": {"num_blocks": 40, "set_like": True},
    "vllm before 0.24": {"num_blocks": 24, "reuse_empty_first": False},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", POOLS.values(), ids=POOLS)
def test_truth_equals_the_sum_of_the_events_after_every_step(shape: dict[str, Any], seed: int) -> None:
    choice = random.Random(seed)
    pool, naive = BlockPool(block_size=8, hash_seed=seed, **shape), NaiveCounter()
    seen: Counter[str] = Counter()
    for _ in range(150):
        for _ in range(choice.choice([1, 1, 2, 3])):
            pool.submit(
                random_prompt(choice, 8),
                max_tokens=choice.choice([1, 2, 20]),
                salt=choice.choice([None, None, "a", "b"]),
                lora=choice.choice([None, None, "a"]),
            )
        while pool.busy:
            events = pool.step()
            naive.apply(events)
            seen.update(type(event).__name__ for event in events)
            assert naive.held() == pool.held()
            assert naive.cpu == pool.cpu_held()
            assert min(naive.gpu.values(), default=0) >= 0
        if choice.random() < 0.03:
            assert pool.reset()
            assert pool.held() == {}
    assert seen["BlockStored"]
    assert seen["BlockRemoved"] or shape == POOLS["roomy"]
    if "set_like" in shape:
        assert set(pool.held().values()) == {1}


def test_duplicates_are_kept_and_removed_one_by_one() -> None:
    pool = BlockPool(16, 4)
    for _ in range(3):
        pool.submit(range(8))
        pool.step()
    last = pool.digests(range(8))[1]
    assert pool.held()[(0, last)] == 3
    removals: list[BlockRemoved] = []
    for start in range(100, 400, 100):
        pool.submit(range(start, start + 32))
        removals += [event for event in pool.step() if isinstance(event, BlockRemoved)]
    assert all(len(event.block_hashes) == 1 for event in removals)
    assert sum(event.block_hashes == (last,) for event in removals) == 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", POOLS.values(), ids=POOLS)
def test_cached_tokens_predicts_what_a_lone_request_reports(shape: dict[str, Any], seed: int) -> None:
    choice = random.Random(seed)
    pool = BlockPool(block_size=8, **shape)
    hits = 0
    for _ in range(200):
        prompt, salt = random_prompt(choice, 8), choice.choice([None, None, "a"])
        expected = pool.cached_tokens(prompt, salt)
        request = pool.submit(prompt, salt=salt, max_tokens=choice.choice([1, 9]))
        while pool.busy:
            pool.step()
        assert request.result.cached_tokens == expected
        limit = len(prompt) if shape.get("cpu_blocks") else len(prompt) - 1
        assert expected <= limit
        hits += expected > 0
    assert hits > 20


def test_full_blocks_are_those_that_all_but_the_last_sampled_token_fill() -> None:
    for prompt, output in [(7, 1), (7, 2), (8, 1), (9, 8), (3, 30), (16, 17)]:
        pool = BlockPool(64, 8)
        pool.submit(range(prompt), max_tokens=output)
        while pool.busy:
            pool.step()
        assert sum(pool.held().values()) == (prompt + output - 1) // 8


def test_chunks_continue_where_the_chunk_before_ended() -> None:
    pool = BlockPool(64, 4, max_step_tokens=10)
    pool.submit(range(30))
    stores = [event for _ in range(3) for event in pool.step() if isinstance(event, BlockStored)]
    assert [event.base_block_idx for event in stores] == [0, 2, 5]
    assert [event.parent_block_hash for event in stores[1:]] == [event.block_hashes[-1] for event in stores[:-1]]
    assert [token for event in stores for token in event.token_ids] == list(range(28))


def test_reset_is_announced_first_thing_in_the_next_step() -> None:
    pool = BlockPool(64, 4)
    pool.submit(range(8))
    pool.step()
    assert pool.reset()
    assert pool.step() == []
    pool.submit(range(8))
    assert [type(event) for event in pool.step()] == [AllBlocksCleared, BlockStored]


def test_reset_fails_while_a_request_runs() -> None:
    pool = BlockPool(64, 4)
    pool.submit(range(8), max_tokens=5)
    pool.step()
    assert not pool.reset()
    assert pool.held()


def test_salt_lora_and_images_separate_what_the_same_tokens_would_share() -> None:
    pool, tokens = BlockPool(64, 4), list(range(12))
    images = [MultimodalItem("cat", 5, 2)]
    scopes: list[dict[str, Any]] = [
        {},
        {"salt": "x"},
        {"lora": "x"},
        {"lora": "x", "salt": "x"},
        {"multimodal": images},
    ]
    stores: list[BlockStored] = []
    for scope in scopes:
        pool.submit(tokens, **scope)
        stores += [event for event in pool.step() if isinstance(event, BlockStored)]
    assert [event.extra_keys for event in stores] == [
        (None, None, None),
        (("x",), None, None),
        (("x",), ("x",), ("x",)),
        (("x", "x"), ("x",), ("x",)),
        ((("cat", 1),), None),
    ]
    assert stores[4].base_block_idx == 1  # the block before the image is shared
    digests = [digest for event in stores for digest in event.block_hashes]
    assert len(set(digests)) == len(digests)


def test_the_hash_seed_changes_every_hash() -> None:
    first, second = (BlockPool(8, 4, hash_seed=seed).digests(range(12)) for seed in (1, 2))
    assert not set(first) & set(second)


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="needs 3 blocks, the pool has 2"):
        BlockPool(3, 4).submit(range(9))


# -- against recorded engines ----------------------------------------------------------------------


def lines(recording: str, file: str) -> list[Any]:
    return [json.loads(line) for line in (RECORDINGS / recording / file).read_text().splitlines()]


def recorded_groups(recording: str) -> Iterable[list[dict[str, Any]] | None]:
    """Yield the requests that ran together, and None for a reset of the cache."""
    rows = lines(recording, "requests.jsonl")
    for key, group in groupby(rows, key=lambda row: (row["kind"], row.get("last_seq_before"))):
        if key[0] == "batch":
            yield from (row["requests"] for row in group)
        elif key[0] == "request":
            yield list(group)
        elif key[0] == "action":
            yield None


def relive(recording: str, pool: BlockPool) -> tuple[list[list[Event]], int, int]:
    """Send a recording's requests to a pool; return its batches, equal and all `cached_tokens` reports."""
    batches, right, total = [], 0, 0
    for group in recorded_groups(recording):
        if group is None:
            assert pool.reset()
            continue
        requests = [
            pool.submit(
                row["prompt_token_ids"],
                salt=row.get("cache_salt"),
                lora=(row.get("lora") or [None])[0],
                output=row["output_token_ids"] or [0],
            )
            for row in group
        ]
        while pool.busy:
            if events := pool.step():
                batches.append(events)
        right += sum(
            request.result.cached_tokens == row["cached_tokens"] for request, row in zip(requests, group, strict=True)
        )
        total += len(group)
    return batches, right, total


def test_the_pool_lives_through_a_recorded_day_of_vllm_event_by_event() -> None:
    """Same requests, same batches in the same order, same copies after each: only the hashes have other names."""
    batches, right, total = relive("inproc-0.32-llama", BlockPool(48, 32))
    recorded = lines("inproc-0.32-llama", "decoded.jsonl")
    truth = lines("inproc-0.32-llama", "truth.jsonl")
    assert (right, total, len(batches)) == (61, 61, len(recorded))
    names: dict[bytes, int] = {}
    naive = NaiveCounter()
    for ours, theirs, held in zip(batches, recorded, truth, strict=True):
        naive.apply(ours)
        for mine, real in zip(ours, theirs["batch"][1], strict=True):
            assert type(mine).__name__ == real["type"]
            if isinstance(mine, AllBlocksCleared):
                continue
            names.update(zip(mine.block_hashes, real["block_hashes"], strict=True))
            if isinstance(mine, BlockStored):
                assert list(mine.token_ids) == real["token_ids"]
                assert mine.parent_block_hash is None or names[mine.parent_block_hash] == real["parent_block_hash"]
                assert [keys and list(keys) for keys in mine.extra_keys] == real["extra_keys"]
        assert {(group, names[digest]): copies for (group, digest), copies in naive.held().items()} == {
            (group, name): copies for group, name, _, copies in held["held"]
        }
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("recording", "shape", "total"),
    [
        ("pool-0.33.0", {"block_size": 16}, 81),
        ("pool-0.23.0", {"block_size": 16, "reuse_empty_first": False}, 81),
        ("pool-0.9.2", {"block_size": 16, "reuse_empty_first": False}, 81),
        ("inproc-0.32-offload-selfdesc-true", {"block_size": 32, "cpu_blocks": 48}, 61),
    ],
)
def test_the_pool_reports_the_cached_tokens_that_recorded_engines_reported(
    recording: str, shape: dict[str, Any], total: int
) -> None:
    num_blocks = lines(recording, "requests.jsonl")[0]["num_gpu_blocks"]
    _, right, seen = relive(recording, BlockPool(num_blocks, **shape))
    assert (right, seen) == (total, total)


# -- dialects --------------------------------------------------------------------------------------


def sample_events(*, cpu: bool = False) -> list[Event]:
    """Return one step's worth of every kind of event."""
    pool = BlockPool(12, 4, cpu_blocks=5 if cpu else 0)
    events: list[Event] = []
    for start, salt in ((0, None), (50, "s"), (100, None), (0, None)):
        pool.submit(range(start, start + 20), salt=salt)
        while pool.busy:
            events += pool.step()
    pool.reset()
    pool.submit(range(8))
    return events + pool.step()


def decode(payload: bytes) -> list[Any]:
    batch: list[Any] = msgpack.unpackb(payload, strict_map_key=False)
    return batch


def shapes(batches: Iterable[Sequence[Any]]) -> set[tuple[Any, ...]]:
    """Say what can be told of events without their values: fields, in order, or the length of an array."""
    return {
        (event["type"], event.get("medium"), *event) if isinstance(event, dict) else (event[0], len(event))
        for batch in batches
        for event in batch[1]
    }


@pytest.mark.parametrize(
    ("recording", "dialect"),
    [
        ("pool-0.9.2", Vllm((0, 9, 2))),
        ("pool-0.23.0", Vllm((0, 23))),
        ("pool-0.33.0", Vllm((0, 33))),
        ("inproc-0.32-llama", Vllm((0, 32))),
        ("inproc-0.32-offload-selfdesc-true", Vllm((0, 32), self_describing=True)),
    ],
)
def test_events_have_the_shape_of_the_recorded_version(recording: str, dialect: Vllm) -> None:
    recorded = [row["batch"] for row in lines(recording, "decoded.jsonl")]
    ours = decode(dialect.encode(sample_events(cpu="offload" in recording), 1.5, 0))
    assert shapes([ours]) == shapes(recorded)
    assert {len(ours)} == {len(batch) for batch in recorded}
    assert ours[0] == 1.5


def stored(dialect: Vllm, **scope: Any) -> Any:
    pool = BlockPool(8, 4)
    pool.submit(range(8), **scope)
    return decode(dialect.encode(pool.step(), 0.5, 3))[1][0]


def test_array_lengths_grow_with_the_versions() -> None:
    versions = [(0, 9), (0, 10, 1), (0, 10, 2), (0, 13), (0, 14), (0, 17), (0, 20), (0, 22), (0, 23)]
    assert [len(stored(Vllm(version))) for version in versions] == [6, 6, 7, 7, 8, 9, 10, 12, 12]
    assert [len(decode(Vllm(version).encode([], 0.5, 3))) for version in ((0, 9, 0, 1), (0, 9, 2))] == [2, 3]


def test_session_ids_travel_from_0_30_on() -> None:
    assert "session_id" not in stored(Vllm((0, 29)), session_id="s")
    assert stored(Vllm((0, 30)), session_id="s")["session_id"] == "s"


def test_hashes_are_signed_before_0_10_2_then_unsigned_or_bytes() -> None:
    digest = bytes(24) + b"\xff" * 7 + b"\xfe"
    assert Vllm((0, 9)).wire_hash(digest, "GPU") == -2
    assert Vllm((0, 10, 2)).wire_hash(digest, "GPU") == 2**64 - 2
    assert Vllm((0, 32), hash_form=HashForm.BYTES).wire_hash(digest, "GPU") == digest
    assert Vllm((0, 23)).wire_hash(digest, "CPU") == digest
    assert Vllm((0, 24)).wire_hash(digest, "CPU") == 2**64 - 2


def test_multimodal_keys_carry_offsets_from_0_19_on() -> None:
    images = [MultimodalItem("cat", 5, 2)]
    assert stored(Vllm((0, 18)), multimodal=images)[8] == [None, ["cat"]]
    assert stored(Vllm((0, 19)), multimodal=images)[8] == [None, [["cat", 1]]]


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (Vllm((0, 11)), [bytes, None, [], 4]),
        (Vllm((0, 20)), [bytes, None, [], 0]),
        (Vllm((0, 24)), [int, None, [], 0]),
        (Vllm((0, 24), self_describing=True), [int, None, [0, 1, 2, 3], 4]),
    ],
)
def test_offload_events_are_placeholders_unless_told_otherwise(dialect: Vllm, expected: list[Any]) -> None:
    pool = BlockPool(12, 4, cpu_blocks=5)
    events: list[Event] = []
    for _ in range(2):
        pool.submit(range(5), salt="s")
        events += pool.step()
    event = decode(dialect.encode([e for e in events if getattr(e, "medium", None) == "CPU"], 0.5, 0))[1][0]
    values = list(event.values()) if isinstance(event, dict) else event
    assert [type(values[1][0]), *values[2:5]] == expected
    assert "extra_keys" not in event


def test_offloading_before_there_was_any_is_refused() -> None:
    with pytest.raises(ValueError, match="no offload connector"):
        Vllm((0, 10)).encode([BlockRemoved((bytes(32),), "CPU")], 0.5, 0)


@pytest.mark.parametrize("maps", [False, True])
def test_sglang_sends_seven_elements_and_salts_in_a_dict(*, maps: bool) -> None:
    pool = BlockPool(12, 4)
    pool.submit(range(8))
    pool.submit(range(8), salt="s", lora="s")
    plain, salted = decode(Sglang(maps=maps).encode(pool.step(), 0.5, 0))[1]
    if maps:
        plain, salted = list(plain.values()), list(salted.values())
    assert plain[0] == "BlockStored"
    assert plain[3:] == [list(range(8)), 4, None, "GPU"]
    assert salted[7:] == [{"cache_salt": "s"}]


def test_mooncake_maps_carry_both_names_and_milliseconds() -> None:
    store = MooncakeStore()
    stamp, events, _ = decode(store.encode(sample_events(), 1.5, 0))
    assert stamp == 1500
    assert {event["event_type"] for event in events} == {"stored", "removed", "cleared"}
    assert [event["event_id"] for event in events] == list(range(len(events)))
    assert events[0]["seq_hashes"] == events[0]["block_hashes"]
    assert (events[0]["token_ids"], events[0]["parent_hash"], events[0]["medium"]) == (None, None, "cpu")
    bare = decode(MooncakeStore(aliases=False, describing=True).encode(sample_events(), 1.5, 0))[1]
    assert not {"type", "block_hashes", "parent_block_hash"} & {key for event in bare for key in event}
    assert bare[0]["token_ids"] == list(range(20))


def test_llmd_fs_nests_every_event_as_bytes() -> None:
    batch = decode(LlmdFs().encode(sample_events(), 1.5, 0))
    assert len(batch) == 2
    events = [decode(event) for event in batch[1]]
    assert events[0][2:] == [0, [], 0, None, "SHARED_STORAGE"]
    assert LlmdFs().traits.first_seq == 1


# -- traffic ---------------------------------------------------------------------------------------


def test_chats_are_reproducible_and_grow_turn_by_turn() -> None:
    shape = ChatShape(salts=(None, "a"), concurrent_chats=3, max_prompt_tokens=900)
    first, second = ChatTraffic(7, shape), ChatTraffic(7, shape)
    turns: dict[str, tuple[int, ...]] = {}
    continued = 0
    for _ in range(200):
        request, twin = first.next_request(), second.next_request()
        assert request == twin
        assert len(request.tokens) <= 900
        if request.session in turns:
            before = turns[request.session]
            assert request.tokens[: len(before)] == before
            continued += 1
        first.answered(request, [1, 2, 3])
        second.answered(twin, [1, 2, 3])
        turns[request.session] = (*request.tokens, 1, 2, 3)
    assert continued > 50


def test_a_mooncake_trace_gives_equal_tokens_for_equal_hash_ids(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [5, 6, 7]}\n'
        '{"timestamp": 2500, "input_length": 1024, "output_length": 0, "hash_ids": [5, 8]}\n'
    )
    first, second = mooncake_trace(trace)
    assert (len(first.tokens), first.max_tokens, first.at_s) == (1100, 9, 0.0)
    assert (len(second.tokens), second.max_tokens, second.at_s) == (1024, 1, 2.5)
    assert first.tokens[:512] == second.tokens[:512]
    assert first.tokens[512:1024] != second.tokens[512:]
    traffic = TraceTraffic(trace)
    assert [traffic.next_request() for _ in range(3)] == [first, second, first]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"timestamp": 0}', '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}'],
)
def test_a_bad_trace_line_is_named(tmp_path: Path, line: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 1: expected an object with numbers timestamp"):
        list(mooncake_trace(trace))


def test_all_names_what_is_public() -> None:
    assert sorted(testing.__all__) == testing.__all__
    assert all(hasattr(testing, name) for name in testing.__all__)
