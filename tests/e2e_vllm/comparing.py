"""Before every request kvindexer is asked what vLLM will have cached, afterwards vLLM is asked what it had.

Invariant: a request is compared only if it runs alone and everything that its server has published is applied, by
the account of the publisher's own replay socket.  So a difference is never a matter of time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import zmq

from e2e_vllm import publisher
from e2e_vllm.processes import RunError
from e2e_vllm.prompts import Prompt, Traffic
from e2e_vllm.publisher import Told
from e2e_vllm.servers import Indexer, Vllm

SETTLE_WITHIN_S: Final = 30.0
QUIET_LOOKS: Final = 2
"""The publisher answers a replay before it takes the next message from its queue, so one look could be too early."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: predicted and actual."""

    stage: str
    prompt: Prompt
    instance: str
    predicted: int
    actual: int
    source: dict[str, Any]
    row: dict[str, Any]
    excuse: str | None

    @property
    def equal(self) -> bool:
        """Whether the prediction was right, to the token."""
        return self.predicted == self.actual

    @property
    def trusted(self) -> bool:
        """Whether the answer said that it can be relied upon."""
        return bool(self.row["state"] == "live" and self.row["sound"] and self.row["complete"])

    def evidence(self) -> str:
        """Everything needed to look into a difference, on one line."""
        flags = ("state", "why", "sound", "complete", "epoch", "seq", "lag_ms")
        shown = (*flags, "gaps", "replays", "orphans", "poison")
        prompt = self.prompt
        return (
            f"{self.stage}, {self.instance}, {prompt.kind}, {len(prompt.tokens)} tokens, salt {prompt.salt}: "
            f"predicted {self.predicted}, actual {self.actual}; "
            + ", ".join(f"{name} {self.source[name]}" for name in shown)
        )


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an engine holds by its own account, and how many blocks kvindexer says that it holds."""

    stage: str
    instance: str
    told: Told
    indexed: int

    @property
    def equal(self) -> bool:
        """Whether both agree."""
        return self.told.held == self.indexed


class Comparer:
    """Sends requests one at a time and keeps the outcomes."""

    def __init__(self, indexer: Indexer, traffic: Traffic) -> None:
        self._indexer = indexer
        self._traffic = traffic
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.outcomes: list[Outcome] = []
        self.inventories: list[Inventory] = []

    def close(self) -> None:
        """Let go of the sockets."""
        self._context.destroy(linger=0)

    def settle(self, server: Vllm) -> dict[str, Any]:
        """Wait until kvindexer has applied all that a server has published; returns what it says of the source."""
        deadline = time.monotonic() + SETTLE_WITHIN_S
        quiet = 0
        while True:
            source = self._indexer.source(server.instance)
            if source["state"] == "live" and source["lag_ms"] == 0:
                following = 0 if source["seq"] is None else source["seq"] + 1
                quiet = 0 if publisher.ask(self._context, server.replay, following) else quiet + 1
            else:
                quiet = 0
            if quiet == QUIET_LOOKS:
                return source
            if time.monotonic() > deadline:
                raise RunError(f"{server.instance} did not settle in {SETTLE_WITHIN_S:g} s: {source}")
            if not quiet:
                time.sleep(0.02)

    def request(self, stage: str, server: Vllm, prompt: Prompt, excuse: str | None = None) -> Outcome:
        """Predict, send, compare."""
        source = self.settle(server)
        row = self._indexer.match(prompt, server.instance)
        answer = server.complete(prompt)
        self._traffic.answered(prompt, answer.output)
        outcome = Outcome(
            stage, prompt, server.instance, row["cached_tokens"], answer.cached_tokens, source, row, excuse
        )
        self.outcomes.append(outcome)
        return outcome

    def take_stock(self, stage: str, server: Vllm) -> None:
        """Compare the number of blocks held."""
        source = self.settle(server)
        told = publisher.told(publisher.ask(self._context, server.replay, 0))
        self.inventories.append(Inventory(stage, server.instance, told, source["blocks"]["gpu"]))
