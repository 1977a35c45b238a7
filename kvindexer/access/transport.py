"""TLS of our own listener, with certificates that are replaced while it listens.

A listener holds one context for good, so it holds one whose connections are made by another: the present one.  What
is new counts from the next connection on; a certificate and a key that don't fit together change nothing.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from kvindexer.access.kept import Kept
from kvindexer.errors import SettingsError
from kvindexer.settings import Settings


class RotatingContext(ssl.SSLContext):
    """Makes connections of whatever context is kept now."""

    kept: Kept[ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """See `SSLContext.wrap_bio`: what event loops call for each connection."""
        return self.kept.value.wrap_bio(*arguments, **options)


def open_transport(settings: Settings) -> RotatingContext | None:
    """The context that the settings ask for; None: plain HTTP.  Raises SettingsError."""
    cert, key, authorities = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    if cert is None or key is None:
        return None
    # a certificate may be left away only where it is one of several ways in
    required = not (settings.auth_certificates and len(settings.ways_in) > 1)
    context = RotatingContext(ssl.PROTOCOL_TLS_SERVER)
    paths = [cert, key, *([] if authorities is None else [authorities])]
    context.kept = Kept(
        "tls_cert_file", paths, lambda: _context(cert, key, authorities, required=required), secret=[key]
    )
    return context


def _context(cert: Path, key: Path, authorities: Path | None, *, required: bool) -> ssl.SSLContext:
    """Raise SettingsError for files that can't be used, or not together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for setting, path in (("tls_cert_file", cert), ("tls_key_file", key), ("tls_client_ca_file", authorities)):
        if path is not None:
            _check_readable(setting, path)
    try:
        context.load_cert_chain(cert, key, _no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no PEM"
        expected = f"a PEM certificate that belongs to the key in tls_key_file, which has no password ({reason})"
        raise SettingsError("tls_cert_file", str(cert), expected) from None
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (ssl.SSLError, OSError) as error:
            expected = f"PEM certificates of authorities ({getattr(error, 'reason', None) or 'no PEM'})"
            raise SettingsError("tls_client_ca_file", str(authorities), expected) from None
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


def _check_readable(setting: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise SettingsError(setting, str(path), f"a readable file ({error.strerror})") from None


def _no_password() -> str:
    """Nobody is there to be asked for one; without this OpenSSL asks the terminal."""
    raise ValueError("the key has a password")
