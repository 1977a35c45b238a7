"""What is wrong with settings, as far as that can be seen without serving: files are read, nothing is listened on.

`fail`: the service would not start, or could never do what is asked of it.  `warn`: it would start, and this would be
missed.  The store is asked only if that is wanted; engines and the Kubernetes API server never are.
"""

from __future__ import annotations

import resource
import ssl
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, NamedTuple

from kvindexer.access.guard import open_guard
from kvindexer.errors import RequestError, SettingsError, StoreError
from kvindexer.events.configured import rehearse
from kvindexer.service import open_texts, wanted_descriptors
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Names
from kvindexer.store.server import ShardServer

EXTRAS: Final = {"kubernetes": "kubernetes", "otel": "opentelemetry"}
"""A package that comes with an extra, by the extra's name."""


class Problem(NamedTuple):
    """What is wrong with one setting."""

    level: Literal["fail", "warn"]
    setting: str
    message: str


def refused(error: SettingsError) -> Problem:
    """What a value is not usable for."""
    return Problem("fail", error.key, f"{error.value!r} is not usable, expected {error.expected}")


async def problems(settings: Settings, *, connect: bool) -> list[Problem]:
    """Everything that was found; `connect`: the store is asked, too."""
    found = [*_sources(settings), *_doors(settings), *_tls(settings), *_extras(settings), *_descriptors(settings)]
    found += await _tokenizers(settings)
    if settings.store.kind != "memory":
        found += await _store(settings, connect=connect)
    return found


def _sources(settings: Settings) -> Iterator[Problem]:
    try:
        rehearse(settings)
    except RequestError as error:
        yield Problem("fail", "sources", f"{error.message}; {error.hint}" if error.hint else error.message)


async def _tokenizers(settings: Settings) -> list[Problem]:
    """Each by itself, so that all that can't be loaded are named."""
    found = []
    for model, spec in settings.tokenizers.items():
        try:
            await open_texts(settings.model_copy(update={"tokenizers": {model: spec}})).close()
        except SettingsError as error:
            found.append(refused(error))
    return found


def _doors(settings: Settings) -> Iterator[Problem]:
    try:
        open_guard(settings)
    except SettingsError as error:
        yield refused(error)


def _tls(settings: Settings) -> Iterator[Problem]:
    """Our own certificate and key, and the authorities of clients."""
    certificate, key, authorities = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None and key is not None:
        try:
            context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError) as error:
            yield Problem("fail", "tls_cert_file", f"{certificate} and {key} can't be used: {_why(error)}")
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError) as error:
            yield Problem("fail", "tls_client_ca_file", f"{authorities} can't be used: {_why(error)}")


def _why(error: Exception) -> str:
    match error:
        case ssl.SSLError(reason="KEY_VALUES_MISMATCH"):
            return "the key is not that of the certificate"
        case ssl.SSLError():
            return f"no PEM file, or one with a password ({error.reason or 'unreadable'})"
        case OSError(strerror=str(reason)):
            return reason
    return "no PEM file"


def _extras(settings: Settings) -> Iterator[Problem]:
    wanted = {
        "discovery": ("kubernetes", settings.discovery == "kubernetes"),
        "otlp_endpoint": ("otel", bool(settings.otlp_endpoint)),
    }
    for setting, (extra, needed) in wanted.items():
        if needed and find_spec(EXTRAS[extra]) is None:
            yield Problem("fail", setting, f"needs packages that are not installed: pip install 'kvindexer[{extra}]'")
    kubeconfig = settings.discovery_kubeconfig
    if settings.discovery == "kubernetes" and kubeconfig and not Path(kubeconfig).is_file():
        yield Problem("fail", "discovery_kubeconfig", f"{kubeconfig} is no file")


def _descriptors(settings: Settings) -> Iterator[Problem]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < (wanted := wanted_descriptors(settings)):
        message = f"needs {wanted} open files, and {hard} are allowed here (ulimit -n)"
        yield Problem("warn", "max_sources", message)


async def _store(settings: Settings, *, connect: bool) -> list[Problem]:
    try:
        client = open_client(settings)
    except (SettingsError, OSError, ValueError) as error:
        return [Problem("fail", "store", f"{settings.store} can't be used: {_why(error)}")]
    server = ShardServer(client, Names(settings.store_namespace), settings.store_timeout_s)
    try:
        if not connect:
            return []
        return [Problem("warn", "store", problem.message) for problem in await server.examine()]
    except StoreError as error:
        return [Problem("fail", "store", f"{settings.store}: {error.message} ({error.reason}); {error.hint}")]
    finally:
        await server.close()
