"""`kvindexer support-bundle`: what somebody who helps would ask for, in one archive, without secrets.

    manifest.json        what is in here, and what could not be had and why
    environment.json     Python, the machine, versions of packages
    settings.json        what differs from the defaults (--config)
    store.json           sources and checkpoints in Redis (--store, or that of --config)
    doctor.json          what `kvindexer doctor` finds
    service/...          health, readiness, sources, tiers, metrics and version of the running service

A part that can't be had is noted, and the rest goes on; the exit code is 1 then, for what was written is not what was
asked for.  Prompts, tokens and hashes are in none of these to begin
with; salts, passwords and bearer tokens are hidden, and names of tenants are replaced unless --with-names asks for
them.  Names of models, instances and hosts stay: without them nothing could be told from anything.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import platform
import re
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from kvindexer import __version__
from kvindexer.commands.client import UnreachableError, WayIn, call, exchange, way_in
from kvindexer.commands.doctor import examine
from kvindexer.commands.failure import CommandError
from kvindexer.commands.inspection import summary
from kvindexer.commands.redaction import Redaction
from kvindexer.errors import KvIndexerError, without_user
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.shown import different, secrets
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Names
from kvindexer.store.reader import Reader
from kvindexer.store.server import ShardServer

if TYPE_CHECKING:
    from argparse import Namespace

FOLDER: Final = "kvindexer-support"
FORMAT: Final = 1
MAX_PART_BYTES: Final = 16 * 1024 * 1024
"""Longest part; 4096 sources are about a quarter of that."""
MAX_TENANTS: Final = 32
"""Tenants whose tiers are asked for."""


class _Gathered(NamedTuple):
    """What has come together."""

    parts: dict[str, bytes]
    missing: dict[str, str]


def run(options: Namespace) -> int:
    """Gather, clean and write; what could not be had is told on standard error, and makes the exit code 1."""
    way = way_in(options)
    redaction = Redaction(with_names=options.with_names)
    redaction.hide([way.token])
    bundle = _Bundle(options.url, way, redaction)
    with _new_file(options) as file:
        try:
            gathered = bundle.gather(_settings(options))
            size = _write(file, gathered, bundle.manifest(gathered))
        except BaseException:
            options.out.unlink()  # half a bundle would be taken for a whole one
            raise
    for why in dict.fromkeys(gathered.missing.values()):
        names = [name for name, reason in gathered.missing.items() if reason == why]
        print(f"kvindexer: not in the bundle: {', '.join(names)}: {why}", file=sys.stderr)
    incomplete = f", incomplete: {len(gathered.missing)} could not be had" if gathered.missing else ""
    print(f"{options.out}: {len(gathered.parts) + 1} parts, {size} bytes{incomplete}")
    print("Salts, passwords and tokens are hidden; names of models, instances and hosts are not.")
    return int(bool(gathered.missing))


def _settings(options: Namespace) -> Callable[[], Settings | None]:
    """How to load what the flags name; a file that can't be used is noted, like any other part."""
    if options.config is None and options.store is None:
        return lambda: None
    flags = {} if options.store is None else {"store": options.store}
    return lambda: load_settings(options.config, flags, os.environ)


class _Bundle:
    """Gathers the parts, one after the other."""

    def __init__(self, url: str, way: WayIn, redaction: Redaction) -> None:
        self._url = url
        self._way = way
        self._redaction = redaction
        self._silence = ""

    def gather(self, load: Callable[[], Settings | None]) -> _Gathered:
        """All parts; names of tenants and secrets are learnt first, and hold for every part."""
        raw: dict[str, Any] = {"environment.json": environment()}
        missing: dict[str, str] = {}
        for name, get in chain(self._local(load, missing), self._remote(raw)):
            try:
                found = get()
            except (KvIndexerError, LookupError, TypeError, AttributeError) as error:
                told = getattr(error, "message", None) or str(error)
                missing[name] = told if isinstance(error, KvIndexerError) else "the answer has an unknown form"
            else:
                if found is not None:
                    raw[name] = found
        self._redaction.tenants(_tenants_in(raw))
        parts: dict[str, bytes] = {}
        for name, value in raw.items():
            if isinstance(value, str):
                part = self._redaction.text(value).encode()
            else:
                part = json.dumps(self._redaction.clean(value), indent=2).encode() + b"\n"
            if len(part) > MAX_PART_BYTES:
                missing[name] = f"longer than {MAX_PART_BYTES} bytes"
            else:
                parts[name] = part
        return _Gathered(parts, {name: self._redaction.text(why) for name, why in missing.items()})

    def manifest(self, gathered: _Gathered) -> bytes:
        """The contents of the archive."""
        told = {
            "format": FORMAT,
            "kvindexer": __version__,
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "url": self._redaction.text(without_user(self._url)),
            "parts": {name: {"bytes": len(part)} for name, part in sorted(gathered.parts.items())},
            "missing": dict(sorted(gathered.missing.items())),
        }
        return json.dumps(told, indent=2).encode() + b"\n"

    def _local(self, load: Callable[[], Settings | None], missing: dict[str, str]) -> Iterator[_Part]:
        """What is known without the service."""
        try:
            settings = load()
        except KvIndexerError as error:
            missing["settings.json"] = str(error)
            return
        if settings is None:
            return
        self._redaction.hide(secrets(settings))
        yield "settings.json", lambda: different(settings)
        if settings.store.kind != "memory":
            yield "store.json", lambda: asyncio.run(_store(settings))

    def _remote(self, raw: dict[str, Any]) -> Iterator[_Part]:
        """What the service says; one that can't be reached is not asked for every part."""
        asked: dict[str, Callable[[], Any]] = {
            "health.json": lambda: self._get("/health"),
            "ready.json": self._ready,
            "sources.json": lambda: self._get("/v1/sources"),
            "metrics.txt": self._metrics,
            "version.json": self._version,
            "tiers.json": lambda: self._tiers(raw),
        }
        answers = self._answers()
        for name, ask in asked.items():
            yield f"service/{name}", ask if answers else self._silent
        yield "doctor.json", self._doctor

    def _answers(self) -> bool:
        """Whether anything answers there, be it that it refuses."""
        try:
            exchange(self._url, "/ready", way=self._way)
        except UnreachableError as error:
            self._silence = error.message
            return False
        return True

    def _get(self, path: str) -> Any:
        return call(self._url, path, max_bytes=MAX_PART_BYTES, way=self._way)

    def _silent(self) -> None:
        raise CommandError(self._silence)

    def _ready(self) -> dict[str, Any]:
        answer = exchange(self._url, "/ready", max_bytes=MAX_PART_BYTES, way=self._way)
        return {"status": answer.status, "answer": answer.body.decode(errors="replace")}

    def _metrics(self) -> str:
        answer = exchange(self._url, "/metrics", max_bytes=MAX_PART_BYTES, way=self._way)
        if answer.status != 200:  # noqa: PLR2004 - HTTP's
            raise CommandError(f"the service answered {answer.status}")
        return answer.body.decode(errors="replace")

    def _version(self) -> dict[str, str]:
        return {"version": str(self._get("/openapi.json")["info"]["version"])}

    def _tiers(self, raw: dict[str, Any]) -> list[Any]:
        if "service/sources.json" not in raw:
            raise CommandError("the tenants are not known without service/sources.json")
        tenants = dict.fromkeys(source["tenant"] for source in raw["service/sources.json"]["sources"])
        asked = [f"/v1/tiers?tenant={quote(tenant, safe='')}" for tenant in list(tenants)[:MAX_TENANTS]]
        return [self._get(path) for path in asked]

    def _doctor(self) -> list[dict[str, Any]]:
        return [finding._asdict() for finding in examine(self._url, self._way)]


_Part = tuple[str, Callable[[], Any]]


async def _store(settings: Settings) -> list[dict[str, Any]]:
    server = ShardServer(open_client(settings), Names(settings.store_namespace), settings.store_timeout_s)
    try:
        return [summary(one) for one in await Reader(server).sources(None)]
    finally:
        await server.close()


def environment() -> dict[str, Any]:
    """What runs this command: the service's own, if it is run beside it."""
    named = re.findall(r"^[A-Za-z0-9._-]+", "\n".join(requires("kvindexer") or []), re.MULTILINE)
    packages = {name: _version_of(name) for name in sorted(set(named))}
    return {
        "kvindexer": __version__,
        "python": sys.version,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "packages": packages,
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of an extra
        return None


def _tenants_in(value: object, key: str = "") -> Iterator[str]:
    """Every name of a tenant, at any depth."""
    match value:
        case dict():
            for name, inside in value.items():
                if key == "auth_tenant_endpoints":
                    yield str(name)
                if name in ("tenant", "discovery_tenant") and isinstance(inside, str):
                    yield inside
                yield from _tenants_in(inside, str(name))
        case list():
            for inside in value:
                yield from _tenants_in(inside, key)


def _new_file(options: Namespace) -> io.BufferedWriter:
    """For our eyes only, and never over another one."""
    try:
        return os.fdopen(os.open(options.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except FileExistsError:
        raise CommandError(f"{options.out} exists", "choose another --out, or take it away", exit_code=2) from None
    except OSError as error:
        raise CommandError(f"{options.out}: {error.strerror}", "choose another --out", exit_code=2) from None


def _write(file: io.BufferedWriter, gathered: _Gathered, manifest: bytes) -> int:
    now = int(time.time())
    with (
        gzip.GzipFile("", "wb", fileobj=file, mtime=now) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for name, part in sorted({**gathered.parts, "manifest.json": manifest}.items()):
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mtime, entry.mode = len(part), now, 0o600
            archive.addfile(entry, io.BytesIO(part))
    return file.tell()
