"""`kvindexer replay`: play a recording of a real engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import zmq

from kvindexer.commands.failure import CommandError
from kvindexer.commands.stopping import Stop
from kvindexer.testing.recording import Player

if TYPE_CHECKING:
    from argparse import Namespace

LOOK_AGAIN_S: Final = 0.05


def run(options: Namespace) -> int:
    """Publish until the end of the recording, or a signal."""
    with Stop() as stop, _player(options) as player:
        for name, publisher in player.publishers.items():
            print(f"{name}: endpoint={publisher.endpoint},replay={publisher.replay_endpoint or 'none'}", flush=True)
        if options.wait_s is not None:
            _wait_for_subscribers(player, stop, options.wait_s)
        published = _play(player, stop, loop=options.loop)
        print(f"{published} messages published", flush=True)
        if options.hold:
            stop.wait()
    return 0


def _player(options: Namespace) -> Player:
    try:
        return Player(
            options.folder,
            options.endpoint,
            replay_endpoint=options.replay_endpoint,
            source=options.source,
            rate=options.rate,
        )
    except (OSError, ValueError, zmq.ZMQError) as error:
        raise CommandError(str(error), exit_code=2) from None


def _wait_for_subscribers(player: Player, stop: Stop, timeout_s: float) -> None:
    """Wait in the background: only the main thread hears signals, and it must be free to."""

    def wait() -> None:
        with suppress(TimeoutError, RuntimeError):  # nobody came, or we are closing: then it plays to itself, or ends
            for publisher in player.publishers.values():
                publisher.wait_for_subscribers(timeout_s=timeout_s)

    waiting = threading.Thread(target=wait, name="subscribers", daemon=True)
    waiting.start()
    while waiting.is_alive() and not stop.wait(LOOK_AGAIN_S):
        pass


def _play(player: Player, stop: Stop, *, loop: bool) -> int:
    with ThreadPoolExecutor(1, "player") as pool:
        playing = pool.submit(player.run, loop=loop)
        while not playing.done() and not stop.wait(LOOK_AGAIN_S):
            pass
        player.stopping.set()
        return playing.result()
