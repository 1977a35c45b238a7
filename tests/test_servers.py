"""The client against every kind of real server, and every kind of trouble with one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio.cluster import RedisCluster

from kvindexer.errors import StoreError
from kvindexer.settings import Settings
from kvindexer.store.address import read_address
from kvindexer.store.condition import Problem, examine
from kvindexer.store.connect import CLIENT_NAME, Client, open_client
from kvindexer.store.failures import asking
from kvindexer.testing import FaultProxy, LinkFaults
from servers import PATIENCE_S, Cluster, Replicated, Server
from tls_front import TlsFront

USER = "user kvindexer on >secret ~kvindexer:* +get +set +info +ping +client|setname +command +cluster|slots +asking"
ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


def with_client(store: str, scenario: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    """Run a scenario with a client as the service has it."""

    async def run() -> Any:
        client = open_client(Settings(store=read_address(store), **options))
        try:
            return await scenario(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


async def patiently(client: Client, *words: Any) -> Any:
    """Give a command until it is carried out, as the service does during a failover."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            async with asking(3.0):
                return await client.execute_command(*words)
        except StoreError as error:
            assert time.monotonic() < deadline, error  # noqa: PT017 - about its not ending, not about the error
        await asyncio.sleep(0.02)


def reason(store: str, *words: Any, **options: Any) -> str:
    """Why a command fails."""

    async def ask(client: Client) -> None:
        async with asking(5.0):
            await client.execute_command(*(words or ("GET", "kvindexer:a")))

    with pytest.raises(StoreError) as caught:
        with_client(store, ask, **options)
    assert caught.value.hint
    assert "secret" not in str(caught.value)
    return caught.value.reason


async def set_and_get(client: Client) -> None:
    await client.set("kvindexer:a", b"\xff\x00")
    assert await client.get("kvindexer:a") == b"\xff\x00"
    assert await client.eval(ADD, 1, "kvindexer:n", 5) >= 5


def test_one_server(redis_server: Server) -> None:
    with_client(redis_server.url, set_and_get)
    assert redis_server.ask("EXISTS", "kvindexer:a", "kvindexer:n") == 2


def test_the_server_knows_us_by_name(redis_server: Server) -> None:
    async def name(client: Client) -> bytes:
        listed: bytes = await client.execute_command("CLIENT", "GETNAME")
        return listed

    assert with_client(redis_server.url, name) == CLIENT_NAME.encode()


def test_a_database_of_its_own(redis_server: Server) -> None:
    with_client(f"{redis_server.url}/3", set_and_get)
    assert redis_server.ask("DBSIZE") == 0
    redis_server.ask("FLUSHALL")


def test_many_commands_at_once_share_few_connections(redis_server: Server, redis_cluster: Cluster) -> None:
    async def at_once(client: Client) -> None:
        await asyncio.gather(*(client.incr("kvindexer:n") for _ in range(200)))

    for store, server in ((redis_server.url, redis_server), (redis_cluster.url, redis_cluster.owner("kvindexer:n"))):
        before = int(server.info()["total_connections_received"])
        with_client(store, at_once)
        assert server.ask("GET", "kvindexer:n") == "200"
        assert int(server.info()["total_connections_received"]) <= before + 12  # 8, and what this test asks itself


def test_a_command_that_was_cut_off_never_answers_the_next(redis_server: Server, redis_cluster: Cluster) -> None:
    """A deadline may fall between a command and its answer: that connection must not be used again."""
    owner = redis_cluster.owner("{k}")

    async def cut_off(client: Client, proxy: FaultProxy) -> None:
        for number in range(20):
            await client.set(f"{{k}}{number}", number)
        proxy.faults = LinkFaults(latency_s=0.01)
        cut = 0
        for number in range(30):
            try:
                async with asking((2.0, 0.001, 2.0, 0.005, 2.0, 0.015)[number % 6]):
                    assert await client.get(f"{{k}}{number % 20}") == str(number % 20).encode()
            except StoreError:
                cut += 1
        assert 5 < cut < 20

    def remapped(proxy: FaultProxy) -> Callable[[Client], Awaitable[None]]:
        async def scenario(client: Client) -> None:
            if isinstance(client, RedisCluster):
                client.nodes_manager.address_remap = lambda address: (
                    (address[0], proxy.port) if address[1] == owner.port else address
                )
            await cut_off(client, proxy)

        return scenario

    for store, port in ((None, redis_server.port), (redis_cluster.url, owner.port)):
        with FaultProxy("127.0.0.1", port) as proxy:
            with_client(store or f"redis://127.0.0.1:{proxy.port}", remapped(proxy))


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """Only an administrator with a password and our user with least rights may in."""
    with Server(password="admin", users=(USER,)) as server:
        yield server


def test_a_user_with_few_rights(guarded: Server, tmp_path: Path) -> None:
    async def get(client: Client) -> Any:
        return await client.get("kvindexer:a")

    guarded.ask("SET", "kvindexer:a", 1)
    url, file = guarded.url_of().replace("://", "://kvindexer@"), tmp_path / "password"
    file.write_text("secret\n")
    assert with_client(guarded.url_of("kvindexer", "secret"), get) == b"1"
    assert with_client(url, get, store_password=SecretStr("secret")) == b"1"
    assert with_client(url, get, store_password_file=file) == b"1"


def test_a_password_that_is_changed_in_its_file_is_used_by_the_next_connection(
    own_redis_server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    own_redis_server.ask("CONFIG", "SET", "requirepass", "first")

    async def through_the_change(client: Client) -> Any:
        await client.set("a", 1)
        own_redis_server.password = "first"
        own_redis_server.ask("CONFIG", "SET", "requirepass", "second")
        file.write_text("second")
        own_redis_server.password = "second"
        own_redis_server.ask("CLIENT", "KILL", "TYPE", "normal")
        return await patiently(client, "GET", "a")

    assert with_client(own_redis_server.url, through_the_change, store_password_file=file) == b"1"


def test_who_may_not_is_told_why(guarded: Server, tmp_path: Path) -> None:
    assert reason(guarded.url_of()) == "auth"
    assert reason(guarded.url_of("kvindexer", "secret2")) == "auth"
    assert reason(guarded.url_of("kvindexer", "secret"), "GET", "other") == "no_rights"
    assert reason(guarded.url_of("kvindexer", "secret"), "FLUSHALL") == "no_rights"
    file = tmp_path / "password"
    file.write_text("secret")
    settings = Settings(store=read_address(guarded.url_of()), store_password_file=file)
    file.unlink()

    async def ask() -> None:
        client = open_client(settings)
        try:
            async with asking(5.0):
                await client.get("a")
        finally:
            await client.aclose()

    with pytest.raises(StoreError) as caught:
        asyncio.run(ask())
    assert caught.value.reason == "no_password"


def test_wrong_addresses_are_told_apart(redis_server: Server, redis_cluster: Cluster) -> None:
    node = redis_cluster.servers[0]
    elsewhere = next(key for key in map(str, range(99)) if redis_cluster.owner(key) is not node)
    assert reason(node.url, "GET", elsewhere) == "moved"
    assert reason(redis_server.url.replace("redis:", "redis+cluster:")) == "not_a_cluster"
    assert reason(redis_server.url.replace("redis:", "redis+sentinel:") + "/main") in ("no_primary", "refused")
    assert reason(redis_server.url.replace("redis:", "rediss:")) in ("tls", "unreachable", "timeout")
    assert reason("redis://127.0.0.1:1") == "unreachable"
    assert reason("redis+sentinel://127.0.0.1:1/main") == "no_primary"
    assert reason("redis+cluster://127.0.0.1:1") in ("cluster_down", "unreachable")
    assert reason("redis://no-such-host.invalid") == "unknown_host"


@pytest.mark.parametrize("store", ["redis://{}", "redis+sentinel://{}/main", "redis+cluster://{}"])
def test_silence_is_waited_for_once(store: str, own_redis_server: Server) -> None:
    """Nothing of redis-py's retries is left; its defaults take up to a minute."""
    own_redis_server.pause()
    url = store.format(own_redis_server.url.removeprefix("redis://"))
    began = time.monotonic()
    assert reason(url, store_timeout_s=0.2) in ("timeout", "no_primary", "cluster_down")
    assert time.monotonic() - began < 2.0


def test_a_connection_survives_pause_kill_and_restart(own_redis_server: Server) -> None:
    server = own_redis_server

    async def through_it_all(client: Client) -> None:
        await client.set("a", 1)
        server.pause()
        with pytest.raises(StoreError) as caught:
            async with asking(5.0):
                await client.get("a")
        assert caught.value.reason == "timeout"
        server.resume()
        assert await patiently(client, "GET", "a") == b"1"
        server.restart(keep_data=True)
        assert await patiently(client, "GET", "a") == b"1"
        server.kill()
        with pytest.raises(StoreError) as caught:
            async with asking(5.0):
                await client.get("a")
        assert caught.value.reason == "unreachable"
        server.start()
        assert await patiently(client, "GET", "a") == b"1", "the file that the restart had saved"
        server.restart(keep_data=False)
        assert await patiently(client, "GET", "a") is None

    with_client(server.url, through_it_all, store_timeout_s=0.3)


def test_a_broken_network(redis_server: Server) -> None:
    with FaultProxy("127.0.0.1", redis_server.port) as proxy:

        async def through_faults(client: Client) -> None:
            await client.set("a", 1)
            for fault in (LinkFaults(reset=True), LinkFaults(down=True), LinkFaults(blackhole=True)):
                proxy.faults = fault
                with pytest.raises(StoreError) as caught:
                    async with asking(5.0):
                        await client.get("a")
                assert caught.value.reason in ("unreachable", "timeout")
                proxy.faults = LinkFaults()
                assert await patiently(client, "GET", "a") == b"1"

        with_client(f"redis://127.0.0.1:{proxy.port}", through_faults, store_timeout_s=0.3)


def test_tls(redis_server: Server) -> None:
    with TlsFront(redis_server.port) as front:
        with_client(front.url(), set_and_get)
        assert reason(front.url(trust=False)) == "tls"
        with_client(front.url(trust=False, ssl_cert_reqs="none"), set_and_get)
    with TlsFront(redis_server.port, name="redis.example") as front:
        assert reason(front.url()) == "tls", "the certificate is somebody else's"
        with_client(front.url(ssl_check_hostname="false"), set_and_get)
        assert reason(front.url(trust=False, ssl_check_hostname="false")) == "tls"


def test_tls_with_a_certificate_of_our_own(redis_server: Server) -> None:
    with TlsFront(redis_server.port, client_certificates=True) as front:
        with_client(front.url(certfile=str(front.certfile), keyfile=str(front.keyfile)), set_and_get)
        assert reason(front.url()) in ("tls", "unreachable")


def test_sentinels_and_their_failover() -> None:
    with Replicated(password="secret") as servers:

        async def through_a_failover(client: Client) -> None:
            await set_and_get(client)
            old = servers.primary
            await asyncio.to_thread(servers.failover)
            assert servers.primary is not old
            assert await patiently(client, "GET", "kvindexer:a") == b"\xff\x00"
            await patiently(client, "SET", "kvindexer:a", "of the new one")
            assert servers.primary.ask("GET", "kvindexer:a") == "of the new one"

        with_client(servers.url, through_a_failover, store_timeout_s=0.5)
        assert reason(servers.url.replace("/mymaster", "/other")) == "no_primary"
        replica = next(one for one in servers.servers if one is not servers.primary)
        assert reason(replica.url, "SET", "a", 1) == "read_only"
        assert [problem.reason for problem in with_client(replica.url, examine)] == ["read_only"]


def test_a_cluster_its_moves_and_its_failover() -> None:
    with Cluster(users=(USER.replace("~kvindexer:*", "~*"),)) as cluster:

        async def through_moves(client: Client) -> None:
            for number in range(30):
                await client.set(f"{{{number}}}", number)
            old = cluster.owner("{7}")
            await asyncio.to_thread(cluster.move, "{7}", next(one for one in cluster.primaries if one is not old))
            async with asking(5.0):
                assert await client.get("{7}") == b"7", "MOVED is followed"
            target = next(one for one in cluster.primaries if one is not cluster.owner("{8}"))
            await asyncio.to_thread(cluster.begin_move, "{8}", target)
            async with asking(5.0):
                assert await client.get("{8}") == b"8", "still where it was"
                await client.set("{8}new", "x")
            assert cluster.owner("{8}") is not target
            await asyncio.to_thread(cluster.move, "{8}", target)
            async with asking(5.0):
                assert await client.get("{8}new") == b"x", "ASK was followed"
            lost = cluster.owner("{9}")
            await asyncio.to_thread(lambda: cluster.failover(lost, kill=True))
            for number in range(30):
                assert await patiently(client, "GET", f"{{{number}}}") == str(number).encode()
            lost.start()

        with_client(cluster.url_of("kvindexer", "secret"), through_moves, store_timeout_s=0.5)


def test_a_script_runs_where_its_keys_are(redis_cluster: Cluster) -> None:
    with_client(redis_cluster.url, set_and_get)
    assert redis_cluster.owner("kvindexer:n").ask("GET", "kvindexer:n") == "5"


def test_a_user_who_may_not_see_the_slots_is_told_so(redis_cluster: Cluster) -> None:
    for node in redis_cluster.servers:
        node.ask("ACL", "SETUSER", "blind", "on", ">secret", "~*", "+get", "+client|setname", "+command")
    assert reason(redis_cluster.url_of("blind", "secret")) == "no_rights"
    assert reason(redis_cluster.url_of("nobody", "secret")) == "auth"


def problems(store: str) -> list[str]:
    found: list[Problem] = with_client(store, examine)
    return [problem.reason for problem in found]


def test_a_sound_server_has_no_problem(redis_server: Server, redis_cluster: Cluster) -> None:
    assert problems(redis_server.url) == []
    assert problems(redis_cluster.url) == []


def test_a_server_that_may_drop_our_keys_or_is_nearly_full(own_redis_server: Server) -> None:
    own_redis_server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert problems(own_redis_server.url) == ["evicts"]
    own_redis_server.ask("CONFIG", "SET", "maxmemory-policy", "volatile-ttl")
    assert problems(own_redis_server.url) == []
    own_redis_server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    own_redis_server.ask("CONFIG", "SET", "maxmemory", "100kb")
    assert problems(own_redis_server.url) == ["nearly_full"]
    assert reason(own_redis_server.url, "SET", "a", 1) == "out_of_memory"
    assert reason(own_redis_server.url, "EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "a") == "out_of_memory"


def test_a_cluster_is_examined_node_by_node(redis_cluster: Cluster) -> None:
    node = redis_cluster.servers[1]
    node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lfu")
    try:
        (found,) = with_client(redis_cluster.url, examine)
        assert str(node.port) in found.message
    finally:
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


def test_a_user_who_may_not_look_is_a_problem(guarded: Server) -> None:
    guarded.ask("ACL", "SETUSER", "blind", "on", ">secret", "~*", "+get", "+client|setname")
    assert problems(guarded.url_of("blind", "secret")) == ["no_rights"]
    assert problems(guarded.url_of("kvindexer", "secret")) == []


def test_an_old_or_loading_server_is_a_problem() -> None:
    class Told:
        """A client of a server that can't be had here."""

        def __init__(self, **info: Any) -> None:
            self._info = info

        async def info(self) -> dict[str, Any]:
            return self._info

    def found(**info: Any) -> list[str]:
        client: Any = Told(**info)
        return [problem.reason for problem in asyncio.run(examine(client))]

    assert found(redis_version="6.0.16", loading=1, role="slave") == ["old_version", "loading", "read_only"]
    assert found(redis_version="6.2.0", role="master") == []
    assert found(redis_version="255.255.255", role="master") == []
    assert found() == ["old_version"]
    assert found(redis_version="unknown") == ["old_version"]
