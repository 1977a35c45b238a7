"""CURVE: publishers that prove who they are, and events that nobody on the way can read or change.

A publisher has a key pair, and we know its public key: who has not the secret one can't answer us.  Our own pair is
what the publisher may know us by; without a file of ours it is made anew at every start, which is enough for
publishers that let everybody in.

Invariant: a socket to an endpoint that a key is known for speaks CURVE or nothing; there is no way back to clear
text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import zmq
from zmq.auth import load_certificate

from kvindexer.access.kept import warn_if_open
from kvindexer.errors import SettingsError

KEY: Final = "curve_secret_key_file"


class KeyPair(NamedTuple):
    """Our own keys, as text (Z85)."""

    public: bytes
    secret: bytes


class Curve:
    """Which key to expect where."""

    def __init__(self, own: KeyPair | None = None) -> None:
        self._own = own
        self._server_keys: dict[str, bytes] = {}

    def expect(self, endpoint: str, server_key: str) -> None:
        """From now on who answers at this endpoint must have the secret key to this public one."""
        self._server_keys[endpoint] = server_key.encode("ascii")

    def forget(self, endpoint: str) -> None:
        """Nobody is expected there any more."""
        self._server_keys.pop(endpoint, None)

    def expects(self, endpoint: str) -> bool:
        """Whether who answers there must have a key."""
        return endpoint in self._server_keys

    def secure(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Prepare a socket that is about to dial this endpoint.  Raises ZMQError for a key that is none."""
        server_key = self._server_keys.get(endpoint)
        if server_key is None:
            return
        if self._own is None:
            self._own = KeyPair(*zmq.curve_keypair())
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._own.secret)


def open_curve(path: Path | None) -> Curve:
    """With our own key pair, if there is a file of it.  Raises SettingsError."""
    if path is None:
        return Curve()
    try:
        path.open("rb").close()  # load_certificate doesn't say why a file can't be opened
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        expected = (
            f"a readable file of a CURVE key pair ({getattr(error, 'strerror', None) or 'it has no public key'})"
        )
        raise SettingsError(KEY, str(path), expected) from None
    if secret is None or zmq.curve_public(secret) != public:
        raise SettingsError(KEY, str(path), "a key pair: its .key_secret file, not the .key file for others")
    warn_if_open(KEY, path)
    return Curve(KeyPair(public, secret))
