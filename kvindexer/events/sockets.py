"""What all SUB sockets have in common: their options and their frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import zmq

from kvindexer.events.curve import Curve
from kvindexer.events.follower import Sink
from kvindexer.events.pump import Pumps

_FRAMES: Final = 3
_SEQ_BYTES: Final = 8
_RECONNECT_MIN_MS: Final = 100
_RECONNECT_MAX_MS: Final = 2_000
_CONNECT_TIMEOUT_MS: Final = 3_000
"""Else the kernel's retries decide: a minute apart once a partition has lasted for two."""
_HANDSHAKE_TIMEOUT_MS: Final = 5_000
"""Of libzmq's own 30 s a partition that swallowed a greeting would cost most, long after it is over."""
_HEARTBEAT_MS: Final = 3_000
_HEARTBEAT_TIMEOUT_MS: Final = 6_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriberSettings:
    """Limits and times of the sockets; see `Settings` for what each is for."""

    receive_hwm: int = 32
    max_message_bytes: int = 64 * 2**20
    replay_max_bytes: int = 512 * 2**20
    replay_timeout_s: float = 5.0
    max_concurrent_replays: int = 8
    max_sources: int = 4096
    slice_s: float = 0.002


@dataclass(frozen=True, slots=True)
class Wiring:
    """What every socket of the process is connected to."""

    context: zmq.Context[zmq.Socket[bytes]]
    settings: SubscriberSettings
    pumps: Pumps
    sink: Sink
    curve: Curve


def subscription_socket(context: zmq.Context[zmq.Socket[bytes]], settings: SubscriberSettings) -> zmq.Socket[bytes]:
    """A SUB socket that subscribes to nothing yet."""
    socket = context.socket(zmq.SUB)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IPV6, 1),
        (zmq.RCVHWM, settings.receive_hwm),
        (zmq.MAXMSGSIZE, settings.max_message_bytes),
        (zmq.RECONNECT_IVL, _RECONNECT_MIN_MS),
        (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
        (zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS),
        (zmq.HANDSHAKE_IVL, _HANDSHAKE_TIMEOUT_MS),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
    ):
        socket.setsockopt(option, value)
    return socket


def seq_and_payload(frames: list[bytes]) -> tuple[int, bytes] | None:
    """Of `[topic, seq (8 bytes, big-endian), payload]`; None: it is something else."""
    if len(frames) != _FRAMES or len(frames[1]) != _SEQ_BYTES:
        return None
    return int.from_bytes(frames[1], "big"), frames[2]
