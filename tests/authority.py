"""A certificate authority of a test, and its certificates as files."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


class Certificate(NamedTuple):
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def issue(self, file: str, *names: str, common_name: str | None = None) -> Certificate:
        """A certificate for these names, in files of this name; what was there before is replaced at once."""
        issued = self._authority.issue_cert(*names, common_name=common_name)
        made = Certificate(self._folder / f"{file}.pem", self._folder / f"{file}.key")
        for path, content in (
            (made.key, issued.private_key_pem.bytes()),
            (made.cert, b"".join(pem.bytes() for pem in issued.cert_chain_pems)),
        ):
            replaced = path.with_suffix(".new")
            replaced.write_bytes(content)
            replaced.chmod(0o600)
            replaced.replace(path)
        return made

    def issue_uri(self, file: str, uri: str) -> Certificate:
        """A client's certificate for a URI, as SPIFFE has them."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        authority = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        signer = load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        issued = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
            .sign(signer, SHA256())  # type: ignore[arg-type]  # trustme makes none that can't sign
        )
        made = Certificate(self._folder / f"{file}.pem", self._folder / f"{file}.key")
        made.cert.write_bytes(issued.public_bytes(Encoding.PEM))
        made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return made

    def trusted(self, own: Certificate | None = None) -> ssl.SSLContext:
        """What a client believes, and shows if it has a certificate."""
        context = ssl.create_default_context(cafile=str(self.file))
        if own is not None:
            context.load_cert_chain(own.cert, own.key)
        return context

    def serving(self, own: Certificate) -> ssl.SSLContext:
        """What a server shows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own.cert, own.key)
        return context
