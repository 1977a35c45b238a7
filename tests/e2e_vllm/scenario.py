"""What happens in a run, stage by stage."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from e2e_vllm.comparing import Comparer
from e2e_vllm.load import Load, twins
from e2e_vllm.processes import RunError
from e2e_vllm.prompts import Traffic
from e2e_vllm.servers import Indexer, Vllm
from e2e_vllm.watch import Seen, Watch

RECOVER_WITHIN_S: Final = 180.0
"""The restart of vLLM included."""
LOAD_S: Final = 6.0
FIRST_AFTER_RESET: Final = "first request after a reset of the idle server"


@dataclass(frozen=True, slots=True)
class Recovery:
    """One `kill -9`."""

    title: str
    instance: str
    killed_at: float
    reachable_at: float
    recovered_at: float
    held_before: int
    seen: list[Seen]
    answered: int
    failed: int

    @property
    def seconds(self) -> float:
        """From the moment when the publisher could be reached again until kvindexer was right again."""
        return max(0.0, self.recovered_at - self.reachable_at)


class Scenario:
    """The stages in order; `scale` multiplies the number of requests."""

    def __init__(self, indexer: Indexer, servers: Sequence[Vllm], seed: int, scale: float) -> None:
        self.indexer = indexer
        self.servers = servers
        self.seed = seed
        self.scale = scale
        self.recoveries: list[Recovery] = []
        self.uncompared = 0
        self._random = random.Random(seed)
        self._traffic = Traffic(seed)
        self.comparer = Comparer(indexer, self._traffic)
        self._began = time.monotonic()

    def run(self) -> None:
        """Everything."""
        self._singles("alone", 360)
        self._twins()
        self._reset()
        self._restart_indexer()
        first, second = self.servers
        self._kill("kill -9 under load", first, others=[second], load=True)
        self._kill("kill -9 while idle", second, others=[first], load=False)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - self._began:4.0f} s] {text}\n")

    def _singles(self, stage: str, count: int, servers: Sequence[Vllm] | None = None) -> None:
        servers = servers or self.servers
        count = max(4, round(count * self.scale))
        self._say(f"{stage}: {count} requests to {', '.join(server.instance for server in servers)}")
        for _ in range(count):
            self.comparer.request(stage, self._random.choice(servers), self._traffic.next())
        self._take_stock(stage, servers)

    def _take_stock(self, stage: str, servers: Sequence[Vllm]) -> None:
        for server in servers:
            self.comparer.take_stock(stage, server)

    def _twins(self) -> None:
        """Copies of blocks that only counting them gets right."""
        for server in self.servers:
            for _ in range(3):
                for kind in ("exact multiple", "repeat", "long"):
                    prompt = self._traffic.next(kind)
                    answers = twins(server, prompt)
                    self._traffic.answered(prompt, answers[0].output)
                    self.uncompared += len(answers)
        self._singles("after twins at once", 60)

    def _reset(self) -> None:
        stage = "reset_prefix_cache"
        for server in self.servers:
            for kind in ("repeat", "new"):
                known = self._traffic.next("exact multiple")
                for _ in range(2):
                    self.comparer.request(stage, server, known)
                self.comparer.settle(server)
                if not server.reset():
                    raise RunError("an idle server refused to reset its cache")
                first = known if kind == "repeat" else self._traffic.next(kind)
                self.comparer.request(stage, server, first, FIRST_AFTER_RESET)
                self.comparer.request(stage, server, known)
        self._singles(stage, 30)

    def _restart_indexer(self) -> None:
        """Kill kvindexer as well; it learns everything again."""
        self.indexer.kill()
        self.indexer.start()
        self.indexer.wait_ready()
        self._singles("kvindexer killed and started again", 60)

    def _kill(self, title: str, server: Vllm, *, others: Sequence[Vllm], load: bool) -> None:
        self._say(f"{title}: {server.instance}")
        with Load(server, self.seed + 1000, idle=not load) as clients, Watch(self.indexer, server) as watch:
            time.sleep(LOAD_S if load else 0)
            before = watch.seen[-1]
            held = self.indexer.source(server.instance)["blocks"]["gpu"]
            killed_at = time.monotonic()
            server.kill()
            watch.wait_unreachable()
            server.start()
            watch.restarted()
            self._singles(f"{title}, the other server meanwhile", 40, others)
            recovered_at = watch.wait_recovered(before.epoch, RECOVER_WITHIN_S)
            server.wait_ready()
            time.sleep(LOAD_S if load else 0)
        reachable_at = watch.reachable_at or recovered_at
        self.recoveries.append(
            Recovery(
                title,
                server.instance,
                killed_at,
                reachable_at,
                recovered_at,
                held,
                watch.seen,
                clients.answered,
                clients.failed,
            )
        )
        self.uncompared += clients.answered
        self._singles(f"{title}, after the restart", 60, [server])
