"""`kvindexer inspect`, and docs/redis.md as a description for other programs: what they read is what was written."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from api_server import batch, stored
from kvindexer.cli import main
from kvindexer.index.engine import PyIndex
from kvindexer.index.records import read
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Checkpoint, Coverage, Names, buckets_for, pack_records, pack_spec, shard_tag
from kvindexer.store.server import Author, Refusal, ShardServer
from kvindexer.types import Keyspace, SourceSpec
from servers import Server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "redis.md").read_text()
PROMPT = list(range(24))
REMOVED = {"type": "BlockRemoved", "block_hashes": [1000], "medium": "GPU", "group_idx": 0}


def spec(instance: str, **changes: Any) -> SourceSpec:
    values: dict[str, Any] = {"model": "m", "block_size": 4, "endpoint": f"tcp://{instance}:5557"}
    return SourceSpec(**{"instance": instance, **values, **changes})


class Written:
    """An index, and a copy of it in Redis as replicas write it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.index = PyIndex()
        self.generation = 0

    def source(self, spec: SourceSpec, *payloads: bytes) -> str:
        """A source that has sent these messages."""
        self.index.attach(spec.endpoint, spec)
        for payload in payloads:
            self.index.apply(spec.endpoint, payload)
        self.write(spec, len(payloads))
        return spec.endpoint

    def write(self, spec: SourceSpec, upto: int = 0, kind: str = "registered") -> None:
        """Write it anew."""
        asyncio.run(self._with_server(lambda server: self._write(server, spec, upto, kind)))

    def unregister(self, spec: SourceSpec) -> None:
        """End its shard, and say so in the directory."""

        async def end(server: ShardServer) -> None:
            generation = await server.register(spec.endpoint, "removed", pack_spec(spec), None, 0)
            assert await server.remove(shard_tag(spec.endpoint, spec), generation) is None

        asyncio.run(self._with_server(end))

    async def _with_server(self, work: Callable[[ShardServer], Any]) -> None:
        settings = Settings(store=self.url)  # type: ignore[arg-type]  # as an operator writes it
        server = ShardServer(open_client(settings), Names("kvindexer"), 10)
        try:
            await work(server)
        finally:
            await server.close()

    async def _write(self, server: ShardServer, spec: SourceSpec, upto: int, kind: str) -> None:
        name, packed = spec.endpoint, pack_spec(spec)
        tag = shard_tag(name, spec)
        registration = await server.register(name, kind, packed, None, 0)
        author = Author("replica-a", name, packed, registration)
        hashes = self.index.hashes(name)
        buckets = buckets_for(len(hashes))
        records = pack_records(hashes, self.index.records(name, hashes), buckets)
        self.generation += 1
        generation = f"{self.generation:08x}"
        assert not isinstance(await server.stage(tag, author, generation, buckets, records, begin=True), Refusal)
        checkpoint = Checkpoint(3, upto, b"last message 16.", b"first message 16", Coverage(2, 0))
        (found,) = await server.read([tag])
        expected = getattr(getattr(found, "meta", None), "checkpoint", None)
        answer = await server.switch(
            tag,
            author,
            generation=generation,
            expected=None if expected is None else expected.epoch,
            upto=checkpoint,
            facts=self.index.facts(name),
            packed=b"",
            accept_less=True,
        )
        assert answer == len(hashes)


@pytest.fixture
def written(redis_server: Server, monkeypatch: pytest.MonkeyPatch) -> Written:
    monkeypatch.setenv("KVINDEXER_STORE", redis_server.url)
    return Written(redis_server.url)


class Said:
    """What a command printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: str) -> Said:
        capsys.readouterr()
        try:
            code = main(["inspect", *arguments])
        except SystemExit as end:
            code = int(str(end.code))
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


Inspect = Callable[..., Said]


def answer(said: Said) -> Any:
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out)


# Sources


def test_sources_are_shown_as_they_are_kept(written: Written, inspect: Inspect) -> None:
    written.source(spec("pod-a", rank=1), batch(stored(PROMPT)), batch(stored(PROMPT[:4], first=2, medium="CPU")))
    written.source(spec("pod-b", tenant="acme", model="other"))
    shown = answer(inspect("--json"))
    assert shown["namespace"] == "kvindexer"
    first, second = shown["sources"]
    assert first == {
        "source": "tcp://pod-a:5557",
        "instance": "pod-a",
        "model": "m",
        "tenant": "default",
        "kind": "registered",
        "registration": 1,
        "shard": shard_tag("tcp://pod-a:5557", spec("pod-a", rank=1)),
        "epoch": 3,
        "seq": 1,
        "coverage": {"level": 2, "word": "complete", "first": 0},
        "entries": 7,
        "buckets": 1,
        "generation": "00000001",
        "writer": "replica-a",
    }
    assert (second["instance"], second["seq"], second["entries"]) == ("pod-b", None, 0)
    table = inspect().out
    assert re.search(
        r"tcp://pod-a:5557 pod-a +m +default +registered +3 +1 complete +7 +1 00000001 +replica-a", table
    )
    assert "2 sources with 7 entries in namespace kvindexer" in table


def test_sources_can_be_narrowed_by_tenant_and_model(written: Written, inspect: Inspect) -> None:
    written.source(spec("a", tenant="acme"))
    written.source(spec("b", model="other"))
    for flags, expected in (
        (("--tenant", "acme"), ["a"]),
        (("--tenant", "default"), ["b"]),
        (("--model", "other"), ["b"]),
        (("--model", "other", "--tenant", "acme"), []),
        ((), ["a", "b"]),
    ):
        shown = answer(inspect("sources", "--json", *flags))
        assert [one["instance"] for one in shown["sources"]] == expected


def test_what_was_unregistered_is_counted_and_what_is_without_content_is_shown(
    written: Written, inspect: Inspect
) -> None:
    gone = spec("gone")
    written.source(gone)
    written.unregister(gone)
    shown = answer(inspect("--json"))
    assert (shown["sources"], shown["unregistered"]) == ([], 1)
    assert "1 unregistered" in inspect().out
    assert "Redis holds nothing of source tcp://gone:5557" in inspect("source", "tcp://gone:5557").err


def test_an_empty_namespace_says_what_to_look_at(written: Written, inspect: Inspect) -> None:
    written.source(spec("a"))
    said = inspect("--namespace", "other")
    assert said.code == 0
    assert "0 sources with 0 entries in namespace other" in said.out
    assert "--namespace" in said.out


# One source


def test_a_source_with_its_digest_facts_and_memory(written: Written, inspect: Inspect, redis_server: Server) -> None:
    chosen = spec("pod-a", readers=(), speculative_blocks=1)
    name = written.source(chosen, batch(stored(PROMPT)), batch(stored(PROMPT[:4], first=2, medium="CPU"), rank=2))
    shown = answer(inspect("source", "pod-a", "--json"))
    hashes = written.index.hashes(name)
    xor = 0
    for block_hash, record in zip(hashes, written.index.records(name, hashes), strict=True):
        xor ^= xxh3_64_intdigest(struct.pack("<Q", block_hash) + record)
    assert shown["digest"] == {"entries": 7, "xor": f"{xor:016x}", "of_one_moment": True}
    assert (shown["last_message"], shown["first_message"]) == (b"last message 16.".hex(), b"first message 16".hex())
    assert [(group["rank"], group["tail_blocks"], group["seen_lower"]) for group in shown["facts"]["groups"]] == [
        (0, 0, False),
        (2, 0, True),
    ]
    assert shown["spec"] == json.loads(pack_spec(chosen))
    keys = [key for key in redis_server.ask("KEYS", f"*{shown['shard']}*") if not key.endswith("hold")]
    assert shown["memory_bytes"] == sum(redis_server.ask("MEMORY", "USAGE", key) for key in keys)
    table = inspect("source", name).out
    assert f"7 entries, xor {xor:016x}" in table
    assert re.search(r"speculative blocks +1\b", table)


def test_an_instance_with_several_sources_asks_for_one(written: Written, inspect: Inspect) -> None:
    for port in (1, 2):
        written.source(spec("pod-a", endpoint=f"tcp://pod-a:{port}"))
    said = inspect("source", "pod-a")
    assert said.code == 1
    assert "tcp://pod-a:1, tcp://pod-a:2" in said.err
    assert inspect("source", "tcp://pod-a:2").code == 0
    assert "no source 'pod-z' is kept there" in inspect("source", "pod-z").err


def test_trap_27_salts_are_never_shown(written: Written, inspect: Inspect) -> None:
    name = written.source(spec("pod-a", additional_salt="pepper", model="m"), batch(stored(PROMPT)))
    (key, *_) = [one["key"] for one in answer(inspect("entries", name, "--json"))["records"]]
    for view in (("sources",), ("source", name), ("entries", name), ("holders", key)):
        for form in ((), ("--json",)):
            said = inspect(*view, *form)
            assert said.code == 0
            assert "pepper" not in said.out
    assert answer(inspect("source", name, "--json"))["spec"]["additional_salt"] == "**********"


# Entries


def test_entries_show_places_orphans_links_and_what_is_remembered(written: Written, inspect: Inspect) -> None:
    name = written.source(
        spec("pod-a"),
        batch(stored(PROMPT[:8])),
        batch(stored(PROMPT[:4], medium="CPU"), rank=3),
        batch(stored(PROMPT[:4], first=5, parent_block_hash=77)),
        batch(REMOVED),
        batch({**stored([], medium="CPU"), "block_hashes": [9000], "extra_keys": None}),
    )
    shown = {one["hash"]: one for one in answer(inspect("entries", name, "--json"))["records"]}
    place = {"rank": 0, "group": 0, "tier": "gpu", "ownership": None, "block_size": 4, "copies": 1}
    lower = {**place, "tier": "cpu"}
    assert shown[f"{1000:#018x}"]["places"] == [{**lower, "rank": 3}]
    assert shown[f"{1001:#018x}"]["places"] == [place]
    waiting, bare = shown[f"{5000:#018x}"], shown[f"{9000:#018x}"]
    assert (waiting["key"], waiting["waits_for"], waiting["places"]) == (None, f"{77:#018x}", [place])
    assert (bare["key"], bare["waits_for"], bare["places"]) == (None, None, [lower])
    table = inspect("entries", "pod-a").out
    assert re.search(r"0x0+1388 - +0 +0 gpu +- +1 orphan, waits for 0x0+4d\b", table)
    assert re.search(r"0x0+2328 - +0 +0 cpu +- +1 orphan\b", table)
    written.index.apply(name, batch({**REMOVED, "block_hashes": [1001]}))
    written.write(spec("pod-a"), 6)
    assert re.search(r"0x0+3e9 0x\w{16} +- +- - +- +- held by nobody, remembered", inspect("entries", "pod-a").out)


def test_entries_end_at_the_limit(written: Written, inspect: Inspect) -> None:
    written.source(spec("pod-a"), batch(stored(list(range(4 * 3000)))))
    assert len(answer(inspect("entries", "pod-a", "--json"))["records"]) == 50
    assert len(answer(inspect("entries", "pod-a", "--json", "--limit", "2500"))["records"]) == 2500
    whole = answer(inspect("entries", "pod-a", "--json", "--limit", "0"))
    assert {one["hash"] for one in whole["records"]} == {f"{1000 + n:#018x}" for n in range(3000)}
    assert (whole["entries"], whole["of_one_generation"]) == (3000, True)
    assert "7 of 3000 records" in inspect("entries", "pod-a", "--limit", "7").out
    written.source(spec("empty"))
    assert answer(inspect("entries", "empty", "--json"))["records"] == []


# Holders


def holders(shown: Any) -> list[list[tuple[str, str, int, str]]]:
    return [
        sorted({(one["source"], one["instance"], one["rank"], one["tier"]) for one in asked["holders"]})
        for asked in shown["keys"]
    ]


def located(index: PyIndex, keys: list[int]) -> list[list[tuple[str, str, int, str]]]:
    found = index.locate(Keyspace("default", "m", "", 4), keys)
    return [sorted({(one.source, one.instance, one.rank, one.tier.label) for one in held}) for held in found]


def keys_of(inspect: Inspect, source: str) -> list[int]:
    return [int(one["key"], 16) for one in answer(inspect("entries", source, "--json"))["records"] if one["key"]]


def test_holders_are_those_that_the_index_locates(written: Written, inspect: Inspect) -> None:
    one = written.source(
        spec("pod-a"),
        batch(stored(PROMPT)),
        batch(stored(PROMPT[:8], first=3, medium="CPU"), rank=2),
        batch({**REMOVED, "block_hashes": [1002]}),
    )
    written.source(spec("pod-b"), batch(stored(PROMPT[:12], first=7)))
    written.source(spec("disk", type="store", tier="disk", readers=("*",)), batch(stored(PROMPT[:4], first=9)))
    keys = sorted(set(keys_of(inspect, one)))
    assert len(keys) == 6
    shown = answer(inspect("holders", "--json", *map(str, keys)))
    assert holders(shown) == located(written.index, keys)
    assert max(map(len, holders(shown))) == 4
    assert [asked["key"] for asked in shown["keys"]] == [f"{key:#018x}" for key in keys]
    table = inspect("holders", hex(keys[0]), "1").out
    assert re.search(r"0x0+1 nobody", table)
    assert "3 sources of tenant default in namespace kvindexer" in table


def test_a_chunk_holds_the_blocks_that_it_covers(written: Written, inspect: Inspect) -> None:
    chunk = {**stored([], medium="CPU"), "block_hashes": [1002, 1005], "extra_keys": None, "block_size": 12}
    name = written.source(
        spec("pod-a", offload_blocks_per_chunk=3),
        batch(stored(PROMPT)),
        batch(chunk),
        batch({**REMOVED, "block_hashes": [1000, 1001, 1002, 1003, 1004]}),
    )
    keys = sorted(set(keys_of(inspect, name)))
    shown = holders(answer(inspect("holders", "--json", *map(hex, keys))))
    assert shown == located(written.index, keys)
    assert all(any(tier == "cpu" for *_, tier in held) for held in shown)


def test_trap_27_holders_are_those_of_one_tenant(written: Written, inspect: Inspect) -> None:
    """The same tokens have the same key with every tenant; who asks for one doesn't see the others."""
    name = written.source(spec("pod-a"), batch(stored(PROMPT)))
    written.source(spec("pod-b", tenant="acme"), batch(stored(PROMPT)))
    written.source(spec("pod-c", model="other"), batch(stored(PROMPT)))
    key = hex(keys_of(inspect, name)[0])
    for flags, expected in (
        ((), {"pod-a", "pod-c"}),
        (("--tenant", "acme"), {"pod-b"}),
        (("--tenant", "nobody"), set()),
        (("--model", "m"), {"pod-a"}),
    ):
        (asked,) = answer(inspect("holders", key, "--json", *flags))["keys"]
        assert {one["instance"] for one in asked["holders"]} == expected


# A shard that is written while it is read


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something happen between the first two pages of the next shard that is read."""

    def arrange(happens: Callable[[], object]) -> None:
        pages, pending = ShardServer.buckets, [happens]

        async def interrupted(self: ShardServer, tag: str, meta: Any) -> AsyncIterator[Any]:
            async for page in pages(self, tag, meta):
                yield page
                if pending:
                    await asyncio.to_thread(pending.pop())

        monkeypatch.setattr(ShardServer, "buckets", interrupted)

    return arrange


Meanwhile = Callable[[Callable[[], object]], None]


def test_a_shard_that_is_written_anew_while_it_is_read(
    written: Written, inspect: Inspect, meanwhile: Meanwhile, redis_server: Server
) -> None:
    """Its old buckets go in the middle: what can be read again is, what was printed already is marked."""
    chosen = spec("pod-a")
    name = written.source(chosen, batch(stored(list(range(4 * 3000)))))
    hashes = [1000, 3999]
    keys = [hex(read(record, 4).key or 0) for record in written.index.records(name, hashes)]

    def anew() -> None:
        written.write(chosen, 2)
        redis_server.ask("UNLINK", *redis_server.ask("KEYS", f"*:{written.generation - 1:08x}:*"))

    meanwhile(anew)
    shown = answer(inspect("entries", name, "--json", "--limit", "0"))
    assert len(shown["records"]) < 3000
    assert shown["of_one_generation"] is False
    meanwhile(anew)
    assert "some may be missing" in inspect("entries", name, "--limit", "0").out
    meanwhile(anew)
    asked = answer(inspect("holders", *keys, "--json"))["keys"]
    assert [[int(one["hash"], 16) for one in held["holders"]] for held in asked] == [[1000], [3999]]
    meanwhile(anew)
    digest = answer(inspect("source", name, "--json"))["digest"]
    assert (digest["entries"], digest["of_one_moment"]) == (3000, True)


def test_a_shard_that_never_rests_has_no_digest_of_one_moment(
    written: Written, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = spec("pod-a")
    name = written.source(chosen, batch(stored(PROMPT)))
    pages, seqs = ShardServer.buckets, iter(range(2, 100))

    async def never_resting(self: ShardServer, tag: str, meta: Any) -> AsyncIterator[Any]:
        async for page in pages(self, tag, meta):
            yield page
        await asyncio.to_thread(written.write, chosen, next(seqs))

    monkeypatch.setattr(ShardServer, "buckets", never_resting)
    assert answer(inspect("source", name, "--json"))["digest"]["of_one_moment"] is False
    assert "of no single moment" in inspect("source", name).out
    said = inspect("holders", "1")
    assert said.code == 1
    assert "faster than it can be read" in said.err


# What can go wrong


def test_what_cannot_be_used_ends_with_2(written: Written, inspect: Inspect) -> None:
    for arguments in (
        ("--store", "memory"),
        ("--store", "http://localhost"),
        ("--store", "redis://a:b:c"),
        ("--namespace", "{x}"),
        ("holders",),
        ("holders", "-1"),
        ("holders", "0x1ffffffffffffffff"),
        ("holders", "pod-a"),
        ("entries",),
        ("entries", "a", "--limit", "-1"),
        ("--set", "nothing"),
    ):
        said = inspect(*arguments)
        assert (said.code, said.out) == (2, ""), arguments
        assert said.err
    assert written.url not in inspect("--store", "redis://:secret@a:b").err


def test_a_store_that_does_not_answer_says_what_to_check(inspect: Inspect) -> None:
    for view in (("sources",), ("source", "a"), ("entries", "a", "--json"), ("holders", "1")):
        said = inspect("--store", "redis://:hunter2@127.0.0.1:1", *view)
        assert (said.code, said.out) == (1, "")
        assert "127.0.0.1:1" in said.err
        assert "check store" in said.err
        assert "hunter2" not in said.err
        assert len(said.err.splitlines()) == 2


def test_what_is_not_ours_or_damaged_is_named(written: Written, inspect: Inspect, redis_server: Server) -> None:
    name = written.source(spec("pod-a"), batch(stored(PROMPT)))
    shard = answer(inspect("source", name, "--json"))["shard"]
    (bucket,) = redis_server.ask("KEYS", f"*{shard}*:00000001:*")
    with Redis(port=redis_server.port) as client:
        client.hset(bucket, struct.pack("<Q", 1000), b"\xff\x00")
    said = inspect("entries", name)
    assert said.code == 1
    assert "0x00000000000003e8 can't be read" in said.err
    redis_server.ask("HSET", f"{{kvindexer:{shard}}}:meta", "layout", "9")
    shown = answer(inspect("--json"))["sources"][0]
    assert "layout 9" in shown["problem"]
    assert "layout 9" in inspect().out
    assert (inspect("source", name).code, inspect("holders", "1").code) == (1, 0)
    redis_server.ask("HSET", "{kvindexer}:sources", "tcp://odd:1", "what is this?")
    assert "tcp://odd:1: a line of the directory" in inspect().out
    redis_server.ask("DEL", "{kvindexer}:sources")
    redis_server.ask("SET", "{kvindexer}:sources", "mine")
    said = inspect()
    assert said.code == 1
    assert "another program's keys" in said.err


def test_flags_may_stand_before_and_behind_the_view(inspect: Inspect, redis_server: Server, tmp_path: Path) -> None:
    written = Written(redis_server.url)
    written.source(spec("pod-a"))
    config = tmp_path / "kvindexer.yaml"
    config.write_text(f"store: {redis_server.url}\n")
    for arguments in (
        ("--store", redis_server.url, "--json", "sources"),
        ("sources", "--json", "--store", redis_server.url),
        ("--config", str(config), "--json"),
        ("--set", f"store={redis_server.url}", "sources", "--json"),
    ):
        assert len(answer(inspect(*arguments))["sources"]) == 1


def test_on_a_narrow_terminal_the_table_stays_a_table(written: Written) -> None:
    written.source(spec("pod-a"), batch(stored(PROMPT)))
    leader, follower = pty.openpty()
    environ = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "kvindexer", "inspect"]
    done = subprocess.run(command, stdout=follower, stderr=subprocess.PIPE, env=environ, cwd=ROOT, check=False)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "tcp://pod-a:5557" in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.splitlines()) <= 80


# docs/redis.md


def test_the_worked_example_of_a_record_decodes_as_the_page_says() -> None:
    rows = re.findall(r"^\| `([0-9a-f ]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    record = read(bytes.fromhex("".join(row[0] for row in rows)), 16)
    first, second = record.spots
    assert record.key == int(re.findall(r"0x[0-9a-f]{16}", rows[1][1])[0], 16)
    assert (first.name[:3], first.copies) == ((0, 0, 0), 1)
    assert (second.name[:3], second.copies) == ((3, 1, 1), 300)
    assert sum(len(bytes.fromhex(row[0])) for row in rows[:3]) == 10


def test_the_worked_example_of_a_tag_is_right() -> None:
    meaning, tag = re.findall(r'^(\["tcp://.*\])\n-> (\w{16})$', PAGE, re.MULTILINE)[0]
    assert xxh3_64_hexdigest(meaning.encode()) == tag
    example = SourceSpec(instance="any", model="m", block_size=16, endpoint="tcp://10.0.0.11:5557")
    assert shard_tag(example.endpoint, example) == tag


def test_every_field_and_key_is_on_the_page(written: Written, redis_server: Server) -> None:
    one = spec("pod-a")
    written.source(one, batch(stored(PROMPT)))
    meta = f"{{kvindexer:{shard_tag(one.endpoint, one)}}}:meta"
    with Redis(port=redis_server.port) as client:
        fields = {field.decode() for field in client.hgetall(meta)}
    written.write(one, 1)  # leaves the first generation behind
    written.unregister(one)
    with Redis(port=redis_server.port) as client:
        fields |= {field.decode() for field in client.hgetall(meta)}
    assert {"removed", "stage:00000001"} <= fields
    for field in fields:
        assert f"| `{field.replace('00000001', '1a2b3c4d').replace('00000002', '1a2b3c4d')}` |" in PAGE


def test_a_program_that_knows_nothing_but_the_page_reads_the_index(
    written: Written, inspect: Inspect, redis_server: Server
) -> None:
    """What is below uses nothing of ours: it was written from docs/redis.md."""
    name = written.source(
        spec("pod-a", lora="a"),
        batch(stored(PROMPT)),
        batch(stored(PROMPT[:4], medium="CPU", first=2), rank=300),
        batch(stored(PROMPT[:4], first=5, parent_block_hash=77)),
    )
    found = {}
    with Redis(port=redis_server.port) as client:
        lines: Any = client.hgetall("{kvindexer}:sources")
        spec_json = json.loads(lines[name.encode()].split(b":", 2)[2])
        names = (
            "endpoint topic rank model block_size tenant type lora additional_salt tier report_mode "
            "offload_blocks_per_chunk clear_lower_tiers"
        )
        usual: dict[str, Any] = {"topic": "", "rank": 0, "tenant": "default", "type": "vllm", "lora": None}
        usual |= {"additional_salt": "", "tier": None, "report_mode": "normal"}
        usual |= {"offload_blocks_per_chunk": 1, "clear_lower_tiers": False, **spec_json}
        tag = xxh3_64_hexdigest(json.dumps([name, *(usual[field] for field in names.split())]).encode())
        meta: Any = client.hgetall(f"{{kvindexer:{tag}}}:meta")
        for number in range(int(meta[b"buckets"])):
            bucket: Any = client.hgetall(f"{{kvindexer:{tag}}}:{meta[b'generation'].decode()}:{number}")
            for field, record in bucket.items():
                assert struct.unpack("<Q", field)[0] & (int(meta[b"buckets"]) - 1) == number
                found[f"{struct.unpack('<Q', field)[0]:#018x}"] = _as_the_page_says(record, spec_json["block_size"])
    assert len(found) == int(meta[b"entries"]) == 8
    shown = answer(inspect("entries", name, "--json", "--limit", "0"))["records"]
    assert found == {
        one["hash"]: (one["key"], one["waits_for"], [tuple(place.values()) for place in one["places"]])
        for one in shown
    }


def _as_the_page_says(record: bytes, block_size: int) -> tuple[str | None, str | None, list[tuple[Any, ...]]]:
    at = 1

    def word() -> str:
        nonlocal at
        at += 8
        return f"{int.from_bytes(record[at - 8 : at], 'little'):#018x}"

    def uvarint() -> int:
        nonlocal at
        number, shift = 0, 0
        while True:
            at += 1
            number |= (record[at - 1] & 127) << shift
            shift += 7
            if record[at - 1] < 128:
                return number

    flags, places = record[0], []
    key = word() if flags & 1 else None
    parent, _ = (word(), word()) if flags & 2 else (None, None)
    _ = word() if flags & 4 else None
    _ = uvarint() if flags & 8 else None
    while at < len(record):
        head, at = record[at], at + 1
        rank, group = uvarint() if head & 4 else 0, uvarint() if head & 8 else 0
        length = uvarint() if head & 16 else None
        owner = None if length is None else record[at : at + length].decode()
        at += length or 0
        copies, size = uvarint() if head & 32 else 1, uvarint() if head & 64 else block_size
        places.append((rank, group, ("gpu", "cpu", "disk", "remote")[head & 3], owner, size, copies))
    return key, parent, places
