"""Where the durable copy lives, as an operator writes it: the text of `store`, read once and checked at start.

    memory
    redis://[user[:password]@]host[:port][/db]
    redis+sentinel://[user[:password]@]host[:port],host[:port]/service[/db]
    redis+cluster://[user[:password]@]host[:port],host[:port]

`rediss` in place of `redis` is TLS.  Nothing here imports a Redis client: who has no Redis doesn't pay for one.

Invariant: a password that stood in the text is in `StoreAddress.password` and nowhere else, also not in an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import SecretStr

from kvindexer.errors import SettingsError
from kvindexer.hiding import short

Kind = Literal["memory", "single", "sentinel", "cluster"]

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
MAX_PORT: Final = 65535
MAX_DB: Final = 2**31 - 1
FORMS: Final = (
    "memory, redis://[user:password@]host[:port][/db], redis+sentinel://host:port,host:port/service[/db] or "
    "redis+cluster://host:port,host:port; rediss for TLS"
)
_KINDS: Final[dict[str, Kind]] = {"": "single", "sentinel": "sentinel", "cluster": "cluster"}
_SCHEME: Final = re.compile(r"redis(?P<tls>s)?(\+(?P<kind>sentinel|cluster))?", re.IGNORECASE)
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_NUMBER: Final = re.compile(r"[0-9]{1,10}")
_NO_PORT: Final = re.compile(r":(?![0-9]{1,5}($|[,/?])).*", re.DOTALL)
_FILES: Final = ("ca_certs", "certfile", "keyfile")
_CHOICES: Final = {"ssl_cert_reqs": ("required", "none"), "ssl_check_hostname": ("true", "false")}


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server proves who it is, and we to it; paths of PEM files."""

    ca_certs: str | None = None
    """Certificates to trust; without it, those of the operating system."""
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    check_hostname: bool = True


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A store as `connect.open_client` takes it; its text shows no password."""

    kind: Kind = "memory"
    hosts: tuple[tuple[str, int], ...] = ()
    """Of the server, of the sentinels, or of some nodes of the cluster."""
    username: str | None = None
    password: SecretStr | None = field(default=None, repr=False)
    db: int = 0
    service: str = ""
    """The name that the sentinels know the primary by."""
    sentinel_auth: bool = False
    """Whether the sentinels ask for the same user and password."""
    tls: Tls | None = None

    def __str__(self) -> str:
        if self.kind == "memory":
            return "memory"
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind == "single" else f"+{self.kind}")
        user = f"{self.username or ''}:***@" if self.password else f"{self.username}@" if self.username else ""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        path = (f"/{self.service}" if self.service else "") + (f"/{self.db}" if self.db else "")
        return f"{scheme}://{user}{hosts}{path}"


def read_address(value: object) -> StoreAddress:
    """Read the setting `store`; SettingsError says what can't be used and shows no password."""
    if isinstance(value, StoreAddress):
        return value
    if not isinstance(value, str):
        raise SettingsError("store", without_password(str(value)), FORMS)
    text = value.strip()
    if text.lower() == "memory":
        return StoreAddress()
    scheme, separator, _ = text.partition("://")
    known = _SCHEME.fullmatch(scheme)
    if not separator or not known:
        raise _unusable(text, FORMS)
    return _url(text, _KINDS[(known["kind"] or "").lower()], tls=bool(known["tls"]))


def _url(text: str, kind: Kind, *, tls: bool) -> StoreAddress:
    try:
        parts = urlsplit(text)
    except ValueError:
        raise _unusable(text, FORMS) from None
    if parts.fragment or "#" in text:
        raise _unusable(text, "a URL without #; in a password it is written %23")
    login, at, listed = parts.netloc.rpartition("@")
    username, colon, password = login.partition(":")
    port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    hosts = tuple(_host(text, item, port) for item in listed.split(","))
    if kind == "single" and len(hosts) > 1:
        raise _unusable(text, "one host, or redis+sentinel:// or redis+cluster:// for several")
    if at and colon and not password:
        raise _unusable(text, "a password behind the colon, or no colon")
    service, db = _path(text, parts.path, kind)
    options = _options(text, parts.query, tls=tls, kind=kind)
    return StoreAddress(
        kind=kind,
        hosts=hosts,
        username=unquote(username) or None,
        password=SecretStr(unquote(password)) if password else None,
        db=db,
        service=service,
        sentinel_auth=options.get("sentinel_auth") == "same",
        tls=Tls(
            **{name: options[name] for name in _FILES if name in options},
            verify=options.get("ssl_cert_reqs") != "none",
            check_hostname=options.get("ssl_check_hostname") != "false",
        )
        if tls
        else None,
    )


def _host(text: str, item: str, default: int) -> tuple[str, int]:
    found = _HOST.fullmatch(item)
    if not found:
        raise _unusable(text, "host or host:port behind ://; in a password / ? # are written %2F %3F %23")
    port = int(found["port"] or default)
    if not 0 < port <= MAX_PORT:
        raise _unusable(text, f"a port of 1 to {MAX_PORT}")
    return found["host"].strip("[]"), port


def _path(text: str, path: str, kind: Kind) -> tuple[str, int]:
    steps = [unquote(step) for step in path.strip("/").split("/") if step]
    service = ""
    if kind == "sentinel":
        if not steps:
            raise _unusable(text, "the name of the sentinels' service behind the hosts, /mymaster for example")
        service = steps.pop(0)
    if not steps:
        return service, 0
    if kind == "cluster" and steps != ["0"]:
        raise _unusable(text, "no database: a cluster has only database 0")
    if len(steps) > 1 or not _NUMBER.fullmatch(steps[0]) or int(steps[0]) > MAX_DB:
        raise _unusable(text, "the number of a database behind the last /")
    return service, int(steps[0])


def _options(text: str, query: str, *, tls: bool, kind: Kind) -> dict[str, str]:
    choices = (_CHOICES if tls else {}) | ({"sentinel_auth": ("same", "none")} if kind == "sentinel" else {})
    files = _FILES if tls else ()
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise _unusable(text, f"{name} once")
        if name in files:
            if not _is_file(value):
                raise _unusable(text, f"the path of a file for {name}")
        elif name not in choices:
            named = ", ".join((*files, *choices)) or "no option (those of TLS need rediss)"
            raise _unusable(text, f"{named} behind the ?")
        elif value.lower() not in choices[name]:
            raise _unusable(text, f"{name}={' or '.join(choices[name])}")
        options[name] = value if name in files else value.lower()
    if "keyfile" in options and "certfile" not in options:
        raise _unusable(text, "certfile beside keyfile")
    return options


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except ValueError:
        return False


def _unusable(text: str, expected: str) -> SettingsError:
    return SettingsError("store", without_password(text), expected)


def without_password(text: str) -> str:
    """What an error may repeat of a text that was meant to be a URL: nothing that may have been meant as a password.

    That is all before the last @, and without one whatever stands where a port should, but is no number.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    _, at, after = rest.rpartition("@")
    shown = f"***@{after}" if at else _NO_PORT.sub(":***", rest)
    return str(short(f"{scheme}{separator}{shown}"))
