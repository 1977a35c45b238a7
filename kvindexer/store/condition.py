"""Is the server one that our copy is safe with?  Looked at from outside, with INFO alone.

CONFIG is blocked in most clouds, and INFO says all that matters here: the version, what the server evicts when its
memory is full, whether it is a replica, still loading, or nearly full.  Nothing is changed, only reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from redis.asyncio.cluster import RedisCluster

from kvindexer.errors import StoreError
from kvindexer.store.failures import FAILURES, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvindexer.store.connect import Client

OLDEST: Final = (6, 2)
FULL: Final = 0.9
"""Part of maxmemory that may be in use before we say so."""
KEEPS: Final = ("noeviction", "volatile-")
"""Policies that leave keys without an expiry alone; ours have none."""


class Problem(NamedTuple):
    """Why the server isn't fit for us; `reason` is a short fixed word, the message says what to change."""

    reason: str
    message: str


async def examine(client: Client) -> list[Problem]:
    """Look at the server, or at all primaries of a cluster; no problem, an empty list.

    Raises StoreError if a server doesn't answer.  A user without the right to INFO is a problem as well.
    """
    try:
        return [problem for name, info in await _infos(client) for problem in _problems(name, info)]
    except FAILURES as error:
        failure = store_error(error)
        if failure.reason != "no_rights":
            raise failure from error
        return [Problem(failure.reason, f"can't look at the server's condition: {failure.message}; {failure.hint}")]


async def _infos(client: Client) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(client, RedisCluster):
        return [("the server", await client.info())]
    await client.initialize()
    primaries = client.get_primaries()
    if not primaries:
        raise StoreError("cluster_down", "the cluster has no primaries")
    return [(f"node {node.name}", await client.info(target_nodes=node)) for node in primaries]


def _problems(name: str, info: Mapping[str, Any]) -> Iterator[Problem]:
    version = str(info.get("redis_version", "0"))
    if _major_minor(version) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        yield Problem("old_version", f"{name} is version {version}: use Redis {wanted} or newer, or Valkey")
    if info.get("loading"):
        yield Problem("loading", f"{name} is still reading its data")
    if info.get("role") not in ("master", None):
        yield Problem("read_only", f"{name} is a replica: point store at the primary, the sentinels or the cluster")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if not policy.startswith(KEEPS):
        yield Problem(
            "evicts",
            f"{name} may drop our keys when its memory is full: set maxmemory-policy to noeviction or "
            f"volatile-lru, it is {policy}",
        )
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if limit and used > FULL * limit:
        yield Problem(
            "nearly_full",
            f"{name} uses {used} of {limit} bytes: raise maxmemory or remove other programs' keys",
        )


def _major_minor(version: str) -> tuple[int, ...]:
    """Leading numbers of a version; what has none counts as old."""
    numbers = []
    for part in version.split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
