"""What kvindexer's own steps cost without sockets or HTTP, in microseconds: `python -m benchmarks.bare_loop`.

    payload --decode--> events --hash--> keys --bind, count--> index          `apply` is all of it
    locals --chain--> keys --match--> a depth per rank

The steps are measured alone, so that `apply` minus `decode` minus `hash` is what binding and counting cost.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from typing import TYPE_CHECKING

from benchmarks import messages
from benchmarks.client import MODEL, local_hashes
from benchmarks.process import rss_mb
from benchmarks.workload import BLOCK_SIZE, Query, Scale, Workload
from kvindexer.events.wire import BlockStored, decode_batch
from kvindexer.index.engine import PyIndex
from kvindexer.tokenization import blocks as keys
from kvindexer.types import Keyspace, SourceSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.messages import Message


def timed(step: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def decode(sent: list[Message]) -> None:
    """Bytes to events."""
    for message in sent:
        decode_batch(message.payload)


def hashing(sent: list[Message]) -> float:
    """Tokens to keys, the decoding not counted; returns CPU seconds."""
    stores = [e for m in sent for e in decode_batch(m.payload).events if isinstance(e, BlockStored)]

    def step() -> None:
        for event in stores:
            keys.chain_keys(event.parent, keys.local_hashes(keys.pack_tokens(event.tokens), BLOCK_SIZE))

    return timed(step)


def fill(index: PyIndex, sent: list[Message]) -> None:
    """Everything, as the service does it for each message."""
    for message in sent:
        index.apply(f"engine-{message.engine}", message.payload)


def match(index: PyIndex, queries: list[Query], workload: Workload, times: int) -> tuple[float, float]:
    """CPU seconds of chaining and of matching; every answer is checked."""
    space = Keyspace("default", MODEL, "", BLOCK_SIZE)
    asked = [(query, local_hashes(workload.blocks, query.blocks)) for query in queries]
    chaining = timed(lambda: [keys.keys_from_locals(locals_) for _, locals_ in asked for _ in range(times)])
    chained = [(query, keys.keys_from_locals(locals_)) for query, locals_ in asked]
    for query, prompt in chained:
        found = index.match(space, prompt, len(prompt) * BLOCK_SIZE)
        depths = {int(holder.instance) - 1: holder.held * BLOCK_SIZE for holder in found}
        if depths != query.expected:
            message = f"wrong answer: {depths}, expected {query.expected}"
            raise ValueError(message)
    matching = timed(lambda: [index.match(space, p, len(p) * BLOCK_SIZE) for _, p in chained for _ in range(times)])
    return chaining / times / len(asked), matching / times / len(asked)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_loop", description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    workload = Workload(Scale(entries=options.entries))
    sent = messages.initial(workload)
    count = sum(message.blocks for message in sent)
    print(f"{count:,} blocks in {len(sent):,} events")
    index = PyIndex()
    for engine in range(workload.scale.engines):
        endpoint = f"engine-{engine}"
        spec = SourceSpec(instance=str(engine + 1), model=MODEL, block_size=BLOCK_SIZE, endpoint=endpoint)
        index.attach(endpoint, spec)
    gc.collect()
    before = rss_mb(os.getpid())
    rows = {"apply": timed(lambda: fill(index, sent))}
    gc.collect()
    memory = rss_mb(os.getpid()) - before
    rows |= {"decode": timed(lambda: decode(sent)), "hash": hashing(sent)}
    for label, seconds in rows.items():
        rate = count / seconds / 1e3
        print(f"{label:8} {seconds / count * 1e6:8.3f} us a block   {rate:8.0f} k blocks per CPU second")
    print(f"memory   {memory / count * 1e6:8.1f} MB per million entries")
    chaining, matching = match(index, workload.shared_queries(), workload, 10)
    print(f"chain    {chaining * 1e6:8.0f} us a query of 512 blocks")
    print(f"match    {matching * 1e6:8.0f} us a query, {workload.scale.engines} instances in the answer")


if __name__ == "__main__":
    main()
