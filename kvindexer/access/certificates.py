"""Names in a client's certificate, and what they allow.  TLS has proved already that the certificate is its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvindexer.access.errors import ForbiddenError
from kvindexer.access.identity import Grant, Identity

ANY: Final = "*"
_KINDS: Final = ("URI", "DNS", "email")


def names_in(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names that a certificate, as `SSLObject.getpeercert` gives it, is for; the common name comes last."""
    if not certificate:
        return ()
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in _KINDS]
    names += [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    return tuple(dict.fromkeys(names))


def identity_of(names: Iterable[str], grants: Mapping[str, Grant]) -> Identity:
    """Whose certificate has these names.  Raises ForbiddenError."""
    names = tuple(names)
    for name in names:
        if name != ANY and name in grants:
            return Identity(name, grants[name])
    if ANY in grants:
        return Identity(names[0] if names else "a certificate", grants[ANY])
    shown = ", ".join(names[:4]) or "none"
    raise ForbiddenError(
        "no_role",
        "none of the names in the client's certificate has a role",
        f"names: {shown[:200]}; add one of them to auth_certificates",
    )
