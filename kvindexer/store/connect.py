"""From settings to a client of redis-py, for all the ways in which Redis and Valkey are deployed.

redis-py waits and retries for up to a minute by default.  Here every wait is `store_timeout_s`, a command is tried a
second time only if its connection broke, and nothing else is: those who use the client come back by themselves.
A command that needs several steps (connect, log in, ask the sentinels, read the cluster's slots) can take several
timeouts; `failures.asking` bounds the whole.

The password is in a credential provider, never among the arguments that redis-py shows in its reprs and errors.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

from kvindexer.errors import SettingsError
from kvindexer.store.password import password_in

if TYPE_CHECKING:
    from kvindexer.settings import Settings
    from kvindexer.store.address import StoreAddress, Tls

CLIENT_NAME: Final = "kvindexer"
"""What CLIENT LIST shows us as."""
MAX_CONNECTIONS: Final = 8
"""Commands that are under way at once; further ones wait for their turn.  Each needs a connection (to a server, or to
a node of a cluster).  Pipelines don't wait: there is room for as many again, and one more is refused."""
HEALTH_CHECK_S: Final = 15
"""A connection that was idle that long is tried with a PING before a command is trusted to it."""
RESP: Final = 2
"""The older protocol: one type of answer for all servers >= 6.2, and no messages that nobody asked for."""
RETRIES: Final = 1
NEVER: Final = 0

Client: TypeAlias = Redis | RedisCluster


class Credentials(CredentialProvider):
    """User and password, from the file each time if there is one: secrets are changed while we run."""

    def __init__(self, settings: Settings) -> None:
        self._username = settings.store.username
        self._file = settings.store_password_file
        self._password = settings.store.password or settings.store_password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """What AUTH gets; SettingsError if the file has gone."""
        if self._file is not None:
            password = password_in(self._file)
        else:
            password = self._password.get_secret_value() if self._password else ""
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same; a secret of a few bytes is read in no time."""
        return self.get_credentials()


def open_client(settings: Settings) -> Client:
    """Make a client for `store`; connects with its first command, `aclose()` ends all of it.

    Answers are bytes.  Raises SettingsError if the store is `memory`.  What commands raise: see `failures`.
    """
    address = settings.store
    match address.kind:
        case "single":
            return _single(settings, address)
        case "sentinel":
            return _sentinel(settings, address)
        case "cluster":
            return _cluster(settings, address)
    raise SettingsError("store", str(address), "the URL of a Redis or Valkey")


def _single(settings: Settings, address: StoreAddress) -> Redis:
    ((host, port),) = address.hosts
    pool = BlockingConnectionPool(
        max_connections=MAX_CONNECTIONS,
        timeout=settings.store_timeout_s,
        connection_class=SSLConnection if address.tls else Connection,
        host=host,
        port=port,
        db=address.db,
        retry=_retry(),
        **_login(settings),
        **_common(settings),
        **_tls(address.tls),
    )
    return Redis.from_pool(pool)


def _sentinel(settings: Settings, address: StoreAddress) -> Redis:
    common = {**_common(settings), **_tls(address.tls), "ssl": address.tls is not None}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]  # redis-py has left its arguments untyped
        address.hosts,
        sentinel_kwargs={
            **common,
            **(_login(settings) if address.sentinel_auth else {}),
            "retry": _no_retry(),  # there are others to ask
            "max_connections": 2 * MAX_CONNECTIONS,
        },
    )
    client: Redis = sentinels.master_for(
        address.service,
        redis_class=_SentinelRedis,
        max_connections=2 * MAX_CONNECTIONS,
        db=address.db,
        retry=_retry(),
        **_login(settings),
        **common,
    )
    return client


class _SentinelRedis(Redis):
    """Lets commands wait for a connection, and closes its connections to the sentinels as well."""

    _turns: asyncio.Semaphore | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        self._turns = self._turns or asyncio.Semaphore(MAX_CONNECTIONS)
        async with self._turns:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 - as redis-py has it
        await super().aclose(close_connection_pool)
        pool = self.connection_pool
        if isinstance(pool, SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()


class _WaitingCluster(RedisCluster):
    """Lets commands wait for a connection; redis-py's refuses."""

    _turns: asyncio.Semaphore | None = None

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        self._turns = self._turns or asyncio.Semaphore(MAX_CONNECTIONS)
        async with self._turns:
            if self.get_default_node() is None:
                await self.initialize()  # or the first command would go to any node, and be sent on
            return await super().execute_command(*args, **kwargs)


def _cluster(settings: Settings, address: StoreAddress) -> RedisCluster:
    return _WaitingCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
        max_connections=2 * MAX_CONNECTIONS,
        retry=_retry(),
        reinitialize_steps=NEVER,  # a slot that has moved is followed; reading all anew would cut off other commands
        dynamic_startup_nodes=False,  # names that the operator gave outlive the addresses that they have now
        require_full_coverage=False,  # one shard's trouble is no reason to leave the others unwritten
        ssl=address.tls is not None,
        **_login(settings),
        **_common(settings),
        **_tls(address.tls),
    )


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "socket_timeout": settings.store_timeout_s,
        "socket_connect_timeout": settings.store_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
        "client_name": CLIENT_NAME,
        "decode_responses": False,
        "protocol": RESP,
    }


def _login(settings: Settings) -> dict[str, Any]:
    needed = settings.store.username or settings.store.password or settings.store_password
    if not needed and settings.store_password_file is None:
        return {}
    return {"credential_provider": Credentials(settings)}


def _tls(tls: Tls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    return {
        "ssl_ca_certs": tls.ca_certs,
        "ssl_certfile": tls.certfile,
        "ssl_keyfile": tls.keyfile,
        "ssl_cert_reqs": "required" if tls.verify else "none",
        "ssl_check_hostname": tls.verify and tls.check_hostname,
    }


def _retry() -> Retry:
    """A broken connection is opened anew at once; a timeout is not waited for twice."""
    return Retry(NoBackoff(), RETRIES, supported_errors=(RedisConnectionError,))


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)
