"""A fake engine in a process of its own, there to be killed: `python -m engine_process PORT REPLAY_PORT HASH_SEED`.

It says a line of JSON when it is up (its two endpoints), then one for every line on its standard input:

    load    puts it under load until further notice
    held    ends the load and says what its GPU holds: [[group, hash, copies], ...]
"""

from __future__ import annotations

import itertools
import json
import sys
import threading

from kvindexer.testing import FakeEngine
from proxied import SMALL, traffic


def say(value: object) -> None:
    """One line for whoever started us."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def load(engine: FakeEngine, stop: threading.Event) -> None:
    """Requests without end."""
    for seed in itertools.count():
        traffic(engine, 5, seed)
        if stop.wait(0.002):
            return


def main(port: str, replay_port: str, hash_seed: str) -> None:
    """Run until the end of the input, or until somebody kills us."""
    with FakeEngine(
        pool=SMALL,
        hash_seed=hash_seed,
        endpoint=f"tcp://127.0.0.1:{port}",
        replay_endpoint=f"tcp://127.0.0.1:{replay_port}",
    ) as engine:
        say([engine.endpoint, engine.replay_endpoint])
        stop = threading.Event()
        worker = threading.Thread(target=load, args=(engine, stop), daemon=True)
        for line in sys.stdin:
            if line.strip() == "load":
                worker.start()
                say("under load")
            else:
                stop.set()
                worker.join()
                say([[group, int(value) & (2**64 - 1), n] for (group, value), n in engine.held().items()])


if __name__ == "__main__":
    main(*sys.argv[1:])
