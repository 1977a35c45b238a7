"""What can go wrong between us and a Redis, in our words.

Whatever redis-py, the operating system or TLS raise becomes a `StoreError`: a short fixed reason for counters and
health, a sentence that says what happened, and a hint that says what an operator can change.  Nobody outside this
room needs to know an exception of redis-py, and no message shows a password: credentials never reach a repr (see
`connect`), and servers don't repeat them.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from redis.exceptions import ChildDeadlockedError, IncorrectPolicyType, RedisClusterException, RedisError

from kvindexer.errors import SettingsError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SHOWN_CHARACTERS: Final = 200
"""Longest piece of a server's answer that a message repeats."""
MAX_CAUSES: Final = 8

FAILURES: Final = (
    RedisError,
    RedisClusterException,
    ChildDeadlockedError,
    IncorrectPolicyType,
    OSError,  # also TLS, names that don't resolve, and the timeouts of asyncio
    EOFError,
    SettingsError,  # the file with the password has gone
)
"""What `store_error` is for; anything else is a bug and is not caught."""

HINTS: Final = {
    "unreachable": "check store, that the server runs, and that nothing between us refuses the connection",
    "unknown_host": "check the host in store",
    "tls": "check ca_certs, the certificate's names, and that the server speaks TLS there",
    "timeout": "check the server's load, the network, and whether it speaks TLS or not; or raise store_timeout_s",
    "auth": "check the user in store and store_password",
    "no_password": "check the file that store_password_file names",
    "no_rights": "give our ACL user the rights that docs/redis.md lists",
    "read_only": "this is a replica: point store at the primary, or use redis+sentinel:// or redis+cluster://",
    "no_primary": "check the service's name in store, and that its sentinels agree on a primary",
    "out_of_memory": "raise maxmemory, or remove other programs' keys",
    "loading": "none: the server is reading its data and will be ready by itself",
    "cluster_down": "check the cluster's slots and primaries (CLUSTER INFO)",
    "moved": "the server is part of a cluster: use redis+cluster://",
    "resharding": "none: slots are moving between nodes",
    "not_a_cluster": "the server is no cluster: use redis://, or redis+sentinel://",
    "busy": "another program's script blocks the server",
    "no_connection": "none: more commands at once than connections",
    "cannot_save": "the server can't write its own data to disk: see its log",
    "too_few_replicas": "the server waits for its replicas: check them, or min-replicas-to-write",
    "no_script": "none: scripts are loaded again",
    "changed": "none: another client was first",
    "wrong_type": "another program's keys have our names: choose another store_namespace",
    "bad_reply": "check that a Redis or Valkey >= 6.2 listens there",
    "refused": "check the server's version (>= 6.2) and its log",
    "unexpected": "this is a bug in kvindexer or in redis-py",
}
"""Every reason that there is, with what to change."""

REASONS: Final = {
    # redis.exceptions, by name, for not every version has all of them
    "RedisError": "refused",
    "ConnectionError": "unreachable",
    "TimeoutError": "timeout",
    "AuthenticationError": "auth",
    "AuthenticationWrongNumberOfArgsError": "auth",
    "AuthorizationError": "no_rights",
    "NoPermissionError": "no_rights",
    "ExternalAuthProviderError": "auth",
    "BusyLoadingError": "loading",
    "MaxConnectionsError": "no_connection",
    "InvalidResponse": "bad_reply",
    "ResponseError": "refused",
    "NoScriptError": "no_script",
    "OutOfMemoryError": "out_of_memory",
    "ReadOnlyError": "read_only",
    "ExecAbortError": "refused",
    "WatchError": "changed",
    "ModuleError": "refused",
    "NoSuchFieldsetError": "refused",
    "RedisClusterException": "cluster_down",
    "ClusterError": "cluster_down",
    "ClusterDownError": "cluster_down",
    "MasterDownError": "cluster_down",
    "SlotNotCoveredError": "cluster_down",
    "MovedError": "moved",
    "AskError": "moved",
    "TryAgainError": "resharding",
    # a caller of redis-py who doesn't know how to use it
    "DataError": "unexpected",
    "PubSubError": "unexpected",
    "LockError": "unexpected",
    "LockNotOwnedError": "unexpected",
    "ChildDeadlockedError": "unexpected",
    "ClusterCrossSlotError": "unexpected",
    "CrossSlotTransactionError": "unexpected",
    "InvalidPipelineStack": "unexpected",
    "IncorrectPolicyType": "unexpected",
    # redis.asyncio.sentinel
    "MasterNotFoundError": "no_primary",
    "SlaveNotFoundError": "no_primary",
    # the operating system's, asyncio's, TLS'
    "OSError": "unreachable",
    "EOFError": "unreachable",
    "gaierror": "unknown_host",
    "SSLError": "tls",
    "SettingsError": "no_password",
}
"""Names of exceptions; what isn't here counts as its nearest base class that is."""

CODES: Final = {
    "ASK": "moved",
    "BUSY": "busy",
    "CLUSTERDOWN": "cluster_down",
    "CROSSSLOT": "unexpected",
    "LOADING": "loading",
    "MASTERDOWN": "cluster_down",
    "MISCONF": "cannot_save",
    "MOVED": "moved",
    "NOAUTH": "auth",
    "NOPERM": "no_rights",
    "NOREPLICAS": "too_few_replicas",
    "NOSCRIPT": "no_script",
    "OOM": "out_of_memory",
    "READONLY": "read_only",
    "TRYAGAIN": "resharding",
    "WRONGPASS": "auth",
    "WRONGTYPE": "wrong_type",
}
"""First words of a server's error; in a script's they also stand behind a dash."""

_CODE: Final = re.compile(rf"(?:^|-|: )({'|'.join(CODES)})\b")
_VAGUE: Final = frozenset({"unreachable", "refused", "cluster_down", "timeout", "no_primary"})
"""Reasons that redis-py also gives for errors which it has caught itself: their cause says more."""
_TELLING: Final = frozenset({"auth", "no_password", "no_rights", "tls", "unknown_host", "loading", "bad_reply"})
_NOT_A_CLUSTER: Final = "Cluster mode is not enabled on this node"
"""What redis-py says instead of the server's refusal to list its slots."""
_CLOSED: Final = "the handler is closed"
"""What uvloop says, as a RuntimeError, to whoever writes to a connection that has just broken."""
_SENTENCES: Final = {
    "no_primary": "no sentinel knows a primary that is up",
    "no_connection": "all connections are in use",
    "timeout": "no answer in time",
}


def store_error(error: BaseException) -> StoreError:
    """Say in our words what happened; any exception has a reason, those of `FAILURES` a telling one."""
    if isinstance(error, StoreError):
        return error
    reason, told = _reason(error), error
    if reason in _VAGUE:
        for cause in _causes(error):
            if (deeper := _reason(cause)) in _TELLING:
                reason, told = deeper, cause
                break
        else:
            reason = "not_a_cluster" if _NOT_A_CLUSTER in str(error) else reason
    return StoreError(reason, _SENTENCES.get(reason) or _said(told), HINTS[reason])


@asynccontextmanager
async def asking(budget_s: float) -> AsyncIterator[None]:
    """Let what is asked inside take `budget_s` seconds at most, connecting and retries included.

    Raises StoreError instead of whatever it fails with.  A command that was cut off may have been carried out.
    A cancellation that redis-py has swallowed (its pipelines do at times) is raised here.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task is not None else 0
    failure: StoreError | None = None
    try:
        async with asyncio.timeout(budget_s):
            yield
    except (*FAILURES, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _CLOSED not in str(error):
            raise
        failure = store_error(ConnectionError(_CLOSED) if isinstance(error, RuntimeError) else error)
        failure.__cause__ = error
    if task is not None and task.cancelling() > cancellations:
        raise asyncio.CancelledError
    if failure is not None:
        raise failure


def _reason(error: BaseException) -> str:
    named = next((REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS), "unexpected")
    if named in ("refused", "unreachable") and isinstance(error, RedisError):
        code = _CODE.search(str(error))
        return CODES[code[1]] if code else named
    return named


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
