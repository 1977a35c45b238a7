"""Bearer tokens from a file: who has which, and what each allows.

    tokens:
      - name: scheduler              # in logs and limits
        token: 6f1e...               # or sha256: the digest of the token, as hexadecimal digits
        roles: [query]
        tenant: team-a               # optional: the only one that it may ask about
        cache_salt: team-a           # optional: prompts carry this salt, or one that begins with `team-a:`
        expires: 2027-01-31          # optional: a day, or a day and time; of a day its beginning, in UTC

Only digests are kept.  A token is looked up by the digest of what was presented: how long that takes depends on the
digest, of which nobody can choose a part without trying 2**n tokens, and never on how much of a token was guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvindexer.access.errors import UnauthenticatedError
from kvindexer.access.identity import Identity
from kvindexer.errors import SettingsError
from kvindexer.hiding import HIDDEN, short
from kvindexer.settings.granting import FIELDS, checked_grant
from kvindexer.settings.yaml_file import read_yaml

KEY: Final = "auth_tokens_file"
SHORTEST: Final = 16
"""Characters of a token; `openssl rand -hex 32` makes 64."""
LONGEST: Final = 16_384
MAX_TOKENS: Final = 10_000

_FIELDS: Final = ("name", "token", "sha256", "expires", *FIELDS)
_NAME = re.compile(r"[A-Za-z0-9._:@/-]{1,256}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Known(NamedTuple):
    """Whose a token is, and until when (seconds since 1970)."""

    identity: Identity
    until_s: float | None


Tokens = Mapping[bytes, Known]
"""By digest."""


def digest_of(token: bytes) -> bytes:
    """The name under which a token is known."""
    return sha256(token).digest()


def look_up(tokens: Tokens, digest: bytes, now_s: float) -> Identity | None:
    """Whose token has this digest.  Raises UnauthenticatedError if it has expired."""
    known = tokens.get(digest)
    if known is None:
        return None
    if known.until_s is not None and now_s >= known.until_s:
        raise UnauthenticatedError(
            "the token has expired", f"the tokens file has it as {known.identity.name!r}; put a new one there"
        )
    return known.identity


def read_tokens(path: Path) -> Tokens:
    """All tokens of the file.  Raises SettingsError that says which entry is wrong, and never what a token is."""
    content = read_yaml(path, KEY, secret=True)
    listed = content.get("tokens") if isinstance(content, dict) and set(content) == {"tokens"} else None
    if not isinstance(listed, list) or not listed or len(listed) > MAX_TOKENS:
        raise SettingsError(KEY, str(path), f"a map with `tokens`, a list of 1 to {MAX_TOKENS} entries")
    tokens: dict[bytes, Known] = {}
    names: set[str] = set()
    for number, entry in enumerate(listed):
        key = f"{KEY}: tokens[{number}]"
        if not isinstance(entry, dict):
            raise SettingsError(key, HIDDEN, "a map with name, token or sha256, and roles")
        digest, known = _entry(entry, key)
        if known.identity.name in names:
            raise SettingsError(f"{key}.name", known.identity.name, "a name of its own")
        if digest in tokens:
            raise SettingsError(f"{key}.token", HIDDEN, "a token of its own")
        names.add(known.identity.name)
        tokens[digest] = known
    return tokens


def _entry(entry: Mapping[Any, Any], key: str) -> tuple[bytes, Known]:
    for field in entry:
        if field not in _FIELDS:
            raise SettingsError(f"{key}: a field", HIDDEN, f"one of {', '.join(_FIELDS)}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(f"{key}.name", short(name), "letters, digits and . _ : @ / - , at most 256 of them")
    return _digest(entry, key), Known(Identity(name, checked_grant(entry, key)), _until_s(entry, key))


def _digest(entry: Mapping[Any, Any], key: str) -> bytes:
    token, digest = entry.get("token"), entry.get("sha256")
    if (token is None) == (digest is None):
        raise SettingsError(key, HIDDEN, "either token or sha256")
    if digest is not None:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise SettingsError(f"{key}.sha256", HIDDEN, "64 hexadecimal digits, in quotes")
        return bytes.fromhex(digest)
    if not isinstance(token, str) or not _TOKEN.fullmatch(token) or not SHORTEST <= len(token) <= LONGEST:
        raise SettingsError(
            f"{key}.token",
            HIDDEN,
            f"{SHORTEST} to {LONGEST} characters without spaces, in quotes (openssl rand -hex 32 makes some)",
        )
    return digest_of(token.encode())


def _until_s(entry: Mapping[Any, Any], key: str) -> float | None:
    expires = entry.get("expires")
    if expires is None:
        return None
    if isinstance(expires, date):  # YAML reads days and times that are not in quotes
        expires = expires.isoformat()
    try:
        at = datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        raise SettingsError(f"{key}.expires", short(expires), "a day like 2027-01-31, or a day and time") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
