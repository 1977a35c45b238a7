"""The users of docs/redis.md: replicas and `inspect` can do all they do with just those rights, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError

from kvindexer.store.layout import Found, shard_tag
from kvindexer.testing import FakeEngine
from live import connected, spec_of, until
from replicas import Replica, contents, eventually, kept, replica
from servers import Cluster, Replicated, Server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "redis.md").read_text()
SECRET = "s3cret"
WRITER, READER = "kvindexer", "kvindexer-read"
SELDOM = {"ping", "asking"}
"""Commands that a connection gives after 15 idle seconds, and while slots move."""
ADMINISTRATION = {"acl|setuser", "acl|log", "config|resetstat", "auth", "info", "cluster|slots", "client|setinfo"}
"""What the tests ask as well; without `info` a replica has a problem, without `cluster|slots` no connection."""


def documented(user: str) -> list[str]:
    """The lines that make a user, as the page has them: for a server, then what a cluster needs as well."""
    lines = re.findall(rf"^ *ACL SETUSER {user} (.*)$", PAGE, re.MULTILINE)
    assert lines, f"docs/redis.md has no user {user}"
    return [line.replace("PASSWORD", SECRET) for line in lines if "sentinel" not in line]


def granted(line: str) -> set[str]:
    """Commands that a line of ACL SETUSER allows."""
    return {word[1:] for word in line.split() if word.startswith("+")}


def allow(servers: Sequence[Server], user: str, lines: Sequence[str]) -> None:
    """Make the user, and begin to count."""
    for server in servers:
        for line in lines:
            server.ask("ACL", "SETUSER", user, *line.split())
        server.ask("CONFIG", "RESETSTAT")
        server.ask("ACL", "LOG", "RESET")


def used(servers: Sequence[Server]) -> set[str]:
    """Commands that were given since `allow`, by clients and scripts, and not refused."""
    counts: dict[str, Any] = {}
    for server in servers:
        counts |= server.ask("INFO", "commandstats")
    return {name.removeprefix("cmdstat_") for name in counts if name.startswith("cmdstat_")} - ADMINISTRATION


def refused(servers: Sequence[Server]) -> list[str]:
    """What was refused since `allow`, but for a name that clients give themselves."""
    lines = [dict(zip(entry[::2], entry[1::2], strict=True)) for one in servers for entry in one.ask("ACL", "LOG")]
    return [f"{line['reason']} {line['object']}" for line in lines if line["object"] != "client|setinfo"]


async def life(url: str) -> None:
    """All that replicas do: write, rewrite, check, load, hold, remove, write again."""
    random = Random(7)
    with FakeEngine() as engine:
        spec = spec_of(engine, "pod-a")
        tag = shard_tag(spec.endpoint, spec)
        async with replica(url, "a") as one:
            one.fleet.register(spec)
            await connected(engine)
            for prompts in (3, 40):  # the second time the shard needs more buckets
                for _ in range(prompts):
                    engine.run_request([random.randrange(1000) for _ in range(1600)])
                await kept(url, one, spec, engine)
            engine.reset()
            engine.run_request(list(range(64)))
            await kept(url, one, spec, engine)
            checked = one.keeper.checks.done
            await until("the shard is compared", lambda: one.keeper.checks.done > checked)
            assert list(one.keeper.problems()) == []
        async with replica(url, "b") as two:
            await kept(url, two, spec, engine)
            server = two.keeper._server
            await server.hold(tag)
            await server.release(tag)
            two.fleet.unregister("pod-a")
            await eventually("the shard is ended", lambda: _ended(url, spec))
            two.fleet.register(spec)
            await connected(engine)
            await kept(url, two, spec, engine)
            assert list(two.keeper.problems()) == []


async def _ended(url: str, spec: Any) -> bool:
    found, _ = await contents(url, spec)
    return isinstance(found, Found) and found.meta is None and not found.leftovers


def test_a_replica_can_do_everything_with_the_documented_rights_and_needs_each_of_them() -> None:
    (line, _) = documented(WRITER)
    with Server() as server:
        allow([server], WRITER, [line])
        asyncio.run(life(server.url_of(WRITER, SECRET)))
        assert refused([server]) == []
        assert used([server]) == granted(line) - SELDOM - ADMINISTRATION


def test_a_replica_of_a_cluster_needs_a_little_more() -> None:
    lines = documented(WRITER)
    with Cluster(replicas=False) as cluster:
        allow(cluster.servers, WRITER, lines)
        asyncio.run(life(cluster.url_of(WRITER, SECRET)))
        assert refused(cluster.servers) == []
        assert used(cluster.servers) == granted(" ".join(lines)) - SELDOM - ADMINISTRATION


def test_sentinels_with_the_documented_user() -> None:
    (line,) = re.findall(r"ACL SETUSER kvindexer (.*\+sentinel.*)$", PAGE, re.MULTILINE)
    with Replicated() as watched:
        for server in watched.servers:
            allow([server], WRITER, documented(WRITER)[:1])
        for sentinel in watched.sentinels:
            sentinel.ask("ACL", "SETUSER", WRITER, *line.replace("PASSWORD", SECRET).split())
        url = watched.url.replace("://", f"://{WRITER}:{SECRET}@") + "?sentinel_auth=same"
        asyncio.run(life(url))
        assert refused(watched.servers) == []


@pytest.mark.parametrize("namespace", ["kvindexer-2", "other"])
def test_the_rights_end_at_the_namespace(namespace: str) -> None:
    """What is refused shows in problems, with a hint, and the answers go on."""

    async def scenario(url: str) -> None:
        with FakeEngine() as engine:
            spec = spec_of(engine, "pod-a")
            async with replica(url, "a", sources=(spec,), store_namespace=namespace) as one:
                await connected(engine)
                engine.run_request(list(range(64)))
                await until("it answers", lambda: one.holds(engine))
                await until("the problem shows", lambda: _reasons(one) == {"no_rights"})
                assert all("docs/redis.md" in problem.hint for problem in one.keeper.problems())

    with Server() as server:
        allow([server], WRITER, documented(WRITER)[:1])
        asyncio.run(scenario(server.url_of(WRITER, SECRET)))
        assert server.ask("DBSIZE") == 0


def _reasons(one: Replica) -> set[str]:
    return {problem.reason for problem in one.keeper.problems()}


async def _one_source(url: str) -> str:
    with FakeEngine() as engine:
        spec = spec_of(engine, "pod-a")
        async with replica(url, "a") as one:
            one.fleet.register(spec)
            await connected(engine)
            engine.run_request(list(range(64)))
            await kept(url, one, spec, engine)
    return spec.endpoint


def inspected(url: str, *arguments: str) -> Any:
    """What `kvindexer inspect` says, as JSON."""
    command = [sys.executable, "-m", "kvindexer", "inspect", *arguments, "--json"]
    environ = {**os.environ, "KVINDEXER_STORE": url}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def everything_inspected(url: str, source: str) -> None:
    """All views."""
    assert inspected(url)["sources"][0]["source"] == source
    shown = inspected(url, "source", source)
    assert shown["memory_bytes"] > 0
    entry = inspected(url, "entries", source)["records"][0]
    (asked,) = inspected(url, "holders", entry["key"])["keys"]
    assert asked["holders"][0]["hash"] == entry["hash"]


def test_inspect_can_do_everything_with_the_documented_rights_and_needs_each_of_them() -> None:
    (line, _) = documented(READER)
    with Server() as server:
        source = asyncio.run(_one_source(server.url))
        allow([server], READER, [line])
        url = server.url_of(READER, SECRET)
        everything_inspected(url, source)
        assert refused([server]) == []
        assert used([server]) == granted(line) - SELDOM - ADMINISTRATION


def test_inspect_of_a_cluster() -> None:
    lines = documented(READER)
    with Cluster(replicas=False) as cluster:
        source = asyncio.run(_one_source(cluster.url))
        allow(cluster.servers, READER, lines)
        everything_inspected(cluster.url_of(READER, SECRET), source)
        assert refused(cluster.servers) == []
        assert used(cluster.servers) == granted(" ".join(lines)) - SELDOM - ADMINISTRATION


def test_without_the_right_to_ask_for_memory_inspect_shows_the_rest() -> None:
    line = documented(READER)[0].replace(" +memory|usage", "")
    with Server() as server:
        source = asyncio.run(_one_source(server.url))
        allow([server], READER, [line])
        shown = inspected(server.url_of(READER, SECRET), "source", source)
        assert (shown["memory_bytes"], shown["digest"]["entries"]) == (None, 4)


def test_the_reader_cannot_write() -> None:
    with Server() as server:
        allow([server], READER, documented(READER)[:1])
        server.ask("HSET", "{kvindexer}:sources", "#version", "1")
        for command in (("HSET", "{kvindexer}:sources", "a", "b"), ("UNLINK", "{kvindexer}:sources"), ("KEYS", "*")):
            with pytest.raises(NoPermissionError):
                _as_reader(server, *command)
        assert _as_reader(server, "HGETALL", "{kvindexer}:sources")


def _as_reader(server: Server, *words: str) -> Any:
    with Redis.from_url(server.url_of(READER, SECRET)) as client:
        return client.execute_command(*words)
