"""Names that callers give to instances, other than the instances' own: what `candidates` may be.

Schedulers know pods by address, pod name or URL; registrations name instances as they like.  In this order a name is

    1. the id of an instance
    2. an alias that a registration gives (`aliases`)
    3. a server's address, host:port: of an id, an alias or a listing in that form; a publisher's own address too
    4. a host: of any of those addresses

and a URL stands for its host and port.  An address that is unknown itself means the instance on its host, unless the
ports at which the instance serves are known and this is none of them: a publisher's port says nothing of them.

Invariant: a name that could be several instances of the model is none of them; it is reported with all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from kvindexer.api.fleet import Fleet
from kvindexer.index.topology import is_store
from kvindexer.types import SourceSpec

MAX_REMEMBERED: Final = 16_384
"""Most spellings of one model whose meaning is remembered."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Family = tuple[str, str, str | None]
"""Tenant, model, and deployment salt, None for any."""


class Address(NamedTuple):
    """Where a server is; a host alone has no port."""

    host: str
    port: int | None


class Candidates(NamedTuple):
    """What the candidates of a request mean."""

    spelled: dict[str, str]
    """Instance -> as the caller spells it (the first of several spellings)."""
    unknown: list[str]
    ambiguous: dict[str, list[str]]


class Identities:
    """The names of all instances, looked at anew when a source has come or gone."""

    def __init__(self, fleet: Fleet, bound: Collection[str] = ()) -> None:
        self._fleet = fleet
        self._bound = frozenset(bound)
        self._generation = -1
        self._tables: dict[Family, _Names] = {}

    def resolve(self, candidates: Iterable[str], family: Family, instances: Collection[str]) -> Candidates:
        """Find the instances that candidates mean; `instances` are the only ones that they can mean."""
        spelled: dict[str, str] = {}
        rest = []
        for name in dict.fromkeys(candidates):
            if name in instances:
                spelled[name] = name
            else:
                rest.append(name)
        if not rest:
            return Candidates(spelled, [], {})
        unknown: list[str] = []
        ambiguous: dict[str, list[str]] = {}
        names = self._names(family)
        for name in rest:
            meant = [instance for instance in names.meaning(name) if instance in instances]
            if len(meant) == 1:
                spelled.setdefault(meant[0], name)
            elif meant:
                ambiguous[name] = meant
            else:
                unknown.append(name)
        return Candidates(spelled, unknown, ambiguous)

    def _names(self, family: Family) -> _Names:
        if self._generation != self._fleet.generation:
            self._generation = self._fleet.generation
            self._tables = {}
        names = self._tables.get(family)
        if names is None:
            tenant, model, salt = family
            specs = [
                spec
                for spec in self._fleet.specs()
                if (spec.tenant, spec.model) == (tenant, model) and salt in (None, spec.additional_salt)
            ]
            names = self._tables[family] = _Names(specs, self._bound)
        return names


class _Names:
    """Whom the names of one model's instances mean."""

    def __init__(self, specs: Iterable[SourceSpec], bound: frozenset[str]) -> None:
        self._named: dict[str, dict[str, None]] = {}
        self._at: dict[Address, dict[str, None]] = {}
        self._ports: dict[str, set[int]] = {}
        """Instance -> ports at which it is known to serve."""
        self._remembered: dict[str, tuple[str, ...]] = {}
        for spec in specs:
            if not is_store(spec):
                self._add(spec, dialled=spec.endpoint not in bound)

    def _add(self, spec: SourceSpec, *, dialled: bool) -> None:
        instance = spec.instance
        for alias in spec.aliases:
            self._named.setdefault(alias, {})[instance] = None
        for name in (instance, *spec.aliases):
            address = address_of(name, bare=True)
            if address is not None:
                self._serves(instance, address)
        endpoint = address_of(spec.endpoint) if dialled else None
        if endpoint is None:
            return
        if spec.endpoint.startswith("http"):
            self._serves(instance, endpoint)
        else:
            self._is_at(instance, endpoint)

    def _serves(self, instance: str, address: Address) -> None:
        self._is_at(instance, address)
        if address.port is not None:
            self._ports.setdefault(instance, set()).add(address.port)

    def _is_at(self, instance: str, address: Address) -> None:
        for known in (address, Address(address.host, None)):
            self._at.setdefault(known, {})[instance] = None

    def meaning(self, name: str) -> tuple[str, ...]:
        """All instances that a name could mean."""
        meaning = self._remembered.get(name)
        if meaning is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            meaning = self._remembered[name] = tuple(self._look_up(name))
        return meaning

    def _look_up(self, name: str) -> Iterable[str]:
        named = self._named.get(name)
        if named:
            return named
        address = address_of(name, bare=True)
        if address is None:
            return ()
        exactly: Mapping[str, None] = self._at.get(address, {})
        if exactly or address.port is None:
            return exactly
        return [
            instance
            for instance in self._at.get(Address(address.host, None), ())
            if address.port in self._ports.get(instance, (address.port,))
        ]


def address_of(name: str, *, bare: bool = False) -> Address | None:
    """The address that a name consists of, if it is one: host:port, a URL, and if `bare`, a host alone."""
    is_url = "://" in name
    if name.count(":") > 1 and not is_url and not name.startswith("["):
        return Address(name.lower(), None) if bare else None  # an IPv6 address without brackets has no port
    try:
        url = urlsplit(name if is_url else f"//{name}")
        host, port = url.hostname, url.port
    except ValueError:  # the port is no number, or brackets hold no IPv6 address
        return None
    if is_url:
        port = port or _DEFAULT_PORTS.get(url.scheme)
    if not host or not (is_url or url.netloc == name) or (port is None and not bare):
        return None
    return Address(host, port)
