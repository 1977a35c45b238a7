"""The pieces together: a running service with its own engines, spools with a mark at the end, checked queries."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from benchmarks import messages
from benchmarks.client import BY_HASH, BY_TOKENS, Connection, body_of, is_right, request_of
from benchmarks.process import Neighbours
from benchmarks.publish import Fleet
from benchmarks.results import Results
from benchmarks.services import Contender, Service
from benchmarks.workload import Query, Scale, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.messages import Message

POLL_S: Final = 0.01
PATIENCE_S: Final = 90.0
ODD_QUERIES: Final = 60


class Asked(NamedTuple):
    """A query as it is sent, with what must come back."""

    query: Query
    body: bytes
    request: bytes


class Spool(NamedTuple):
    """Messages on disk; the last ones store the same new block in every engine: the mark."""

    path: Path
    blocks: int
    mark: Asked


class Running:
    """A started service, and engines that publish to it alone."""

    def __init__(self, contender: Contender, engines: int, *, replayable: bool = False) -> None:
        with ExitStack() as stack:
            self.service = stack.enter_context(Service(contender))
            self.service.wait()
            self.fleet = stack.enter_context(Fleet(engines, replayable=replayable))
            self.name = contender.name
            self.idle_mb = self.service.rss_mb()
            self.service.register(self.fleet.endpoints, self.fleet.replay_endpoints)
            self.fleet.await_subscribers()
            self._stack = stack.pop_all()

    def restart(self, contender: Contender, *, kill: bool = False) -> float:
        """Another process in the place of the service; seconds from its start until it is ready."""
        if kill:
            self.service.kill()
        else:
            self.service.stop()
        self.service = self._stack.enter_context(Service(contender))
        return self.service.await_ready()

    def connect(self) -> Connection:
        """Open a new connection to the service."""
        return Connection(self.service.port)

    def play(self, spool: Spool, rate: int) -> None:
        """Publish a spool and return when the service has all of it."""
        self.fleet.load(spool.path)
        self.fleet.begin(spool.path, rate)
        self.fleet.finish()
        self.reach(spool.mark)

    def reach(self, mark: Asked) -> float:
        """Wait until the mark is held by every engine; returns when that was."""
        deadline = time.monotonic() + PATIENCE_S
        with self.connect() as connection:
            while not is_right(answer := connection.ask(mark.request), mark.query):
                if time.monotonic() > deadline:
                    message = f"{self.name} lost messages or is too slow; its last answer: {answer[:500]!r}"
                    raise TimeoutError(message)
                time.sleep(POLL_S)
        return time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


class Arena:
    """One workload for all contenders."""

    def __init__(self, scale: Scale) -> None:
        self._folder = TemporaryDirectory(prefix="kvindexer-benchmark-")
        self._spools = 0
        self.workload = Workload(scale)
        self.results = Results()
        self.neighbours = Neighbours()
        self.initial = self.spool(messages.initial(self.workload))
        shared = self.workload.shared_queries()
        odd = self.workload.odd_queries(ODD_QUERIES)
        self.shared = {route: self.asked(route, shared) for route in (BY_HASH, BY_TOKENS)}
        self.odd = {route: self.asked(route, odd) for route in (BY_HASH, BY_TOKENS)}

    def asked(self, route: str, queries: Sequence[Query]) -> list[Asked]:
        """Build the requests of queries."""
        bodies = [body_of(route, self.workload.blocks, query.blocks) for query in queries]
        return [Asked(query, body, request_of(route, body)) for query, body in zip(queries, bodies, strict=True)]

    def block(self, engines: Sequence[int]) -> tuple[list[Message], Asked]:
        """Make a new block that these engines store, and the query that finds it."""
        block = self.workload.blocks.grow(1)
        query = Query(list(block), dict.fromkeys(engines, 16))
        return messages.single(self.workload, block, engines), self.asked(BY_HASH, [query])[0]

    def spool(self, content: list[Message]) -> Spool:
        """Write messages and a mark."""
        marks, mark = self.block(range(self.workload.scale.engines))
        self._spools += 1
        path = Path(self._folder.name, str(self._spools))
        return Spool(path, messages.write_spool(path, [*content, *marks]), mark)

    def steps(self, content: list[Message]) -> Path:
        """Write messages that are published one by one."""
        self._spools += 1
        path = Path(self._folder.name, str(self._spools))
        messages.write_spool(path, content)
        return path

    def check(self, name: str, answers: Sequence[bytes], asked: Sequence[Asked]) -> None:
        """Compare answers with the oracle's and count."""
        pairs = zip(answers, asked, strict=True)
        right = sum(is_right(answer, ask.query) for answer, ask in pairs)
        self.results.check(name, right=right, of=len(asked))

    def check_all(self, running: Running) -> None:
        """Ask everything once, both ways, and count the right answers."""
        with running.connect() as connection:
            for route in (BY_HASH, BY_TOKENS):
                asked = self.shared[route] + self.odd[route]
                self.check(running.name, [connection.ask(ask.request) for ask in asked], asked)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
